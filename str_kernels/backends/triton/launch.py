"""Tile sizes, warps and stages by chip family: a small table, and why each entry is what it is.

Only sm_90's were timed. The entries compile without spilled registers for D = 4,096 with rows
gathered through the order, fit the chip's shared memory and use its matrix instruction (checked by
``ahead.py``); among those the largest tile with the deepest pipeline was taken, since a larger tile
reads less from L2 for each operation. Every tile is 128 vocabulary rows wide.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

Stage = Literal["screen", "softmax", "refine", "expected", "weight"]
Kind = Literal["half", "byte", "single"]


class Launch(NamedTuple):
    """One kernel's sizes: rows of H, depth of a step, columns of D in a result (0: none)."""

    block_r: int
    block_d: int
    block_e: int = 0
    warps: int = 8
    stages: int = 2


# For kernels that pass over rows of D and multiply nothing.
ROWWISE = Launch(4, 1024, warps=4)
# For kernels that pass over a tile's rows, or over the tiles, in one dimension.
SCAN = {"BLOCK": 1024}

# Safe wherever a chip has 64 KiB of shared memory: two stages everywhere.
DEFAULT: dict[tuple[Stage, Kind], Launch] = {
    ("screen", "half"): Launch(128, 64),
    ("screen", "byte"): Launch(128, 128),
    # fp32 without a matrix unit lives in registers: a smaller tile spills none
    ("screen", "single"): Launch(64, 32),
    ("softmax", "half"): Launch(128, 64),
    ("softmax", "single"): Launch(32, 32, warps=4),
    ("refine", "half"): Launch(64, 64, 64),
    ("refine", "single"): Launch(32, 32, 32),
    # two sums in registers: half as wide as a plain product
    ("expected", "half"): Launch(128, 0, 64),
    ("expected", "single"): Launch(32, 0, 64),
    ("weight", "half"): Launch(64, 0, 128),
    ("weight", "single"): Launch(32, 0, 64),
}

_THREE_STAGES: dict[tuple[Stage, Kind], Launch] = {
    ("screen", "half"): Launch(128, 64, stages=3),
    ("screen", "byte"): Launch(128, 128, stages=3),
    ("softmax", "half"): Launch(128, 64, stages=3),
}

# AMD multiplies fp32 in its matrix units, whose instructions are 32 rows high: 32 rows for eight
# warps would be computed eight times, and spill.
_MATRIX_FP32: dict[tuple[Stage, Kind], Launch] = {
    ("softmax", "single"): Launch(64, 32),
    ("refine", "single"): Launch(64, 32, 32),
    ("expected", "single"): Launch(64, 0, 64),
}

# 128 rows refined spill on sm_80 and sm_100; on sm_8x with 99 KiB a third stage does not fit.
TABLE: dict[str, dict[tuple[Stage, Kind], Launch]] = {
    "sm_80": {**_THREE_STAGES, ("refine", "half"): Launch(64, 64, 128, stages=3)},
    "sm_86": {**_THREE_STAGES, ("refine", "half"): Launch(64, 64, 128, stages=2)},
    # the fastest of a dozen each on an H200, at D = 4,096
    "sm_90": {
        **_THREE_STAGES,
        ("screen", "half"): Launch(256, 64, stages=3),
        ("refine", "half"): Launch(128, 64, 128, stages=3),
        ("expected", "half"): Launch(128, 0, 128, stages=3),
    },
    "sm_100": {
        **_THREE_STAGES,
        # with a softcap and its buffers 128 rows spill
        ("softmax", "half"): Launch(64, 64, stages=3),
        ("refine", "half"): Launch(64, 64, 128, stages=3),
        ("expected", "half"): Launch(128, 0, 128),
    },
    "sm_120": {**_THREE_STAGES, ("refine", "half"): Launch(64, 64, 128, stages=3)},
    "gfx942": _MATRIX_FP32,
    # without atomics (they are compare-and-swap loops there) 128 rows fit
    "gfx90a": {**_MATRIX_FP32, ("refine", "half"): Launch(128, 64, 64)},
}

_FAMILY = {80: "sm_80", 86: "sm_86", 89: "sm_86", 90: "sm_90", 100: "sm_100", 103: "sm_100"}
_FAMILY |= {120: "sm_120", 121: "sm_120"}


def family(arch: int | str) -> str:
    """The table's row for a compute capability (90) or a gfx name; "" if it has none."""
    return _FAMILY.get(arch, "") if isinstance(arch, int) else arch if arch in TABLE else ""


def arch_of(device: torch.device) -> int | str:
    """Compute capability of an NVIDIA device, gfx name of an AMD one, 0 for the interpreter."""
    if device.type != "cuda":
        return 0
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def kind_of(dtype: torch.dtype) -> Kind:
    """Which column of the table serves operands of this dtype."""
    if dtype == torch.float32:
        return "single"
    return "byte" if dtype.itemsize == 1 else "half"


def launch_for(
    arch: int | str, stage: Stage, dtype: torch.dtype, *, wide_weight: bool = False
) -> Launch:
    """The table's choice, or the default where the chip has none of its own.

    ``wide_weight``: W's numbers are wider than the operands' (fp32 under autocast), and so are its
    tiles in shared memory, in which the table's sizes would not fit: the default.
    """
    key = (stage, kind_of(dtype))
    if wide_weight:
        return DEFAULT[key]
    return TABLE.get(family(arch), {}).get(key, DEFAULT[key])
