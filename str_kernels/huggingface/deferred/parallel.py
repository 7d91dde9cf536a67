"""Heads that tensor parallelism has split by rows: each process defers the product with its own.

Stage: a call of such a head → the head's own ``forward`` with plain hidden states, past what the
framework does to its inputs and outputs: the logits are never made, so they need not be gathered.

FSDP's weights are ``DTensor`` as well, but whole while the head runs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from str_kernels.split import is_split

_INSTEAD = "leave lm_head out of the plan, or use DDP or FSDP2"


def is_parallel(head: nn.Module) -> bool:
    """Whether this process has a part of the head while it runs."""
    return any(map(is_split, head.parameters()))


def require_parallel(head: nn.Module) -> None:
    """Accept a linear layer with nothing around it; its product sees whether it is split by rows.

    Raises:
        ValueError: an adapter or another wrapper of such a head.
    """
    if type(head).forward is not nn.Linear.forward:
        raise ValueError(
            f"model: its head is a {type(head).__module__}.{type(head).__qualname__} whose weight "
            "tensor parallelism has split: a LoRA adapter on it, or another wrapper, is not "
            f"supported; leave lm_head out of target_modules and modules_to_save, {_INSTEAD}."
        )


def past_framework(inner: Callable[..., Any]) -> Callable[..., Any]:
    """The forward inside transformers' own, which gathers the logits of a split head."""
    while getattr(inner, "__name__", "") == "tp_forward":
        inner = inspect.getclosurevars(inner).nonlocals["original_forward"]
    return inner


def plain_states(values: Any) -> Any:
    """Arguments of a head with plain tensors in place of ``DTensor`` hidden states.

    Raises:
        ValueError: these are split themselves.
    """
    return tree_map_only(Tensor, _plain, values)


def _plain(states: Tensor) -> Tensor:
    if not is_split(states):
        return states
    if not all(placement.is_replicate() for placement in states.placements):
        raise ValueError(
            f"the head's hidden states have placements={states.placements}: each process needs "
            "them whole (input_layouts=Replicate())."
        )
    return states.to_local()


def gathered_logits(hidden_states: Tensor, weight: Any, bias: Any) -> Tensor:
    """Real logits ``[..., V]`` in every process, which all come here."""
    from torch.distributed.tensor import DTensor, Replicate

    mesh = weight.device_mesh
    states = DTensor.from_local(hidden_states, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return F.linear(states, weight, bias).full_tensor()


def refuse_part(what: str) -> None:
    """Refuse arithmetic of logits that needs other rows than this process's.

    Raises:
        ValueError: always.
    """
    raise ValueError(
        f"{what}: tensor parallelism has split the vocabulary of this head, and each process has "
        f"rows of it alone; {_INSTEAD}."
    )
