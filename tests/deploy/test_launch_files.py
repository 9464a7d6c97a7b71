"""Launch files: accelerate parses them, linters pass, and the Slurm script runs two nodes on one machine."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env

from helpers.launch_files import FILES, TINY_RUN, wait_for
from helpers.paths import ROOT
from tracereward.synthetic.arithmetic import generate

SLURM = ROOT / "deploy" / "slurm"

# accelerate


def test_each_strategy_has_a_launch_file():
    assert FILES.keys() == {"ddp", "fsdp2", "zero2", "zero3"}


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero2", "zero3"])
def test_accelerate_parses_launch_file(name):
    config = load_config_from_file(str(FILES[name]))
    kind = {"ddp": DistributedType.MULTI_GPU, "fsdp2": DistributedType.FSDP}.get(name, DistributedType.DEEPSPEED)
    assert config.distributed_type == kind
    assert (config.num_processes, config.num_machines, config.mixed_precision) == (8, 1, "bf16")
    known = {action.dest for action in launch_command_parser()._actions}
    options = {**config.fsdp_config, **config.deepspeed_config}
    assert options.keys() <= known, "the launcher ignores names that it does not know"
    if name == "fsdp2":
        assert options["fsdp_version"] == 2
        assert options["fsdp_reshard_after_forward"] is True
        assert options["fsdp_state_dict_type"] == "FULL_STATE_DICT"
        assert options["fsdp_auto_wrap_policy"] == "TRANSFORMER_BASED_WRAP"
    elif name != "ddp":
        assert options["zero_stage"] == int(name[-1])
        assert options["zero3_init_flag"] is (name == "zero3")
        assert options.get("zero3_save_16bit_model", False) is (name == "zero3")
        assert options["deepspeed_multinode_launcher"] == "standard"  # pdsh would need ssh


def test_fsdp2_plugin_in_the_processes(monkeypatch):
    """The launcher passes its file as environment variables, from which accelerate builds its plugin."""
    argv = ["--config_file", str(FILES["fsdp2"]), "--main_process_port", "0", "-m", "tracereward", "train"]
    arguments, *_ = _validate_launch_command(launch_command_parser().parse_args(argv))
    for name, value in prepare_multi_gpu_env(arguments).items():
        monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert (plugin.fsdp_version, plugin.reshard_after_forward) == (2, True)
    assert "FULL_STATE_DICT" in str(plugin.state_dict_type)
    assert plugin.cpu_ram_efficient_loading is False  # otherwise the discriminator is empty on ranks other than 0
    assert os.environ["ACCELERATE_MIXED_PRECISION"] == "bf16"


# Slurm


@pytest.mark.parametrize("script", ["train.sbatch", "node.sh"])
def test_shellcheck(script):
    done = subprocess.run(["bash", "-n", SLURM / script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    shellcheck = shutil.which("shellcheck") or shutil.which("shellcheck", path=str(Path(sys.executable).parent))
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run([shellcheck, SLURM / script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


SRUN = """#!/usr/bin/env bash
# Both nodes are this machine; as in Slurm, signals go to the tasks and not to their children.
while [[ $1 == --* ]]; do shift; done
SLURM_NODEID=0 "$@" & first=$!
SLURM_NODEID=1 "$@" & second=$!
trap 'told=true; kill -TERM $first $second' TERM
status=0
for task in $first $second; do
    told=true
    while $told; do
        told=false code=0
        wait $task || code=$?
    done
    [ $code -eq 0 ] || status=$code
