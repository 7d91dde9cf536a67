"""In which dtype a matrix product of torch's is made: the one place that knows the CPU.

A CPU without bf16 instructions multiplies 16-bit operands dozens of times slower than fp32 ones; a
block of them is cast first, and the product is the more exact for it.
"""

from __future__ import annotations

import platform

import torch
from torch import Tensor

HALVES = (torch.bfloat16, torch.float16)


def multiplies_bf16(device: torch.device) -> bool:
    """Whether torch multiplies bf16 on this device faster than fp32."""
    if device.type != "cpu":
        return True
    # torch for macOS is built without mkldnn, and then without that operator
    if not torch.backends.mkldnn.is_available():
        return False
    # oneDNN's own answer is yes wherever it can emulate them, which is slower than fp32
    has_instructions = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    if platform.machine().lower() in ("x86_64", "amd64") and has_instructions is not None:
        return has_instructions()
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def product_dtype(operands: torch.dtype, device: torch.device) -> torch.dtype:
    """What operands of this dtype are cast to, block by block, before they are multiplied."""
    if operands == torch.float16:
        return torch.float32  # a product in fp16 overflows at 65504
    if operands == torch.bfloat16 and not multiplies_bf16(device):
        return torch.float32
    return operands


def dead_product(left: Tensor, right: Tensor, operands: torch.dtype) -> Tensor:
    """``left @ right`` of what stands for dead pairs, in the dtype of ``left``.

    For 16-bit operands the product is made in bf16: its rounding is small beside the approximation,
    and an fp32 product of this size would cost a GPU a tenth of the whole loss.
    """
    if operands in HALVES and multiplies_bf16(left.device):
        return (left.bfloat16() @ right.bfloat16()).to(left.dtype)
    return left @ right.to(left.dtype)
