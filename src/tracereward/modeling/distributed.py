"""Models whose weights are spread over processes (FSDP2, DeepSpeed ZeRO-3), beside models that are whole on each.

accelerate spreads the policy; `shard` the discriminator, which accelerate does not know.

A forward pass of a spread model is a joint act: all processes gather its weights layer by layer. They must make equally
many passes, whatever each has to compute; one that is done repeats its last until the others are.
"""

import contextlib
import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import broadcast_object_list
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel, Trainer
from transformers.integrations import deepspeed
from transformers.modeling_layers import GradientCheckpointingLayer


def most(count: int) -> int:
    """The largest `count` of all processes, each of which must ask."""
    if not dist.is_initialized():
        return count
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    counts = torch.tensor(count, device=device)
    dist.all_reduce(counts, dist.ReduceOp.MAX)
    return int(counts)


def from_main(value: Any) -> Any:
    """What the main process hands in; every process must ask."""
    return broadcast_object_list([value])[0] if dist.is_initialized() else value


def lost_another(error: RuntimeError) -> bool:
    """Whether a joint step failed because another process of the run is gone."""
    return isinstance(error, dist.DistError) or (dist.is_initialized() and "by peer" in str(error))  # gloo's words


def several_processes() -> bool:
    """Whether this run is distributed."""
    return dist.is_initialized() and dist.get_world_size() > 1


@torch.no_grad()
def same_on_all(parameters: Iterable[Tensor], device: torch.device) -> None:
    """Give all processes the main process's values, one tensor after the other by way of `device`."""
    for parameter in parameters:
        values = parameter.data.to(device)
        dist.broadcast(values, 0)
        parameter.data.copy_(values)


def shard(model: torch.nn.Module, device: torch.device) -> None:
    """Leave each process a part of a model's weights on `device` (FSDP2); gradients are summed over the processes.

    A model that is not there yet is moved unit by unit, so that it is whole on no device.

    Each layer is a unit, so are embeddings of their own, and all else is another: they are gathered one after the
    other while they compute, and let go behind each pass, so that nothing stale is there when the parts change between
    two passes without gradients.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    units = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()  # pyright: ignore[reportCallIssue]
    if head is None or head.weight is not embeddings.weight:
        units.append(embeddings)
    for unit in [*units, model]:
        part = fully_shard(unit, mesh=mesh, reshard_after_forward=True)
        part.set_gradient_divide_factor(1.0)  # pyright: ignore[reportAttributeAccessIssue]
        part.set_force_sum_reduction_for_comms(True)  # pyright: ignore[reportAttributeAccessIssue] (gloo has no other)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, on each process; every process must ask for one that is in parts."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def as_parts(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor that is whole on each process, in parts where `like` is and has its shape."""
    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


@torch.no_grad()
def clip_gradients(parameters: Iterable[Tensor], limit: float) -> float:
    """`torch.nn.utils.clip_grad_norm_` of parameters of which some are in parts; returns the norm before."""
    parameters = [parameter for parameter in parameters if parameter.grad is not None]
    in_parts = [parameter for parameter in parameters if isinstance(parameter, DTensor)]
    others = [parameter for parameter in parameters if not isinstance(parameter, DTensor)]
    if not in_parts:
        return float(torch.nn.utils.clip_grad_norm_(others, limit))
    gradients = [local_part(parameter.grad) for parameter in [*in_parts, *others]]  # pyright: ignore[reportArgumentType]
    squares = torch.stack([gradient.float().square().sum() for gradient in gradients])
    of_parts = squares[: len(in_parts)].sum()
    dist.all_reduce(of_parts)
    norm = (of_parts + squares[len(in_parts) :].sum()).sqrt()
    for gradient in gradients:
        gradient.mul_((limit / (norm + 1e-6)).clamp(max=1.0))
    return float(norm)


def local_part(parameter: Tensor) -> Tensor:
    """What this process holds of a parameter."""
    if hasattr(parameter, "ds_tensor"):  # ZeRO-3; its parameters are empty but in a forward and backward pass
        return parameter.ds_tensor  # pyright: ignore[reportAttributeAccessIssue]
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter.data


@contextlib.contextmanager
def whole_models() -> Iterator[None]:
    """Models that are loaded here are whole on each process: ZeRO-3 would leave them without weights."""
    config = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = config


@contextlib.contextmanager
def gathered(model: torch.nn.Module) -> Iterator[None]:
    """The weights of a model are whole on each process, also where ZeRO-3 has loaded it and does not yet train it."""
    if not deepspeed.is_deepspeed_zero3_enabled():
        yield
        return
    from deepspeed.runtime.zero import GatheredParameters  # pyright: ignore[reportMissingImports]

    with GatheredParameters(list(model.parameters())):
        yield


def gather_head_for_gradient(policy: Any) -> None:
    """Make an LM head's weights whole under ZeRO-3 while autograd adds their gradient to them.

    TRL's fused head (1.16) has them in parts again by then, where DeepSpeed has not yet seen who uses them: in the
    first pass. A gradient of another shape than its weights is an error. Every process must ask, after DeepSpeed has
    set its own hooks, which take the gradient away.
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

    def let_go(_: Tensor) -> None:
        if gathered_here:
            head.partition()

    head.register_hook(gather)
    head.register_post_accumulate_grad_hook(let_go)


def frozen_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A whole copy of a model that was just loaded, for its log-probs."""
    if deepspeed.is_deepspeed_zero3_enabled():
        with whole_models():
            other = type(model).from_pretrained(model.config._name_or_path, dtype=model.dtype)
    else:
        other = copy.deepcopy(model)
    return other.eval().requires_grad_(False)


def is_spread(trainer: Trainer) -> bool:
    """Whether FSDP or DeepSpeed trains the policy."""
    return bool(trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)


def whole_weights(trainer: Trainer) -> dict[str, Any]:
    """All of a spread policy's weights, on the main process; every process must ask."""
    return trainer.accelerator.get_state_dict(trainer.model_wrapped) or {}