done
exit $status
"""
SCONTROL = """#!/usr/bin/env bash
if [ "$1" = show ]; then echo 127.0.0.1; echo other; else echo "$@" >> requeued; fi
"""
# A launcher with one process; it records signals sent to the launcher by mistake.
ACCELERATE = """#!/usr/bin/env bash
trap 'touch launcher-was-told' TERM
sleep "$SECONDS_OF_WORK" &
printf '%s\\n' "$@" > "launched.$SLURM_NODEID"
wait $! || exit 1
"""


def executable(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def submit(folder: Path, *argv: str, **variables: str) -> subprocess.Popen:
    """Run the batch script like Slurm, on two nodes with one process each."""
    executable(folder / "bin" / "srun", SRUN)
    executable(folder / "bin" / "scontrol", SCONTROL)
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]]),
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_NNODES": "2",
        "SLURM_GPUS_ON_NODE": "1",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "ACCELERATE_CONFIG": str(FILES["ddp"]),
        **variables,
    }
    output = open(folder / "output.txt", "wb")  # noqa: SIM115
    with output:
        return subprocess.Popen(
            ["bash", SLURM / "train.sbatch", *argv], cwd=folder, env=environment, stdout=output, stderr=output
        )


def test_slurm_starts_a_launcher_on_each_node(tmp_path):
    executable(tmp_path / "bin" / "accelerate", ACCELERATE)
    script = submit(tmp_path, "recipe.yaml", "--max_steps", "3", SECONDS_OF_WORK="0")
    assert script.wait(timeout=30) == 0
    ranks = []
    for node in (0, 1):
        words = (tmp_path / f"launched.{node}").read_text().split()
        arguments = launch_command_parser().parse_args(words[1:])
        assert words[0] == "launch"
        assert (arguments.num_machines, arguments.num_processes) == (2, 2)
        assert arguments.main_process_ip == "127.0.0.1"
        assert 20_000 <= arguments.main_process_port < 40_000
        assert (arguments.module, arguments.training_script) == (True, "tracereward")
        assert arguments.training_script_args == ["train", "--config", "recipe.yaml", "--resume", "--max_steps", "3"]
        ranks.append(arguments.machine_rank)
    assert ranks == [0, 1]
    assert not (tmp_path / "requeued").exists()


@pytest.mark.skipif(shutil.which("pkill") is None, reason="pkill is not installed")
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM], ids=["time limit", "preemption"])
def test_slurm_stops_the_processes_and_requeues_at_the_time_limit(tmp_path, number):
    executable(tmp_path / "bin" / "accelerate", ACCELERATE)
    script = submit(tmp_path, "recipe.yaml", SECONDS_OF_WORK="100")
    try:
        wait_for(lambda: len(list(tmp_path.glob("launched.*"))) == 2, script, 30, tmp_path)
        script.send_signal(number)
        assert script.wait(timeout=30) == 1
    finally:
        script.kill()
    assert not (tmp_path / "launcher-was-told").exists()
    assert (tmp_path / "requeued").exists() is (number == signal.SIGUSR1)  # after a preemption Slurm itself requeues


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("pkill") is None, reason="pkill is not installed")
def test_slurm_trains_stops_and_resumes(tmp_path, tiny_model_folder):
    """With the real launcher and two training processes; the second submission resumes where the first stopped."""
    rows = generate("misconception", 60, seed=1)
    (tmp_path / "traces.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {**TINY_RUN, "model_name_or_path": str(tiny_model_folder), "save_steps": 100}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    variables = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    metrics, checkpoints = tmp_path / "run" / "metrics.jsonl", tmp_path / "run" / "checkpoints"

    def steps() -> list[int]:
        found = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.is_file() else []
        return [row["step"] for row in found if row["phase"] == "train"]

    script = submit(tmp_path, "recipe.yaml", **variables)
    try:
        wait_for(lambda: len(steps()) >= 3, script, 240, tmp_path)
        script.send_signal(signal.SIGUSR1)
        assert script.wait(timeout=120) != 0
    finally:
        script.kill()
    [left] = checkpoints.glob("checkpoint-*")
    stopped = int(left.name.removeprefix("checkpoint-"))
    assert (left / "complete.json").is_file()
    assert (left / "rng_state_1.pth").is_file(), "there was one process only"
    assert (tmp_path / "requeued").read_text().split() == ["requeue", str(os.getpid())]

    script = submit(tmp_path, "recipe.yaml", "--max_steps", str(stopped + 2), **variables)
    assert script.wait(timeout=300) == 0, (tmp_path / "output.txt").read_text()[-4000:]
    assert f"resuming from run/checkpoints/checkpoint-{stopped}" in (tmp_path / "output.txt").read_text()
    assert steps() == list(range(1, stopped + 3))
    assert (tmp_path / "run" / "policy" / "model.safetensors").is_file()
