"""Attention on meta tensors by the kernel that would run on a device.

Stage: the arguments of ``scaled_dot_product_attention`` → the call of the kernel that torch would
choose, with what it keeps for the backward. Torch itself would choose its unfused formula for meta
tensors, which stores a matrix of N² that no fused kernel stores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F

_FLASH_WIDTH = 256  # widest head of the flash kernel
_ALIGNED = 16  # to so many columns the efficient kernel's mask is padded
_HALF = (torch.float16, torch.bfloat16)


@contextmanager
def attention_of(device: str, scratch: Callable[[int], None]) -> Iterator[None]:
    """In this block attention on meta tensors is that of ``device``, "cpu" or "cuda".

    ``scratch`` is told the bytes that a kernel takes for itself.
    """
    kernel, before = {"cpu": _on_cpu, "cuda": _on_cuda}[device], F.scaled_dot_product_attention

    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        operands = query, key, value
        if query.shape[-1] != value.shape[-1] or dropout_p or query.dim() != 4:
            return torch.ops.aten._scaled_dot_product_attention_math(
                *operands, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )[0]
        return kernel(operands, attn_mask, is_causal, scale, scratch)

    F.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = before


def _on_cpu(
    operands: tuple[Tensor, ...],
    mask: Tensor | None,
    causal: bool,
    scale: float | None,
    scratch: Callable[[int], None],
) -> Tensor:
    forward, backward = _scratch_on_cpu(*operands[:2])
    out = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *operands, 0.0, causal, attn_mask=_added(mask, operands[0].dtype), scale=scale
    )[0]
    scratch(forward)
    return _Noting.apply(out, backward + sum(map(_bytes, operands)), scratch)


def _scratch_on_cpu(query: Tensor, key: Tensor) -> tuple[int, int]:
    """Bytes of a forward and of a backward: a block of scores for each thread, the output's too."""
    rows = query.shape[2]
    block = min(rows, 256 if rows >= 768 else 64 if rows >= 192 else 32)
    scores, rounded = block * min(key.shape[2], 512), 2 * (query.dtype in _HALF)
    forward = (4 + rounded) * scores + 4 * block * (2 + query.shape[3])
    backward = 2 * (4 + rounded) * scores + 4 * block
    return forward * torch.get_num_threads(), backward * torch.get_num_threads()


def _on_cuda(
    operands: tuple[Tensor, ...],
    mask: Tensor | None,
    causal: bool,
    scale: float | None,
    scratch: Callable[[int], None],
) -> Tensor:
    query, key, _ = operands
    width = query.shape[-1]
    if mask is None and query.dtype in _HALF and width <= _FLASH_WIDTH:
        padded = tuple(F.pad(x, (0, -width % 8)) if width % 8 else x for x in operands)
        scale = width**-0.5 if scale is None else scale
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        out = flash(*padded, 0.0, causal, scale=scale)[0]
        # the backward sums queries' gradients in fp32, and those of shared keys a head at a time
        shared = 2 * _bytes(query) if key.shape[1] < query.shape[1] else 0
        made = sum(map(_bytes, operands))
        return _Noting.apply(out[..., :width], 4 * query.numel() + shared + made, scratch)
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        operands = (query, *(x.repeat_interleave(groups, 1) for x in operands[1:]))
    bias = _added(mask, query.dtype)
    if bias is not None:
        short = -bias.shape[-1] % _ALIGNED
        bias = F.pad(bias, (0, short))[..., : bias.shape[-1]] if short else bias
        bias = bias.expand(query.shape[0], query.shape[1], -1, -1)
    out = torch.ops.aten._scaled_dot_product_efficient_attention(
        *operands, bias, True, 0.0, causal, scale=scale
    )[0]
    # the backward sums all three gradients in fp32
    return _Noting.apply(out, 12 * query.numel() + sum(map(_bytes, operands)), scratch)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _added(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A mask of booleans as what is added to the scores; torch makes it in every call."""
    if mask is None or mask.dtype is not torch.bool:
        return mask
    zero = torch.zeros((), dtype=dtype, device=mask.device)
    return torch.where(mask, zero, torch.full_like(zero, -torch.inf))


class _Noting(torch.autograd.Function):
    """The identity; its backward notes the scratch of the kernel whose backward comes next."""

    @staticmethod
    def forward(ctx, out: Tensor, size: int, scratch: Callable[[int], None]) -> Tensor:
        ctx.size, ctx.scratch = size, scratch
        return out.view_as(out)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple:
        ctx.scratch(ctx.size)
        return gradient, None, None
