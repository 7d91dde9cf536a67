"""Which torch functions deferred logits treat specially: losses, metadata, hooks and writes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LOSSES = {F.cross_entropy, F.nll_loss}
_LOSS_ARGUMENTS = (
    *("input", "target", "weight", "size_average", "ignore_index", "reduce", "reduction"),
    "label_smoothing",
)

# functions that ask for a gradient of the logits, which a fused loss does not have
GRADIENT_WATCHERS = {Tensor.register_hook, Tensor.retain_grad, torch.autograd.grad}

_FRAMEWORKS = ("torch.distributed.", "deepspeed.")
_ATTRIBUTES = (
    *("shape", "dtype", "device", "layout", "ndim", "requires_grad", "is_leaf", "grad_fn"),
    *("is_cuda", "is_cpu", "is_meta", "is_mps", "is_xpu", "is_sparse", "is_quantized", "is_nested"),
    *("names", "output_nr", "_version", "_base", "_backward_hooks", "itemsize", "nbytes"),
)
# functions that the wrapper answers itself, without any values
METADATA = {
    *(getattr(Tensor, name).__get__ for name in _ATTRIBUTES if hasattr(Tensor, name)),
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.nelement, Tensor.stride, Tensor.__len__),
    *(Tensor.is_floating_point, Tensor.is_complex, Tensor.is_contiguous, Tensor.element_size),
    *(Tensor.get_device, Tensor.is_inference, Tensor.storage_offset, Tensor._is_view),
    *(torch.is_floating_point, torch.is_complex, torch.numel, torch.is_tensor),
}


def loss_arguments(args: tuple, kwargs: dict) -> dict[str, Any]:
    """The arguments of one of ``LOSSES`` by name."""
    return {**dict(zip(_LOSS_ARGUMENTS, args, strict=False)), **kwargs}


def name_of(function: Callable) -> str:
    """What to call a torch function to a user: an attribute by its own name."""
    name = getattr(function, "__name__", repr(function))
    return function.__self__.__name__ if name == "__get__" else name


def writes(function: Callable, kwargs: dict) -> bool:
    """Whether the function changes one of its arguments."""
    name = getattr(function, "__name__", "")
    if name in ("__setitem__", "__set__") or kwargs.get("out") is not None:
        return True
    if name.startswith("__"):
        return name.startswith("__i") and name not in ("__invert__", "__index__", "__int__")
    return name.endswith("_")


def is_framework_hook(function: Callable, args: tuple) -> bool:
    """Whether FSDP or DeepSpeed hooks an output to learn when backward begins."""
    if function is not Tensor.register_hook or len(args) < 2:
        return False
    hook = args[1]
    while isinstance(hook, functools.partial):
        hook = hook.func
    return (getattr(hook, "__module__", None) or "").startswith(_FRAMEWORKS)
