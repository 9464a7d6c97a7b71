"""Startup time: `tracereward --help` and `import tracereward` compared with bare Python and `import trl`.

    python benchmarks/startup.py [--repeat 15] [--json FILE]

Each command runs in a fresh process, alternating, after one warm-up round. Prints the median wall-clock seconds and
their interquartile range, the median CPU seconds, which exclude other work on the machine, and the ratio of CPU seconds
to `python -c pass`.
"""

import resource
import subprocess
import sys
import time

import common
from common import Result, iqr, median

COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "import tracereward": ["-c", "import tracereward"],
    "tracereward --help": ["-m", "tracereward", "--help"],
    "tracereward train --help": ["-m", "tracereward", "train", "--help"],
    "tracereward score --help": ["-m", "tracereward", "score", "--help"],
    "import trl": ["-c", "import trl"],
    "from trl import GRPOTrainer": ["-c", "from trl import GRPOTrainer"],
}


def children() -> float:
    """CPU seconds of finished child processes."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = common.parser(__doc__, model=False)
    parser.add_argument("--repeat", type=int, default=15)
    args = parser.parse_args()
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    processor: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for turn in range(args.repeat + 1):
        for name, words in COMMANDS.items():
            start, used = time.perf_counter(), children()
            subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            if turn:
                times[name].append(time.perf_counter() - start)
                processor[name].append(children() - used)
    bare = median(processor["python -c pass"])
    result = Result("startup", {"repeat": args.repeat})
    for name, seconds in times.items():
        result.rows.append(
            {
                "command": name,
                "wall, s": median(seconds),
                "IQR": iqr(seconds),
                "CPU, s": median(processor[name]),
                "ratio": median(processor[name]) / bare,
            }
        )
    result.write(args.json)


if __name__ == "__main__":
    main()
