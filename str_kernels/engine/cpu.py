"""Which matrix products this CPU computes fast: `this_cpu`.

The answers respect ``ONEDNN_MAX_CPU_ISA``, which limits the instructions that oneDNN uses.
"""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

# Instruction sets as oneDNN names and orders them; each one includes those before it.
_LEVELS = [
    "SSE41",
    "AVX",
    "AVX2",
    "AVX2_VNNI",
    "AVX2_VNNI_2",
    "AVX512_CORE",
    "AVX512_CORE_VNNI",
    "AVX512_CORE_BF16",
    "AVX512_CORE_FP16",
    "AVX512_CORE_AMX",
    "AVX512_CORE_AMX_FP16",
]


@dataclass(frozen=True)
class Cpu:
    """Which matrix products are fast here, compared with torch's own product in fp32.

    Attributes:
        bf16: products of bf16 operands are faster.
        int8: products of int8 operands are several times faster; without such instructions
            oneDNN's product may saturate, and then it is wrong.
        amx: bf16 products run on AMX tiles, where they are as fast as int8 ones.
        onednn_fp32: oneDNN multiplies fp32 faster than MKL, torch's default.
        known: which screen is fastest with these was measured before; else it is measured here.
    """

    bf16: bool = False
    int8: bool = False
    amx: bool = False
    onednn_fp32: bool = False
    known: bool = True


def this_cpu() -> Cpu:
    """Return the properties of the CPU that this process runs on."""
    return _ask()


@cache
def _ask() -> Cpu:
    # torch for macOS is built without oneDNN, and so without its operators
    if not torch.backends.mkldnn.is_available():
        return Cpu()
    amx = _supported("_is_amx_tile_supported") and _allowed("AVX512_CORE_AMX")
    return Cpu(
        bf16=_has_bf16() and _allowed("AVX512_CORE_BF16"),
        int8=_supported("_is_vnni_supported") and _allowed("AVX512_CORE_VNNI"),
        amx=amx,
        onednn_fp32=_mkl_is_held_back() and _allowed("AVX512_CORE"),
        known=_on_x86() and not amx,  # int8 on AMX, and other kinds of CPU, were never measured
    )


def multiplies_bf16(device: torch.device) -> bool:
    """Whether torch multiplies bf16 on this device faster than fp32."""
    return device.type != "cpu" or this_cpu().bf16


def processor_field(name: str) -> str | None:
    """Read the field ``name`` of the first processor in ``/proc/cpuinfo``; None without it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    values = (line.split(":", 1)[1].strip() for line in lines if line.startswith(name))
    return next(values, None)


def _supported(question: str) -> bool:
    """Call a function of `torch.cpu` that older versions of torch do not have."""
    ask = getattr(torch.cpu, question, None)
    return ask is not None and ask()


def _on_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")


def _has_bf16() -> bool:
    # oneDNN's own answer is yes even where it only emulates the instructions, slower than fp32
    if _on_x86() and hasattr(torch.cpu, "_is_avx512_bf16_supported"):
        return torch.cpu._is_avx512_bf16_supported()
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _allowed(level: str) -> bool:
    """Whether the environment lets oneDNN use this instruction set."""
    most = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper()
    return most not in _LEVELS or _LEVELS.index(level) <= _LEVELS.index(most)


def _mkl_is_held_back() -> bool:
    """Whether MKL leaves AVX-512 unused, as on AMD's CPUs, and oneDNN can replace it."""
    vendor = processor_field("vendor_id") or platform.processor()
    wide = "AVX512" in torch.backends.cpu.get_cpu_capability()
    return wide and "AMD" in vendor and hasattr(torch.ops.mkldnn, "_linear_pointwise")
