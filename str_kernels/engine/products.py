"""Matrix products, each by the fastest library and dtype.

A CPU without bf16 instructions multiplies 16-bit operands dozens of times slower than fp32 ones, so
they are cast first, which is also more exact. On AMD's CPUs torch's fp32 product uses MKL, which
leaves AVX-512 unused; oneDNN uses it and is twice as fast.
"""

from __future__ import annotations

import torch
from torch import Tensor

from str_kernels.engine.cpu import multiplies_bf16, this_cpu

HALVES = (torch.bfloat16, torch.float16)


def product_dtype(operands: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype that operands are cast to, block by block, before they are multiplied."""
    if operands == torch.float16:
        return torch.float32  # a product in fp16 overflows at 65504
    if operands == torch.bfloat16 and not multiplies_bf16(device):
        return torch.float32
    return operands


def product(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """``left @ right``, both ``[·, ·]``; torch's own product, not oneDNN's, writes to ``out``."""
    on_cpu = left.dtype == torch.float32 and left.device.type == "cpu"
    if on_cpu and this_cpu().onednn_fp32:
        return torch.ops.mkldnn._linear_pointwise(left, right.T, None, "none", [], "")
    return torch.mm(left, right, out=out)


def products(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right``, both ``[B, ·, ·]``."""
    if len(left) == 1:
        return product(left[0], right[0])[None]
    return torch.bmm(left, right)


def integer_product(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """``left @ right.T`` of int8 ``[R, D]`` and ``[C, D]`` into int32 ``[R, C]``."""
    # torch 2.13's product is wrong for D = 1
    if left.shape[1] > 1 and left.device.type == "cpu" and this_cpu().int8:
        return torch._int_mm(left, right.T, out=out)
    # without int8 instructions fp32 is dozens of times faster, and exact up to 2^24
    return out.copy_(product(left.float(), right.float().T))


def dead_product(left: Tensor, right: Tensor, operands: torch.dtype) -> Tensor:
    """``left @ right`` for dead pairs; ``operands`` is the dtype of the hidden states.

    For 16-bit operands the product is bf16: its rounding is small beside the approximation, and
    fp32 would cost a GPU a tenth of the time of the whole loss.
    """
    if operands in HALVES and multiplies_bf16(left.device):
        return left.bfloat16() @ right.bfloat16()
    return product(left, right.to(left.dtype))
