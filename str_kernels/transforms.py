"""torch's transforms of functions: which are in force, and the words for what is not supported.

The fused loss has one derivative, in reverse mode, for one upstream gradient at a time. The dense
backend is plain autograd, through which every transform passes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

_DENSE = "use backend='dense', which materialises the logits and supports it"


def functional() -> bool:
    """Whether a transform of ``torch.func`` (grad, vmap, jvp, ...) is in force."""
    return torch._C._are_functorch_transforms_active()


def forward_mode(values: Iterable[Any]) -> bool:
    """Whether a tensor among these values carries a tangent of forward-mode AD."""
    if forward_ad._current_level < 0:
        return False
    tensors = (x for x in values if isinstance(x, Tensor))
    return any(forward_ad.unpack_dual(x).tangent is not None for x in tensors)


def refuse_functional() -> None:
    """Refuse transforms of ``torch.func`` on the fused loss.

    Raises:
        RuntimeError: one is in force.
    """
    if functional():
        raise RuntimeError(
            "linear_cross_entropy: torch.func (grad, vmap, jvp, hessian and the like) cannot "
            f"transform the fused loss; {_DENSE}, or take a first derivative by torch.autograd."
        )


def refuse_forward_mode() -> None:
    """Refuse forward-mode AD on the fused loss.

    Raises:
        RuntimeError: always.
    """
    raise RuntimeError(
        "linear_cross_entropy is differentiable in reverse mode only: forward-mode AD "
        f"(torch.autograd.forward_ad) asks for a tangent; {_DENSE}."
    )


def refuse_second_order(*upstream: Tensor | None) -> None:
    """Refuse a backward that is to be differentiated, or that is of many upstream gradients.

    Raises:
        RuntimeError: it is one of these.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            "linear_cross_entropy is differentiable once: create_graph=True asks for a second "
            "derivative; use backend='dense' for one."
        )
    if functional() or any(x is not None and _batched(x) for x in upstream):
        raise RuntimeError(
            "linear_cross_entropy: is_grads_batched=True (or vectorize=True) asks for the "
            f"gradients of many upstream gradients at once; {_DENSE}, or ask one after another."
        )


def values_of(tensor: Tensor) -> Tensor:
    """The values below every transform, which has them in one tensor of more dimensions."""
    if torch.compiler.is_compiling():
        return tensor
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def _batched(tensor: Tensor) -> bool:
    functorch = torch._C._functorch
    return functorch.is_batchedtensor(tensor) or functorch.is_legacy_batchedtensor(tensor)
