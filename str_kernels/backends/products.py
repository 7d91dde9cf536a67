"""How a matrix product is made, and in which dtype: the one place that knows the CPU.

A CPU without bf16 instructions multiplies 16-bit operands dozens of times slower than fp32 ones; a
block of them is cast first, and the product is the more exact for it. On AMD's CPUs MKL, by which
torch multiplies fp32, leaves AVX-512 unused and oneDNN does not: twice as fast.
"""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

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


def product(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """``left @ right``, both ``[·, ·]``; ``right`` may be a transposed view.

    ``out`` is where the result may be put: only torch's own product can.
    """
    on_cpu = left.dtype == torch.float32 and left.device.type == "cpu"
    if on_cpu and torch.backends.mkldnn.is_available() and _mkl_is_held_back():
        return torch.ops.mkldnn._linear_pointwise(left, right.T, None, "none", [], "")
    return torch.mm(left, right, out=out)


def products(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right``, both ``[B, ·, ·]``."""
    if len(left) == 1:
        return product(left[0], right[0])[None]
    return torch.bmm(left, right)


@cache
def _mkl_is_held_back() -> bool:
    """Whether this is an AMD CPU with AVX-512, and torch can multiply by oneDNN instead."""
    held_back = "AVX512" in torch.backends.cpu.get_cpu_capability() and "AMD" in _vendor()
    return held_back and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _vendor() -> str:
    """Of the CPU: what the kernel of Linux or Windows calls it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith("vendor_id")), "")


def multiplies_int8(device: torch.device) -> bool:
    """Whether torch multiplies int8 on this CPU several times faster than fp32."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    has_instructions = getattr(torch.cpu, "_is_vnni_supported", None)
    return has_instructions is not None and has_instructions()


def multiplies_tiles() -> bool:
    """Whether this CPU has AMX, with which bf16 was as fast as int8."""
    has_instructions = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return has_instructions is not None and has_instructions()


def integer_product(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """``left @ right.T`` of int8 ``[R, D]`` and ``[C, D]`` into int32 ``[R, C]``."""
    # of rows of one number torch 2.13's product is wrong
    if left.shape[1] > 1 and multiplies_int8(left.device):
        return torch._int_mm(left, right.T, out=out)
    # without such instructions dozens of times faster, and as exact up to 2^24
    return out.copy_(product(left.float(), right.float().T))


def dead_product(left: Tensor, right: Tensor, operands: torch.dtype) -> Tensor:
    """``left @ right`` of what stands for dead pairs, in the dtype that it is made in.

    For 16-bit operands the product is made in bf16: its rounding is small beside the approximation,
    and an fp32 product of this size would cost a GPU a tenth of the whole loss.
    """
    if operands in HALVES and multiplies_bf16(left.device):
        return left.bfloat16() @ right.bfloat16()
    return product(left, right.to(left.dtype))
