"""What compilers make of the kernels for chips that are not here."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from str_kernels.backends.triton import ahead
from str_kernels.backends.triton.launch import TABLE, family

# The instruction with which each chip multiplies 16-bit, 8-bit and (tf32, or AMD's) fp32 matrices.
INSTRUCTION = {
    80: "mma.sync",
    86: "mma.sync",
    89: "mma.sync",
    90: "wgmma",
    100: "tcgen05.mma",
    103: "tcgen05.mma",
    120: "mma.sync",
    121: "mma.sync",
    "gfx90a": "v_mfma",
    "gfx942": "v_mfma",
}
SIXTEEN_BYTES = {"cuda": r"cp\.async\.c[ag]\.shared\.global.*0x10", "hip": r"load_dwordx4"}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    """Compiles anew and leaves nothing behind."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def multiplies(case):
    """Whether the kernel has a matrix product, whose precision it is told."""
    return "precision" in case.kernel.arg_names


def check(arch, case):
    """Nothing spilled, within shared memory, the chip's own instruction and 16-byte loads."""
    made = ahead.compile_case(case, arch)
    facts = (case.name, case.dtype, case.launch, made.registers, made.spilled, made.shared)
    assert made.fits, facts
    plain_fp32 = case.dtype == torch.float32 and isinstance(arch, int)
    if not multiplies(case) or (plain_fp32 and case.constants["precision"] == "ieee"):
        return
    # products of fewer than 64 rows go to the older instruction of Hopper and Blackwell
    short = case.launch.block_r < 64 and arch in (90, 100, 103)
    wanted = "mma" if short else INSTRUCTION[arch]
    assert any(found.startswith(wanted) or short for found in made.instructions), facts
    if case.name in ("screen", "refine"):
        wide = SIXTEEN_BYTES["cuda" if isinstance(arch, int) else "hip"]
        assert re.search(wide, made.assembly), facts


def test_the_screen_compiles():
    """The kernel with most of the work, its launches of bf16 and of 8 bits, on Hopper."""
    for case in ahead.cases(90, full=True):
        if case.name == "screen" and case.dtype != torch.float32:
            check(90, case)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, "gfx942"])
def test_sixteen_and_eight_bits_compile(arch):
    """bf16 and 8-bit kernels with bias and softcap, on Ampere, Hopper and CDNA3, do not spill."""
    for case in ahead.cases(arch, full=True):
        if case.dtype != torch.float32 or not multiplies(case):
            check(arch, case)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 86])
def test_a_wide_weight_fits(arch):
    """W in fp32 under bf16 autocast, whose tiles take twice the shared memory."""
    for case in ahead.cases(arch, wide_weight=True):
        check(arch, case)


@pytest.mark.slow
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("arch", ahead.ARCHS)
def test_every_choice_compiles(arch, full):
    """Every entry of the launch table, every operand type of the chip, with and without options."""
    for case in ahead.cases(arch, full=full):
        check(arch, case)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [arch for arch in ahead.ARCHS if isinstance(arch, int)])
def test_tf32_compiles(arch):
    """fp32 operands where the user lets torch use tf32: NVIDIA's matrix unit, nothing spilled."""
    for case in ahead.cases(arch, precision="tf32", full=True):
        if case.dtype == torch.float32:
            check(arch, case)


@pytest.mark.slow
def test_sizes_of_one_compile():
    """Triton fixes integers that are 1 when it compiles: one row, one token, one tile, one column.

    The interpreter does not, so that only a compiler shows what breaks.
    """
    for case in ahead.cases(80, dim=1):
        if case.dtype != torch.float32 or not multiplies(case):
            integers = {
                name: 1
                for name in case.kernel.arg_names
                if not name.endswith("_ptr") and name not in ahead.FLOATS
            }
            fixed = case._replace(constants={**integers, **case.constants})
            assert ahead.compile_case(fixed, 80).registers > 0


def test_a_spill_is_seen():
    """A tile that is too large for its warps is reported as spilling, so the check can fail."""
    case = next(case for case in ahead.cases(80) if case.name == "refine")
    blocks = {**case.constants, "BLOCK_R": 128}
    made = ahead.compile_case(
        case._replace(launch=case.launch._replace(warps=4), constants=blocks), 80
    )
    assert made.spilled > 0
    assert not made.fits


def test_every_chip_has_its_row():
    """Every architecture that is compiled for has its own row in the launch table."""
    assert {family(arch) for arch in ahead.ARCHS} == set(TABLE)
    assert family(75) == family("gfx1100") == ""


def test_pointer_types_name_parameters():
    """A name in ``POINTERS`` that no kernel beside it has would state a type of nothing."""
    kernels = {case.kernel for case in ahead.cases(90)}
    for module in {kernel.__module__ for kernel in kernels}:
        table = sys.modules[module].POINTERS
        stated = {f"{name}_ptr" for names in table.values() for name in names}
        taken = {name for k in kernels if k.__module__ == module for name in k.arg_names}
        assert stated <= taken, module


# The oldest Triton that the code needs, that of the GPU which was measured, and the newest.
VERSIONS = ("3.4", "3.6", "3.9")


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_versions_of_triton(version):
    """Hopper's kernels compile without a spill with each of these versions.

    The installed one is tested as it is; another one in the folder that STR_KERNELS_TRITON_3_4 (or
    _3_6, _3_9) names, where ``pip install --target`` has put it. Without a folder the skip says
    which version has not been run.
    """
    name = "STR_KERNELS_TRITON_" + version.replace(".", "_")
    folder = os.environ.get(name)
    if folder is None and not metadata.version("triton").startswith(version + "."):
        pytest.skip(f"not run with Triton {version}: {name} names no folder that has it")
    path = [*([folder] if folder else []), str(Path(__file__).parents[2]), *sys.path]
    code = (
        "import triton\n"
        "from tests.triton.test_ahead import ahead, check\n"
        f"assert triton.__version__.startswith('{version}.'), triton.__version__\n"
        "for case in ahead.cases(90, full=True):\n"
        "    check(90, case)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
