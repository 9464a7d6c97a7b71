"""Models with sharded weights (FSDP2, DeepSpeed ZeRO-3), alongside models that each process holds in full.

accelerate shards the policy. `shard` shards the discriminator, which accelerate does not manage.

A forward pass of a sharded model is a collective call: all processes gather its weights layer by layer. They must make
the same number of passes, whatever each has to compute; a process that has finished repeats its last pass.
"""

import contextlib
import os
from collections.abc import Iterable, Iterator
from typing import Any

import joblib
import torch
import torch.distributed as dist
from accelerate.utils import broadcast_object_list
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import Trainer
from transformers.integrations import deepspeed
from transformers.modeling_layers import GradientCheckpointingLayer


def share_cores() -> None:
    """Limit torch's threads to the cores of this process, unless ``OMP_NUM_THREADS`` says how many it has.

    torch starts a thread for each core of the machine: in a container, and with several processes on one machine, that
    is more than may run, and threads that wait for each other are slower than few.
    """
    if os.environ.get("OMP_NUM_THREADS"):
        return
    cores = joblib.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if torch.get_num_threads() > max(1, cores):
        torch.set_num_threads(max(1, cores))


def all_reduce_max(count: int) -> int:
    """The maximum of `count` over processes. A collective call."""
    if not dist.is_initialized():
        return count
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    counts = torch.tensor(count, device=device)
    dist.all_reduce(counts, dist.ReduceOp.MAX)
    return int(counts)


def broadcast_object(value: Any) -> Any:
    """The main process's `value`, on each process. A collective call."""
    return broadcast_object_list([value])[0] if dist.is_initialized() else value


def is_peer_failure(error: RuntimeError) -> bool:
    """Whether a collective call failed because another process of the run has ended."""
    return isinstance(error, dist.DistError) or (dist.is_initialized() and "by peer" in str(error))  # gloo's words


def is_distributed() -> bool:
    """Whether this run has more than one process."""
    return dist.is_initialized() and dist.get_world_size() > 1


@torch.no_grad()
def broadcast_parameters(parameters: Iterable[Tensor], device: torch.device) -> None:
    """Copy the main process's values to all processes, one tensor at a time through `device`. A collective call."""
    for parameter in parameters:
        values = parameter.data.to(device)
        dist.broadcast(values, 0)
        parameter.data.copy_(values)


def shard(model: torch.nn.Module, device: torch.device) -> None:
    """Shard a model's weights on `device` with FSDP2; gradients are summed over processes.

    A model on another device is moved unit by unit, so that no device ever holds it in full.

    Units are each layer, untied embeddings, and everything else. Each is gathered while it computes and resharded after
    its forward pass, so that weights that change between two passes without gradients are never stale.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    units = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()  # pyright: ignore[reportCallIssue]
    if head is None or head.weight is not embeddings.weight:
        units.append(embeddings)
    for unit in [*units, model]:
        sharded = fully_shard(unit, mesh=mesh, reshard_after_forward=True)
        sharded.set_gradient_divide_factor(1.0)  # pyright: ignore[reportAttributeAccessIssue]
        sharded.set_force_sum_reduction_for_comms(True)  # pyright: ignore[reportAttributeAccessIssue] (gloo has no other)


def full_tensor(tensor: Tensor) -> Tensor:
    """The full tensor. A collective call if the tensor is sharded (DTensor)."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Shard a full tensor as `like` is, where `like` is sharded and both have the same shape."""
    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


@torch.no_grad()
def clip_gradients(parameters: Iterable[Tensor], limit: float) -> float:
    """`torch.nn.utils.clip_grad_norm_` for a mix of sharded and full parameters; returns the norm before clipping."""
    parameters = [parameter for parameter in parameters if parameter.grad is not None]
    sharded = [parameter for parameter in parameters if isinstance(parameter, DTensor)]
    full = [parameter for parameter in parameters if not isinstance(parameter, DTensor)]
    if not sharded:
        return float(torch.nn.utils.clip_grad_norm_(full, limit))
    gradients = [local_shard(parameter.grad) for parameter in [*sharded, *full]]  # pyright: ignore[reportArgumentType]
    squares = torch.stack([gradient.float().square().sum() for gradient in gradients])
    of_sharded = squares[: len(sharded)].sum()
    dist.all_reduce(of_sharded)
    norm = (of_sharded + squares[len(sharded) :].sum()).sqrt()
    for gradient in gradients:
        gradient.mul_((limit / (norm + 1e-6)).clamp(max=1.0))
    return float(norm)


def local_shard(parameter: Tensor) -> Tensor:
    """The shard of a parameter that this process holds."""
    if hasattr(parameter, "ds_tensor"):  # ZeRO-3; its parameters are empty outside forward and backward passes
        return parameter.ds_tensor  # pyright: ignore[reportAttributeAccessIssue]
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter.data


@contextlib.contextmanager
def zero3_disabled() -> Iterator[None]:
    """Load models in full on each process; with ZeRO-3 active they would be loaded without weights."""
    config = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = config


@contextlib.contextmanager
def gathered_parameters(model: torch.nn.Module) -> Iterator[None]:
    """Gather the weights of a model that ZeRO-3 has loaded but does not train yet. A collective call under ZeRO-3."""
    if not deepspeed.is_deepspeed_zero3_enabled():
        yield
        return
    from deepspeed.runtime.zero import GatheredParameters  # pyright: ignore[reportMissingImports]

    with GatheredParameters(list(model.parameters())):
        yield


def gather_head_for_gradient(policy: Any) -> None:
    """Gather an LM head's weights under ZeRO-3 while autograd accumulates their gradient.

    In the first pass, before DeepSpeed has traced which module uses them, TRL's fused head (1.16) has them partitioned
    again by then, and a gradient whose shape differs from its weights' is an error. A collective call, to be made after
    DeepSpeed has registered its own hooks, which take the gradient away.
    """
    if not deepspeed.is_deepspeed_zero3_enabled():
        return
    head = policy.get_output_embeddings().weight
    if not head.requires_grad or head is policy.get_input_embeddings().weight:
        return
    gathered_here = False

    def gather(_: Tensor) -> None:
        nonlocal gathered_here
        gathered_here = head.numel() == 0
        if gathered_here:
            head.all_gather()

    def partition(_: Tensor) -> None:
        if gathered_here:
            head.partition()

    head.register_hook(gather)
    head.register_post_accumulate_grad_hook(partition)


def is_sharded(trainer: Trainer) -> bool:
    """Whether the policy is trained with FSDP or DeepSpeed."""
    return bool(trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)


def full_state_dict(trainer: Trainer) -> dict[str, Any]:
    """The full weights of a sharded policy, on the main process. A collective call."""
    return trainer.accelerator.get_state_dict(trainer.model_wrapped) or {}
