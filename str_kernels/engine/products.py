"""How a matrix product is made, and in which dtype.

A CPU without bf16 instructions multiplies 16-bit operands dozens of times slower than fp32 ones; a
block of them is cast first, and the product is the more exact for it. On AMD's CPUs MKL, by which
torch multiplies fp32, leaves AVX-512 unused and oneDNN does not: twice as fast.
"""

from __future__ import annotations

import torch
from torch import Tensor

from str_kernels.engine.cpu import multiplies_bf16, this_cpu

HALVES = (torch.bfloat16, torch.float16)


def product_dtype(operands: torch.dtype, device: torch.device) -> torch.dtype:
    """What operands of this dtype are cast to, block by block, before they are multiplied."""
    if operands == torch.float16:
        return torch.float32  # a product in fp16 overflows at 65504
    if operands == torch.bfloat16 and not multiplies_bf16(device):
        return torch.float32
    return operands


def product(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """``left @ right``, both ``[·, ·]``; ``right`` may be a transposed view.

    ``out`` is where the result may be put: only torch's own product can.
    """
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
    # torch 2.13's product of rows of one number is wrong
    if left.shape[1] > 1 and left.device.type == "cpu" and this_cpu().int8:
        return torch._int_mm(left, right.T, out=out)
    # without such instructions fp32 is dozens of times faster, and as exact up to 2^24
    return out.copy_(product(left.float(), right.float().T))


def dead_product(left: Tensor, right: Tensor, operands: torch.dtype) -> Tensor:
    """``left @ right`` of what stands for dead pairs, in the dtype that it is made in.

    For 16-bit operands the product is made in bf16: its rounding is small beside the approximation,
    and an fp32 product of this size would cost a GPU a tenth of the whole loss.
    """
    if operands in HALVES and multiplies_bf16(left.device):
        return left.bfloat16() @ right.bfloat16()
    return product(left, right.to(left.dtype))
