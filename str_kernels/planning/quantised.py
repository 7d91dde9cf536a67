"""Linear layers in 4 and 8 bits on meta tensors: what they store, and what a call of them takes.

Stage: ``nn.Linear`` of the body → the same product from packed bytes, whose weight stands whole
only while the product is computed, in the forward and again in the backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_BLOCK = 64  # weights that share a scale, in bitsandbytes' default
_SCALES = 256  # such scales that share a scale of their own
FORMATS = ("nf4", "int8")


def quantise_body(model: nn.Module, head: nn.Module, form: str) -> None:
    """Replace every linear layer but the head and the adapters' own, as bitsandbytes does."""
    for parent in model.modules():
        for name, child in parent.named_children():
            frozen = isinstance(child, nn.Linear) and not child.weight.requires_grad
            if frozen and child is not head:
                setattr(parent, name, _Packed(child, form))


class _Packed(nn.Module):
    """A linear layer whose weight is ``form``."""

    def __init__(self, linear: nn.Linear, form: str) -> None:
        super().__init__()
        count = linear.weight.numel()
        self.shape, self.dtype, self.form = linear.weight.shape, linear.weight.dtype, form
        self.in_features, self.out_features = linear.in_features, linear.out_features
        if form == "nf4":
            packed, blocks = -(-count // 2), -(-count // _BLOCK)
            scales = blocks + 4 * -(-blocks // _SCALES)
        else:
            packed, scales = count, 4 * linear.out_features
        for key, size in (("packed", packed), ("scales", scales)):
            self.register_buffer(key, torch.empty(size, dtype=torch.uint8, device="meta"))
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """``x Wᵀ + b``."""
        return _Product.apply(x, self.packed, self.bias, self)


class _Product(torch.autograd.Function):
    """The product; nothing but the packed weight is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, bias: Tensor | None, of: _Packed) -> Tensor:
        ctx.of = of
        ctx.save_for_backward(packed)
        if of.form == "int8":  # the activations are quantised too, and the sums are int32
            rows = torch.empty_like(x, dtype=torch.int8)
            weight = packed.view(torch.int8).view(of.shape)
            sums = torch._int_mm(rows.flatten(0, -2), weight.t())
            made = sums.to(x.dtype).view(*x.shape[:-1], of.out_features)
            del rows, sums
            return made if bias is None else made.add_(bias)
        return nn.functional.linear(x, _whole(packed, of), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple:
        (packed,) = ctx.saved_tensors
        return gradient @ _whole(packed, ctx.of), None, None, None


def _whole(packed: Tensor, of: _Packed) -> Tensor:
    return packed.new_empty(of.shape, dtype=of.dtype)
