"""Compile the kernels for any chip without a GPU, and read what the compiler made of them.

``cases`` lists the launch table's choices, and ``compile_case`` returns a kernel's registers,
spilled bytes, shared memory and matrix instruction. NVIDIA's chips are named by compute capability
(90).
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import JITFunction

from str_kernels.backends.triton.columns import columns_kernel
from str_kernels.backends.triton.combine import combine_kernel
from str_kernels.backends.triton.exact import expected_kernel, softmax_kernel
from str_kernels.backends.triton.finish import FINISH, finish_kernel
from str_kernels.backends.triton.gradient import TOKENS, gradient_kernel
from str_kernels.backends.triton.hot import hot_kernel
from str_kernels.backends.triton.launch import (
    ROWWISE,
    SCAN,
    SHARES,
    Launch,
    Stage,
    has_eight_bits,
    launch_for,
)
from str_kernels.backends.triton.logit_gradient import live_kernel, logit_gradient_kernel
from str_kernels.backends.triton.mend import guard_kernel, reset_kernel
from str_kernels.backends.triton.operands import GROUP
from str_kernels.backends.triton.penalty import PENALTY, penalty_kernel
from str_kernels.backends.triton.prepare import prepare_kernel
from str_kernels.backends.triton.quantise import quantise_kernel
from str_kernels.backends.triton.reduce import reduce_kernel
from str_kernels.backends.triton.refine import refine_kernel, spread_kernel, spread_launch
from str_kernels.backends.triton.route import THRESHOLD, plan_kernel, route_kernel, threshold_kernel
from str_kernels.backends.triton.scatter import scatter_kernel
from str_kernels.backends.triton.screen import screen_kernel
from str_kernels.backends.triton.shares import shares_kernel
from str_kernels.backends.triton.weight import weight_kernel
from str_kernels.quantise import ALIGNED, EIGHT_BITS, LEAST, TOP

ARCHS: tuple[int | str, ...] = (80, 86, 89, 90, 100, 103, 120, 121, "gfx90a", "gfx942")
# The shared memory that one program may use, in KiB.
SHARED_LIMIT: dict[int | str, int] = {
    80: 163,
    86: 99,
    89: 99,
    90: 227,
    100: 227,
    103: 227,
    120: 99,
    121: 99,
    "gfx90a": 64,
    "gfx942": 64,
}
_TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int8: "i8",
    torch.float8_e4m3fn: "fp8e4nv",
}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"  # NVIDIA's, in Triton
FLOATS = ("logit_scale", "log_eps", "temperature", "strength", "most", "z_loss", "divisor")
FLOATS += ("smoothing", "smoothing_share")
_MATRIX = r"\b(wgmma\.mma_async[\w.:]*|tcgen05\.mma[\w.:]*|mma\.sync[\w.:]*|v_mfma_\w+)"


class Case(NamedTuple):
    """A kernel and how it is specialised; ``off`` names the pointers that are None.

    With ``wide_weight`` W is in fp32, whatever the dtype of the other operands is.
    """

    name: str
    kernel: JITFunction
    dtype: torch.dtype
    launch: Launch
    constants: dict[str, Any]
    off: tuple[str, ...] = ()
    wide_weight: bool = False


class Compiled(NamedTuple):
    """What a compiler made of a case: registers of a thread, bytes, and matrix instructions."""

    case: Case
    arch: int | str
    registers: int
    spilled: int
    shared: int
    instructions: tuple[str, ...]
    assembly: str

    @property
    def fits(self) -> bool:
        """Whether nothing is spilled and shared memory is within the chip's limit."""
        return self.spilled == 0 and self.shared <= SHARED_LIMIT[self.arch] * 1024


