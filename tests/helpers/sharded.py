"""Test rig: FSDP2 and DeepSpeed on two CPU processes with gloo, which accelerate refuses.

    python -m torch.distributed.run --nproc_per_node 2 tests/helpers/sharded.py ENGINE -- train --config recipe.yaml
    python -m torch.distributed.run --nproc_per_node 2 tests/helpers/sharded.py ENGINE FOLDER NAME...

The first runs the command line; the second trains runs of `invariance.RUNS`. An engine is set up as by `accelerate
launch` with its file in configs/accelerate, but in float32. Only accelerate's CPU checks are disabled; wrapping,
gathering and optimiser steps are accelerate's, torch's and DeepSpeed's own.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # so that `helpers` is importable

from helpers.paths import ROOT
from helpers.tiny import free_port, set_trap

ENGINES = ("ddp", "fsdp2", "zero2", "zero3")
FILES = ROOT / "configs" / "accelerate"


def launch_variables(engine: str) -> dict[str, str]:
    """The environment variables that `accelerate launch` sets for its processes."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    words = ["--config_file", str(FILES / f"{engine}.yaml"), "--num_processes", "2", "--mixed_precision", "no"]
    words += ["--main_process_port", "0", "-m", "tracereward"]
    arguments, file, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    if arguments.use_deepspeed:
        arguments.deepspeed_fields_from_accelerate_config = ",".join(file.deepspeed_config)
        made = prepare_deepspeed_cmd_env(arguments)[1]
    else:
        made = prepare_multi_gpu_env(arguments)
    return {name: value for name, value in made.items() if name.startswith(("ACCELERATE_", "FSDP_"))}


def allow(engine: str) -> None:
    """Let this process train with `engine`; call before options are parsed."""
    os.environ.update(launch_variables(engine))
    if engine == "ddp":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    elif engine == "fsdp2":
        allow_fsdp2()
    else:
        allow_deepspeed()


def allow_fsdp2() -> None:
    """Allow FSDP2 on CPUs: accelerate would use plain data parallelism."""
    os.environ["ACCELERATE_USE_CPU"] = "true"
    import torch
    from accelerate import state
    from accelerate.utils import DistributedType

    original = state.AcceleratorState.__init__

    def init(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin
            state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    state.AcceleratorState.__init__ = init
    if not hasattr(torch.cpu, "current_device"):
        torch.cpu.current_device = lambda: "cpu"  # pyright: ignore[reportAttributeAccessIssue]


def allow_deepspeed() -> None:
    """Allow DeepSpeed on CPUs: accelerate starts it on GPUs only."""
    os.environ.update(DS_ACCELERATOR="cpu", ACCELERATE_TORCH_DEVICE="cpu")
    from accelerate import state
    from accelerate.utils import DeepSpeedPlugin, DistributedType

    from tracereward.training import config

    prepare = config._prepare
    plugin = DeepSpeedPlugin.__post_init__

    def on_no_cpu(options: Any) -> dict[str, Any]:
        given = prepare(options)
        options.use_cpu = False  # otherwise transformers would skip DeepSpeed
        return given

    def small(self: Any) -> None:
        plugin(self)
        # accelerate would use DeepSpeed's AdamW, which must be compiled, and DeepSpeed would not shard a tiny model's
        # weights.
        self.deepspeed_config["zero_force_ds_cpu_optimizer"] = False
        self.deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0

    config._prepare = on_no_cpu
    DeepSpeedPlugin.__post_init__ = small
    state.PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)  # pyright: ignore[reportAttributeAccessIssue]


def script() -> None:
    """Patch in rollouts independent of process random states (`invariance.Scripted`) and scripted validation results.

    Validation still generates answers. The first checkpoint is the best.
    """
    from helpers.invariance import Scripted
    from tracereward.commands import train
    from tracereward.training import validation

    answer, results = validation.Validation.accuracy, iter([0.1, 0.5, 0.3, 0.2])

    def accuracy(self: Any, policy: Any) -> float:
        answer(self, policy)
        return next(results)

    validation.Validation.accuracy = accuracy
    train.AdversarialTrainer = Scripted


def launch(engine: str, *words: str, output: Path, trap: dict[str, Any] | None = None) -> int | str:
    """Run this file as above.

    Args:
        engine: one of `ENGINES`.
        words: arguments after the engine.
        output: file for stdout and stderr.
        trap: trap of the first process.

    Returns:
        The launcher's exit code, or "timed out".
    """
    # `accelerate launch --num_processes 2 --cpu` silently runs a single process.
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_addr", "127.0.0.1"]
    command += ["--master_port", str(free_port()), __file__, engine, *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRAP": json.dumps(trap)}
    with open(output, "wb") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
        try:
            return process.wait(timeout=600)
        except subprocess.TimeoutExpired:
            process.terminate()  # the launcher ends its processes
            process.wait()
            return "timed out"


def main() -> None:
    engine, *words = sys.argv[1:]
    allow(engine)
    trap = json.loads(os.environ.get("TRAP", "null"))
    if trap is not None and os.environ["RANK"] == "0":
        assert not trap.pop("other"), "`other` works only with `tiny.Launcher`"
        set_trap(**trap, told=os.getpid())
    if words[0] == "--":
        from tracereward.cli import app

        sys.argv = ["tracereward", *words[1:]]
        app.main()
    import torch

    from helpers.invariance import train
    from tracereward.cli.app import leave
    from tracereward.training.discriminator import Discriminator

    folder, *names = words
    for name in names:
        if name == "no all-reduce":
            Discriminator._add_up = lambda self, sums: None
        torch.save(train(name, Path(folder)), Path(folder) / f"{name}.{os.environ['RANK']}.pt")
    leave(0)


if __name__ == "__main__":
    main()
