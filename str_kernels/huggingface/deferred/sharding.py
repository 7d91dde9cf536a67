"""Heads whose weight a framework splits over processes: what they are, and holding one whole.

Stage: a head of which this process has a part → its weight ``[V, D]``, from its product to the
loss. Nothing here gathers by itself; the framework that split the weight does.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

_OF_TENSOR_PARALLELISM = "_hf_tp_plan"  # transformers' name of a module's part in its plan


def is_sharded(parameter: Tensor) -> bool:
    """Whether this is a process's part of a parameter (FSDP2, tensor parallelism, ZeRO-3)."""
    return type(parameter).__name__ in ("DTensor", "FlatParameter") or hasattr(parameter, "ds_id")


def is_gathered_later(head: nn.Module) -> bool:
    """Whether FSDP makes the head's weight whole before the head runs, so that it is checked then.

    Raises:
        ValueError: another owner has split the weight, or FSDP1 has it apart from its root.
    """
    _refuse_owner(head)
    return _is_flat(head) or any(map(is_sharded, head.parameters()))


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
        return weight.shape[0]
    return max(p.shape[0] for p in head.parameters() if p.dim() == 2)


def refuse_zero3(head: nn.Module) -> None:
    """Refuse a head of ZeRO-3, whose product would pass the patch unseen.

    Raises:
        ValueError: its weight is one of ZeRO-3's.
    """
    if any(hasattr(p, "ds_id") for p in head.parameters()):
        raise ValueError(
            "model: DeepSpeed's ZeRO-3 has split its head, which is not supported: use ZeRO-1 or "
            "ZeRO-2, or FSDP2."
        )


@contextmanager
def whole_head(head: nn.Module | None, weight: Tensor) -> Iterator[None]:
    """The weight that ``head`` was called with is whole in this block.

    A weight that FSDP2 freed after the head's forward is gathered, and freed again afterwards; so
    every process has to come here.

    Raises:
        ValueError: the weight was freed, and cannot be gathered here.
    """
    owners = []
    if is_freed(weight):
        modules = [] if head is None else head.modules()
        owners = [module for module in modules if is_fsdp2(module)]
        if not owners:
            raise ValueError(
                "the head's weight was freed between the head and the loss: compute the loss in "
                "the model's forward (give it labels), or let FSDP keep the head whole "
                "(reshard_after_forward=False)."
            )
    for owner in owners:
        owner.unshard()
    try:
        yield
    finally:
        for owner in owners:
            owner.reshard()


def is_freed(tensor: Tensor) -> bool:
    """Whether the storage was given back, as FSDP does between two uses of a weight."""
    return tensor.numel() > 0 and tensor.untyped_storage().size() == 0


def _refuse_owner(head: nn.Module) -> None:
    refuse_zero3(head)
    if any(map(is_fsdp1, head.modules())):
        raise ValueError(
            "model: FSDP1 has wrapped its head as a unit of its own, whose weight is gone before "
            "the loss: leave the head in the root unit (out of the auto-wrap policy), or use FSDP2."
        )
    if getattr(head, _OF_TENSOR_PARALLELISM, None) or any(map(_of_tensors, head.parameters())):
        raise ValueError(
            "model: tensor parallelism has split its head over processes, which is not supported: "
            "leave lm_head out of the plan, or use DDP or FSDP2."
        )


def is_fsdp1(module: nn.Module) -> bool:
    """Whether this is a wrapper of FSDP1."""
    return _is_fsdp(module, "FullyShardedDataParallel")


def is_fsdp2(module: nn.Module) -> bool:
    """Whether this is a module that FSDP2 has sharded as a unit."""
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
