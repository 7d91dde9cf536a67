"""`str-kernels doctor --kernels`: compile the kernels without a GPU, and report what they use."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from str_kernels.cli.console import counting, say

SCHEMA = "str_kernels.kernels/1"
WITHOUT_GPU = 90  # the chip to compile for where no GPU is found
COLUMNS = ["kernel", "type", "sizes", "regs", "KiB", "spills", "instruction"]
_TYPES = {"bfloat16": "bf16", "float32": "fp32", "float8_e4m3fn": "fp8"}


def compile_table(archs: list[str]) -> dict[str, Any]:
    """Compile the kernels of the launch table for these chips.

    Args:
        archs: names of chips; none: the GPU here, or sm_90 without one.

    Raises:
        ValueError: triton or its compiler is missing, or a chip is not in the table.
    """
    _check_triton()
    from str_kernels.backends.triton import ahead

    chips = [_chip(name) for name in archs] or [_present()]
    for chip in chips:
        if chip not in ahead.ARCHS:
            known = ", ".join(map(str, ahead.ARCHS))
            raise ValueError(f"arch={chip!r}: is not in the launch table; choose one of {known}.")
    _check_tools(chips, ahead.TOOLS)
    rows = []
    for chip in chips:
        cases = list(ahead.cases(chip))
        with counting(f"compiling for {_name(chip)}", len(cases)) as advance:
            for case in cases:
                rows.append(_row(ahead.compile_case(case, chip)))
                advance()
    return {"schema": SCHEMA, "triton": importlib.import_module("triton").__version__, "rows": rows}


def tables(found: dict[str, Any]) -> Iterator[tuple[str, list[list[str]]]]:
    """Yield each chip with a row for each of its kernels, in the order of ``COLUMNS``."""
    for chip in dict.fromkeys(row["chip"] for row in found["rows"]):
        yield chip, [_line(row) for row in found["rows"] if row["chip"] == chip]


def _line(row: dict[str, Any]) -> list[str]:
    sizes = "×".join(str(size) for size in row["tile"])
    return [
        row["kernel"],
        _TYPES.get(row["operands"], row["operands"]),
        f"{sizes} w{row['warps']} s{row['stages']}",
        str(row["registers"]),
        f"{row['shared_bytes'] / 1024:.0f}",
        str(row["spilled_bytes"]) if row["fits"] else f"{row['spilled_bytes']}: DOES NOT FIT",
        ", ".join(map(_short, row["instructions"])) or "none",
    ]


def _short(instruction: str) -> str:
    """Shorten the name of an instruction, as in ``wgmma m64n128k16``; the JSON has it whole."""
    shape = re.search(r"m\d+n\d+k\d+|\d+x\d+x\d+", instruction)
    name = re.match(r"wgmma|tcgen05\.mma|mma|v_mfma", instruction)
    parts = [found.group() for found in (name, shape) if found]
    return " ".join(parts) or instruction


def _check_triton() -> None:
    if importlib.util.find_spec("triton") is None:
        raise ValueError("--kernels: triton is not installed; pip install triton (Linux only).")
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise ValueError("TRITON_INTERPRET='1': kernels are interpreted, not compiled; unset it.")


def _check_tools(chips: list[int | str], folder: Path) -> None:
    """Say what to install; Triton's own error names only paths."""
    if not any(isinstance(chip, int) for chip in chips):
        return  # Triton contains AMD's assembler and linker
    missing = [name for name in ("ptxas", "cuobjdump") if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"--kernels: triton's {' and '.join(missing)} are missing in {str(folder)!r}; install "
            "triton's own wheel (pip install --force-reinstall triton), or ask for an AMD chip "
            "(--arch gfx942), which needs none."
        )


def _present() -> int | str:
    import torch

    from str_kernels.backends.triton.launch import arch_of

    if torch.cuda.is_available():
        return arch_of(torch.device("cuda"))
    say(f"no GPU found: compiling for {_name(WITHOUT_GPU)}; --arch chooses another chip")
    return WITHOUT_GPU


def _chip(name: str) -> int | str:
    """Read ``90``, ``sm_90`` or ``gfx942``."""
    number = name.removeprefix("sm_")
    return int(number) if number.isdecimal() else name


def _name(chip: int | str) -> str:
    return f"sm_{chip}" if isinstance(chip, int) else chip


def _row(made: Any) -> dict[str, Any]:
    launch = made.case.launch
    sizes = [launch.block_r, launch.block_d, launch.block_e]
    blocks = [value for value in made.case.constants.values() if type(value) is int]  # no flags
    return {
        "chip": _name(made.arch),
        "kernel": made.case.name,
        "operands": str(made.case.dtype).removeprefix("torch."),
        "tile": [size for size in sizes if size] or blocks,
        "warps": launch.warps,
        "stages": launch.stages,
        "registers": made.registers,
        "shared_bytes": made.shared,
        "spilled_bytes": made.spilled,
        "instructions": list(made.instructions),
        "fits": made.fits,
    }
