"""Is the estimate of `tracereward plan` right? Against a short run of `train` with the package's tiny model.

    python benchmarks/plan.py [MODEL_FOLDER] [--steps 20] [--json FILE]

Both run in a fresh process. Memory is the peak resident set size of the run; time is its wall-clock time from the start
of the process to its end, so other work on the machine enters both.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common

from tracereward.files import write_jsonl
from tracereward.quickstart.shipped import BASE
from tracereward.synthetic.arithmetic import generate


def command(folder: Path, model: str, steps: int) -> list[str]:
    rows = folder / "experts.jsonl"
    write_jsonl(rows, generate("multi-skill", 60, seed=0))
    given = ["--task", "arithmetic", "--dataset_name", str(rows), "--model_name_or_path", model]
    return [*given, "--max_steps", str(steps), "--report_to", "none", "--output_dir", str(folder / "run")]


def timed(words: list[str]) -> tuple[float, int, str]:
    """Seconds, peak bytes and stdout of a command."""
    start = time.perf_counter()
    one = {**os.environ, "OMP_NUM_THREADS": "1"}  # two threads of a busy machine wait for each other
    with subprocess.Popen(
        [sys.executable, "-m", "tracereward", *words], stdout=subprocess.PIPE, text=True, env=one
    ) as child:
        assert child.stdout is not None
        text = child.stdout.read()
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"failed: {' '.join(words)}")
    return time.perf_counter() - start, usage.ru_maxrss * 1024, text


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        words = command(Path(folder), options.model or str(BASE), options.steps)
        plan_seconds, _, text = timed(["plan", *words, "--json"])
        plan: dict[str, Any] = json.loads(text)
        seconds, peak, _ = timed(["train", *words])
    estimate, parts = sum(plan["seconds"].values()), plan["memory"]
    print(f"plan took {plan_seconds:.0f} s")
    print(f"time: {estimate:.0f} s estimated, {seconds:.0f} s measured, ratio {estimate / seconds:.2f}")
    print(f"memory: {parts['peak'] / 1e6:.0f} MB estimated, {peak / 1e6:.0f} MB measured, {parts['peak'] / peak:.2f}")
    values = {"plan_seconds": plan_seconds, "estimate": estimate, "seconds": seconds, "peak": peak, "plan": plan}
    if options.json:
        options.json.write_text(json.dumps(values, indent=1) + "\n")


if __name__ == "__main__":
    main()
