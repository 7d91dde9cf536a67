"""A table of tile sizes, warps and stages by chip family, with the reason of each entry.

Only the entries of sm_90 were timed. All entries compile without spilled registers for D = 4,096
with rows gathered through the order, fit the chip's shared memory and use its matrix instruction,
which ``ahead.py`` checks. Of the sizes that do, the largest tile with the deepest pipeline was
taken, since a larger tile reads less from L2 for each operation. A tile has 128 vocabulary rows.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch

from str_kernels.options import TILE

Exact = Literal["auto", "blas", "triton"]
EXACT: tuple[Exact, ...] = get_args(Exact)
Stage = Literal[
    "columns", "screen", "softmax", "refine", "expected", "gradient", "weight", "backward"
]
Kind = Literal["half", "byte", "single"]


class Launch(NamedTuple):
    """The sizes of a kernel: rows of H, depth of a step, and columns of D in a result (0: none)."""

    block_r: int
    block_d: int
    block_e: int = 0
    warps: int = 8
    stages: int = 2


# Kernels that pass over rows of D and multiply nothing use these sizes.
ROWWISE = Launch(4, 1024, warps=4)
# Kernels that pass over a tile's rows, or over the tiles, in one dimension use this size.
SCAN = {"BLOCK": 1024}

# The exact pass by BLAS gives each warp a row of logits, 16 bytes a thread. Programs of more rows
# spill 8 bytes on one chip or another: 4 on 12.0, 2 in fp32 on 9.0 with Triton 3.6.
SHARES = Launch(1, 128, warps=1)


class Product(NamedTuple):
    """The logits that BLAS computes at once."""

    rows: int
    words: int


# 35 MB of fp32, which stay in the L2 of sm_90 and later chips; 264 tiles of 128 x 256, two for each
# multiprocessor of an H100. Fewer rows take as many more words.
PRODUCT = Product(2048, 33 * TILE)

# A filter pays from so many positions on. This was derived, and no GPU has confirmed it: in units
# of one product, the exact pass by BLAS costs 2.07; the filter costs 1.15 for its 16-bit screen,
# 0.09 for the rest, and 2.3 · (128 / N + 0.05) for its refinement, where a tile's 5 % of the rows
# are padded to 128. The two meet at 410 rows; both read W twice, in some 140 launches. An int8
# screen repays quantising an fp32 W from 256 rows on, where it was measured; so does a filter
# beside the exact pass by Triton, at 3.1 units.
FEWEST_FILTERED: dict[Kind, int] = {"half": 512, "single": 256}
FEWEST_WITHOUT_BLAS = 256

# These fit wherever a chip has 64 KiB of shared memory, with two stages everywhere.
DEFAULT: dict[tuple[Stage, Kind], Launch] = {
    # this reads H once and multiply little: few rows make programs enough for every chip
    ("columns", "half"): Launch(32, 64, warps=4),
    ("columns", "single"): Launch(32, 32, warps=4),
    ("screen", "half"): Launch(128, 64),
    ("screen", "byte"): Launch(128, 128),
    # fp32 without a matrix unit is summed in registers, which a larger tile would spill
    ("screen", "single"): Launch(64, 32),
    ("softmax", "half"): Launch(128, 64),
    ("softmax", "single"): Launch(32, 32, warps=4),
    # the logits' gradient, which recomputes them
    ("gradient", "half"): Launch(128, 64),
    ("gradient", "single"): Launch(32, 32, warps=4),
    ("refine", "half"): Launch(64, 64, 64),
    ("refine", "single"): Launch(32, 32, 32),
    # this kernel has two sums in registers, so its tile is half as wide as a plain product's
    ("expected", "half"): Launch(128, 0, 64),
    ("expected", "single"): Launch(32, 0, 64),
    ("weight", "half"): Launch(64, 0, 128),
    ("weight", "single"): Launch(32, 0, 64),
    ("backward", "half"): Launch(32, 0, 64, warps=4),
    ("backward", "single"): Launch(32, 0, 64),  # four warps spill on sm_80
}

_THREE_STAGES: dict[tuple[Stage, Kind], Launch] = {
    ("screen", "half"): Launch(128, 64, stages=3),
    ("screen", "byte"): Launch(128, 128, stages=3),
    ("softmax", "half"): Launch(128, 64, stages=3),
    ("gradient", "half"): Launch(128, 64, stages=3),
}

# AMD multiplies fp32 in its matrix units, whose instructions are 32 rows high. Eight warps would
# compute 32 rows eight times, and spill.
_MATRIX_FP32: dict[tuple[Stage, Kind], Launch] = {
    ("softmax", "single"): Launch(64, 32),
    ("gradient", "single"): Launch(64, 32),
    ("refine", "single"): Launch(64, 32, 32),
    ("expected", "single"): Launch(64, 0, 64),
}

# A refinement of 128 rows spills on sm_80 and sm_100; a third stage does not fit in the 99 KiB of
# the other sm_8x.
TABLE: dict[str, dict[tuple[Stage, Kind], Launch]] = {
    "sm_80": {**_THREE_STAGES, ("refine", "half"): Launch(64, 64, 128, stages=3)},
    "sm_86": {**_THREE_STAGES, ("refine", "half"): Launch(64, 64, 128, stages=2)},
    # these were the fastest of a dozen each on an H200, at D = 4,096
    "sm_90": {
        **_THREE_STAGES,
        ("screen", "half"): Launch(256, 64, stages=3),
        ("refine", "half"): Launch(128, 64, 128, stages=3),
        ("expected", "half"): Launch(128, 0, 128, stages=3),
    },
    "sm_100": {
        **_THREE_STAGES,
        # 128 rows spill with a softcap and its buffers
        ("softmax", "half"): Launch(64, 64, stages=3),
        ("gradient", "half"): Launch(64, 64, warps=4, stages=3),
        ("refine", "half"): Launch(64, 64, 128, stages=3),
        ("expected", "half"): Launch(128, 0, 128),
    },
    "sm_120": {**_THREE_STAGES, ("refine", "half"): Launch(64, 64, 128, stages=3)},
    "gfx942": _MATRIX_FP32,
    # atomics are compare-and-swap loops there; without them 128 rows fit
    "gfx90a": {**_MATRIX_FP32, ("refine", "half"): Launch(128, 64, 64)},
}

_AMD_WITH_FP8 = ("gfx950", "gfx1200", "gfx1201")  # gfx942 has another kind of e4m3
_FAMILY = {80: "sm_80", 86: "sm_86", 89: "sm_86", 90: "sm_90", 100: "sm_100", 103: "sm_100"}
_FAMILY |= {120: "sm_120", 121: "sm_120"}


def family(arch: int | str) -> str:
    """Return the table's row for a compute capability (90) or a gfx name; "" if it has none."""
    return _FAMILY.get(arch, "") if isinstance(arch, int) else arch if arch in TABLE else ""


