"""Test rig: FSDP2 and DeepSpeed on two CPU processes with gloo, which accelerate refuses; then `test_invariance.train`.

    python -m torch.distributed.run --nproc_per_node 2 tests/sharded.py ENGINE FOLDER NAME...

Only the refusals are taken away: what wraps, gathers and steps is accelerate's, torch's and DeepSpeed's own.
"""

import os
import sys
from pathlib import Path
from typing import Any

ENGINES = ("ddp", "fsdp2", "zero2", "zero3")


def deepspeed_config(stage: int) -> dict[str, Any]:
    """What `accelerate launch` would make of configs/accelerate/zeroN.yaml, in float32."""
    return {
        "zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True},
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def allow_fsdp2() -> None:
    """accelerate takes processes without an accelerator for plain data parallelism."""
    os.environ.update(
        ACCELERATE_USE_CPU="true",
        ACCELERATE_USE_FSDP="true",
        FSDP_VERSION="2",
        FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP",
        FSDP_TRANSFORMER_CLS_TO_WRAP="LlamaDecoderLayer",
        FSDP_STATE_DICT_TYPE="FULL_STATE_DICT",
        FSDP_RESHARD_AFTER_FORWARD="true",
        FSDP_CPU_RAM_EFFICIENT_LOADING="false",
        FSDP_OFFLOAD_PARAMS="false",
    )
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
    """accelerate starts DeepSpeed on accelerators only."""
    os.environ.update(DS_ACCELERATOR="cpu", ACCELERATE_USE_DEEPSPEED="true", ACCELERATE_TORCH_DEVICE="cpu")
    from accelerate import state
    from accelerate.utils import DistributedType

    from tracereward import config

    prepare = config._prepare

    def on_no_cpu(options: Any) -> dict[str, Any]:
        given = prepare(options)
        options.use_cpu = False  # transformers would leave DeepSpeed out
        return given

    config._prepare = on_no_cpu
    state.PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)  # pyright: ignore[reportAttributeAccessIssue]


def main() -> None:
    engine, folder, *names = sys.argv[1:]
    options: dict[str, Any] = {}
    if engine == "fsdp2":
        allow_fsdp2()
    elif engine.startswith("zero"):
        allow_deepspeed()
        options["deepspeed"] = deepspeed_config(int(engine[-1]))
    else:
        os.environ["ACCELERATE_USE_CPU"] = "true"
    import torch

    from test_invariance import train

    for name in names:
        run = train(name, Path(folder), **options)
        torch.save(run, Path(folder) / f"{name}.{engine}.{os.environ['RANK']}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