def cases(
    arch: int | str,
    *,
    dim: int = 4096,
    precision: str = "ieee",
    full: bool = False,
    wide_weight: bool = False,
) -> Iterator[Case]:
    """List every kernel with the launch table's choice for bf16, fp32 and the 8-bit screens.

    ``precision`` is that of fp32 operands, and ``full`` adds bias, softcap and their outputs. With
    ``wide_weight`` only kernels that read W are listed, with bf16 operands and W in fp32, as under
    autocast.
    """
    constants = {"dim": dim, "precision": precision, "softcap": 30.0 if full else None}
    off = () if full else ("bias_ptr", "slope_ptr")
    if wide_weight:
        stages = _stages(_Choice(arch, torch.bfloat16, constants, off, wide_weight=True))
        yield from (case for case in stages if "weight_ptr" in case.kernel.arg_names)
        return
    for dtype in (torch.bfloat16, torch.float32):
        yield from _stages(_Choice(arch, dtype, constants, off))
    for dtype in EIGHT_BITS.values():
        if not has_eight_bits(arch, dtype):
            continue
        choice = _Choice(arch, dtype, constants, off)
        yield choice.case("screen", screen_kernel, "order_ptr", GROUP=GROUP)
    alone = Launch(0, 0, warps=4)
    sizes = {"dim": dim, **_blocks(ROWWISE)}
    scaling = {"width": -(-dim // ALIGNED) * ALIGNED, "top": TOP[torch.int8], "least": LEAST}
    for dtype in (torch.bfloat16, torch.float32):
        yield Case("quantise", quantise_kernel, dtype, ROWWISE, sizes | scaling)
        yield Case("reset", reset_kernel, dtype, ROWWISE, sizes)
        hot = {"softcap": constants["softcap"], **SCAN}
        yield Case("hot", hot_kernel, dtype, alone, hot, off)
        yield Case("combine", combine_kernel, dtype, ROWWISE, sizes, () if full else ("also_ptr",))
        kept = {"softcap": constants["softcap"], **_blocks(SHARES)}
        yield Case("shares", shares_kernel, dtype, SHARES, kept, off)
    penalty = {"softcap": constants["softcap"], **PENALTY}
    no_mass = ("log_rest_ptr", "ones_ptr")
    for name, KL, unread in (
        ("penalty mass", True, ()),
        ("penalty", True, (*no_mass, "lse_ptr", "lse_rest_ptr")),
        ("penalty", False, no_mass),
    ):
        yield Case(name, penalty_kernel, torch.float32, alone, {"KL": KL, **penalty}, unread)
    for name, kernel, blocks in (
        ("finish", finish_kernel, {"softcap": constants["softcap"], **FINISH}),
        ("threshold", threshold_kernel, {"AGAIN": False, **THRESHOLD}),
        ("route", route_kernel, {"AGAIN": False, **SCAN}),
        ("plan", plan_kernel, {"CHUNK": 64, **SCAN}),
        ("live", live_kernel, SCAN),
        ("threshold", threshold_kernel, {"AGAIN": True, **THRESHOLD}),
        ("route", route_kernel, {"AGAIN": True, **SCAN}),
        ("prepare", prepare_kernel, {"LSE": True, **SCAN}),
        ("guard", guard_kernel, THRESHOLD),
        ("scatter", scatter_kernel, {"BLOCK": 256}),
        ("reduce", reduce_kernel, {"MEAN": True, **SCAN}),
    ):
        yield Case(name, kernel, torch.float32, alone, blocks)


class _Choice(NamedTuple):
    """What the cases of one chip and one operand type have in common."""

    arch: int | str
    dtype: torch.dtype
    constants: dict[str, Any]
    off: tuple[str, ...]
    wide_weight: bool = False

    def case(self, stage: Stage, kernel: JITFunction, *off: str, **more: Any) -> Case:
        """Specialise a kernel to the launch table's choice for its stage."""
        launch = launch_for(self.arch, stage, self.dtype, wide_weight=self.wide_weight)
        name = kernel.__name__.removesuffix("_kernel").replace("_", " ")
        if more.get("ATOMIC") is False:
            name += " in order"
        constants, off = {**self.constants, **_blocks(launch), **more}, (*off, *self.off)
        return Case(name, kernel, self.dtype, launch, constants, off, self.wide_weight)


def _stages(choice: _Choice) -> Iterator[Case]:
    yield choice.case("columns", columns_kernel, ANCHORS=8, COLUMNS=64)
    yield choice.case("screen", screen_kernel, "hidden_scale_ptr", "weight_scale_ptr", GROUP=GROUP)
    kept = ("p_ptr", "scale_ptr")
    yield choice.case("refine", refine_kernel, *kept, ATOMIC=False)
    if choice.arch != "gfx90a":  # which never uses the atomics
        yield choice.case("refine", refine_kernel, *kept, ATOMIC=True)
        yield choice.case("refine", refine_kernel, "expected_ptr", ATOMIC=True)
        case = choice.case("refine", spread_kernel)
        launch = spread_launch(case.launch)
        yield case._replace(launch=launch, constants={**case.constants, **_blocks(launch)})
    yield choice.case("softmax", softmax_kernel, GROUP=GROUP)
    yield choice.case("gradient", logit_gradient_kernel, GROUP=GROUP)
    yield choice.case("expected", expected_kernel)
    yield choice.case("weight", weight_kernel)
    yield choice.case("backward", gradient_kernel, TOKENS=TOKENS)


def _blocks(launch: Launch) -> dict[str, int]:
    return {"BLOCK_R": launch.block_r, "BLOCK_D": launch.block_d, "BLOCK_E": launch.block_e}


def compile_case(case: Case, arch: int | str) -> Compiled:
    """Compile one case; every pointer is taken as a multiple of 16."""
    signature, constants, pointers = {}, {}, _pointer_types(case)
    for name in case.kernel.arg_names:
        if name in case.off:
            signature[name], constants[name] = "constexpr", None
        elif name.endswith("_ptr"):
            signature[name] = "*" + pointers.get(name, _TYPES[case.dtype])
        elif name in case.constants:
            signature[name], constants[name] = "constexpr", case.constants[name]
        else:
            signature[name] = "fp32" if name in FLOATS else "i32"
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(case.kernel.arg_names)
        if signature[name].startswith("*")
    }
    target = GPUTarget("cuda", arch, 32) if isinstance(arch, int) else GPUTarget("hip", arch, 64)
    made = triton.compile(
        ASTSource(case.kernel, signature, constants, aligned),
        target=target,
        options={"num_warps": case.launch.warps, "num_stages": case.launch.stages},
    )
    return _read(case, arch, made)


def _pointer_types(case: Case) -> dict[str, str]:
    """Read ``POINTERS`` beside the kernel; a pointer that is not named has the operands' type."""
    table = sys.modules[case.kernel.__module__].POINTERS
    types = {f"{name}_ptr": of for of, names in table.items() for name in names}
    return types | ({"weight_ptr": "fp32"} if case.wide_weight else {})


def _read(case: Case, arch: int | str, made: Any) -> Compiled:
    if isinstance(arch, int):
        assembly = made.asm["ptx"]
        registers, spilled = _resources(made.asm["cubin"])
    else:
        assembly = made.asm["amdgcn"]
        registers = _number(r"\.vgpr_count:\s+(\d+)", assembly)
        spilled = 4 * _number(r"\.vgpr_spill_count:\s+(\d+)", assembly)
    found = tuple(sorted(set(re.findall(_MATRIX, assembly))))
    return Compiled(case, arch, registers, spilled, made.metadata.shared, found, assembly)


def _resources(cubin: bytes) -> tuple[int, int]:
    """Read registers, and a thread's bytes of stack and local memory, with Triton's cuobjdump."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [TOOLS / "cuobjdump", "--dump-resource-usage", path]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    stack, local = (_number(rf"{what}:(\d+)", done.stdout) for what in ("STACK", "LOCAL"))
    return _number(r"REG:(\d+)", done.stdout), stack + local


def _number(pattern: str, text: str) -> int:
    return max(map(int, re.findall(pattern, text)))