def arch_of(device: torch.device) -> int | str:
    """Return NVIDIA's compute capability, AMD's gfx name, or 0 for the interpreter."""
    if device.type != "cuda":
        return 0
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def has_eight_bits(arch: int | str, dtype: torch.dtype) -> bool:
    """Whether the chip's matrix unit multiplies int8 or fp8 (e4m3); the interpreter does both."""
    if dtype == torch.int8:
        return arch != 103  # whose tcgen05 has no int8; the older instruction is slower than bf16
    if isinstance(arch, int):
        return arch == 0 or arch >= 89
    return arch in _AMD_WITH_FP8


def kind_of(dtype: torch.dtype) -> Kind:
    """Return the column of the table for operands of this dtype."""
    if dtype == torch.float32:
        return "single"
    return "byte" if dtype.itemsize == 1 else "half"


_TOO_LARGE: set[tuple[int | str, Stage]] = set()


def take_default(arch: int | str, stages: tuple[Stage, ...]) -> bool:
    """Use the default for these stages on this chip from now on; whether that changes anything."""
    found = {(arch, stage) for stage in stages} - _TOO_LARGE
    _TOO_LARGE.update(found)
    return bool(found)


def launch_for(
    arch: int | str, stage: Stage, dtype: torch.dtype, *, wide_weight: bool = False
) -> Launch:
    """Return the table's choice, or the default where the chip has none of its own.

    With ``wide_weight`` W is wider than the operands (fp32 under autocast), and so are its tiles in
    shared memory. The table's sizes might not fit there, and the default is taken; so it is where a
    launch of this stage has failed.
    """
    key = (stage, kind_of(dtype))
    if wide_weight or (arch, stage) in _TOO_LARGE:
        return DEFAULT[key]
    return TABLE.get(family(arch), {}).get(key, DEFAULT[key])
