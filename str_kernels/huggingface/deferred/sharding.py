"""Heads whose weight a framework splits over processes or loads for each call: what they are."""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

from str_kernels.huggingface.deferred.parallel import require_parallel


def is_sharded(parameter: Tensor) -> bool:
    """Whether this is a process's part of a parameter (FSDP2, tensor parallelism, ZeRO-3)."""
    return type(parameter).__name__ in ("DTensor", "FlatParameter") or is_of_zero3(parameter)


def is_gathered_later(head: nn.Module) -> bool:
    """Whether a framework makes the weight whole before the head runs, so that it is checked then.

    Raises:
        ValueError: another owner has split the weight, or FSDP1 has it apart from its root.
    """
    _refuse_owner(head)
    return _is_flat(head) or is_offloaded(head) or any(map(is_sharded, head.parameters()))


def why_unusable(model: nn.Module, head: nn.Module) -> str | None:
    """Why nothing can be computed with the model where it is, or None."""
    if any(p.is_meta for p in model.parameters()):
        return "its weights are on the meta device"
    if any(map(is_sharded, model.parameters())) or _is_flat(head):
        return "its weights are sharded"
    return "its weights are sharded" if any(map(is_fsdp1, model.modules())) else None


def row_count(head: nn.Module) -> int:
    """How many rows the whole weight of this head has."""
    if _is_flat(head):
        return head.out_features
    weight = getattr(head, "weight", None)
    if weight is not None:
        return _whole_shape(weight)[0]
    shapes = map(_whole_shape, head.parameters())
    return max(shape[0] for shape in shapes if len(shape) == 2)


def has_one_weight(head: nn.Module) -> bool:
    """Whether every call of the head multiplies by the same matrix, with adapters or without."""
    return sum(len(_whole_shape(p)) > 1 for p in head.parameters()) == 1


def _whole_shape(parameter: Tensor) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)


def is_of_zero3(tensor: Tensor) -> bool:
    """Whether this is a parameter that ZeRO-3 splits."""
    return hasattr(tensor, "ds_id")


def is_offloaded(head: nn.Module) -> bool:
    """Whether a hook of accelerate's loads the head's weight for each call."""
    hooks = (getattr(module, "_hf_hook", None) for module in head.modules())
    every = (single for hook in hooks for single in getattr(hook, "hooks", (hook,)))
    return any(getattr(hook, "offload", False) for hook in every)


def _refuse_owner(head: nn.Module) -> None:
    if any(map(is_fsdp1, head.modules())):
        raise ValueError(
            "model: FSDP1 has wrapped its head as a unit of its own, whose weight is gone before "
            "the loss: leave the head in the root unit (out of the auto-wrap policy), or use FSDP2."
        )
    if any(map(_of_tensors, head.parameters())):
        require_parallel(head)


def is_fsdp1(module: nn.Module) -> bool:
    """Whether this is a wrapper of FSDP1."""
    return _is_fsdp(module, "FullyShardedDataParallel")


def is_fsdp2(module: nn.Module) -> bool:
    """Whether FSDP2 has made a group of this module's parameters."""
    return _is_fsdp(module, "FSDPModule")


def _is_fsdp(module: nn.Module, kind: str) -> bool:
    package = sys.modules.get("torch.distributed.fsdp")  # nothing is of a class nobody imported
    return package is not None and isinstance(module, getattr(package, kind))


def _is_flat(head: nn.Module) -> bool:
    """Whether FSDP1 has put the weight into a flat one, of which it shows a part."""
    weight = getattr(head, "weight", None)
    return isinstance(head, nn.Linear) and isinstance(weight, Tensor) and weight.dim() < 2


def _of_tensors(parameter: Tensor) -> bool:
    mesh = getattr(parameter, "device_mesh", None)
    return "tp" in (getattr(mesh, "mesh_dim_names", None) or ())
