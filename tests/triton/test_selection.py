"""When the Triton backend is chosen, and what is said where it cannot be."""

from __future__ import annotations

import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from str_kernels import linear_cross_entropy
from str_kernels.backends import selection
from str_kernels.backends.selection import DEFAULT_EPS, select_backend
from str_kernels.options import LossOptions

triton = pytest.importorskip("triton")
CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture
def capability(monkeypatch):
    """Pretends a CUDA device of this capability is here."""

    def pretend(major, minor):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, minor))

    return pretend


def test_auto_is_triton_on_a_gpu(capability):
    """``"auto"`` takes Triton on CUDA, torch for fp64, for old chips, and on a CPU."""
    capability(9, 0)
    assert select_backend("auto", CUDA)[0].name == "triton"
    assert select_backend("auto", CUDA, torch.bfloat16)[0].name == "triton"
    backend, reason = select_backend("auto", CUDA, torch.float64)
    assert backend.name == "torch"
    assert "fp64" in reason
    assert select_backend("auto", CPU)[0].name == "torch"
    capability(7, 5)
    backend, reason = select_backend("auto", CUDA)
    assert backend.name == "torch"
    assert "7.5" in reason


def test_fp8_needs_a_chip_that_has_it(capability):
    """An fp8 screen is refused on Ampere, taken on Ada, Hopper and Blackwell."""
    backend = selection._triton()
    for major, minor, has in ((8, 0, False), (8, 6, False), (8, 9, True), (9, 0, True)):
        capability(major, minor)
        assert (backend.refuses("fp8", torch.bfloat16, CUDA) is None) == has
        assert backend.refuses("int8", torch.bfloat16, CUDA) is None


def test_auto_screen(capability):
    """int8 where it was measured, on Hopper, and for rows that repay quantising W."""
    backend = selection._triton()
    for major, minor, screen in ((8, 0, "exact"), (9, 0, "int8"), (10, 0, "exact")):
        capability(major, minor)
        assert backend.auto_screen(torch.bfloat16, CUDA, 4096) == screen
        assert backend.auto_screen(torch.bfloat16, CUDA, 2048) == "exact"
        assert backend.auto_screen(torch.float32, CUDA, 2048) == screen
        assert backend.auto_screen(torch.float32, CUDA, 100) == "exact"


def test_without_a_usable_triton(monkeypatch):
    """An absent or old Triton means torch with the reason, and an error when asked for by name."""
    for fake, said in ((None, "not installed"), ("3.3.1", "older than 3.4")):
        if fake is None:
            monkeypatch.setattr(selection.importlib.util, "find_spec", lambda name: None)
        else:
            monkeypatch.undo()
            old = types.SimpleNamespace(__version__=fake)
            monkeypatch.setattr(selection.importlib, "import_module", lambda name, old=old: old)
        backend, reason = select_backend("auto", CUDA)
        assert backend.name == "torch"
        assert said in reason
        with pytest.raises(ValueError, match=f"backend='triton'.*{said}"):
            select_backend("triton", CUDA)


def test_the_metadata_ask_for_the_triton_that_the_code_needs():
    """One oldest version, in ``pyproject.toml`` and in the code."""
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    oldest = re.search(r'"triton>=(\d+)\.(\d+);', text)
    assert tuple(map(int, oldest.groups())) == selection.OLDEST_TRITON


def test_cpu_tensors_by_name():
    """``"triton"`` on CPU tensors says that it needs a GPU or the interpreter."""
    hidden, weight = torch.randn(4, 8), torch.randn(10, 8)
    with pytest.raises(ValueError, match=r"backend='triton': tensors are on cpu.*TRITON_INTERPRET"):
        linear_cross_entropy(hidden, weight, torch.zeros(4).long(), backend="triton")


def test_importing_the_package_does_not_import_triton():
    """Neither ``import str_kernels`` nor a loss on the CPU costs Triton's import."""
    code = (
        "import sys, torch, str_kernels as s\n"
        "s.linear_cross_entropy(torch.randn(4, 8), torch.randn(10, 8), torch.zeros(4).long())\n"
        "assert not any(name.startswith('str_kernels.backends.triton') for name in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_few_positions_are_computed_exactly(capability, monkeypatch):
    """By itself the filter begins at a number of positions; by name it always runs."""
    capability(9, 0)
    backend = selection._triton()

    def eps(positions, dtype=torch.bfloat16, chosen=backend, **options):
        where = {"dtype": dtype, "device": CUDA, "indexed": True, "positions": positions}
        return selection.resolve(LossOptions(**options), chosen, **where).eps

    monkeypatch.setattr("str_kernels.backends.triton.backend.blas_refusal", lambda *a: None)
    assert [eps(n) for n in (0, 1, 511, 512, 8192)] == [0, 0, 0, DEFAULT_EPS, DEFAULT_EPS]
    assert [eps(n, torch.float32) for n in (255, 256)] == [0, DEFAULT_EPS]
    assert eps(8, filter_eps=0.25) == 0.25
    assert eps(8, screen="int8") == DEFAULT_EPS
    assert eps(8, screen="exact") == 0
    assert eps(8192, filter_eps=0.0) == 0
    by_triton = type(backend)(exact="triton")
    assert [eps(n, chosen=by_triton) for n in (255, 256)] == [0, DEFAULT_EPS]
    monkeypatch.setattr("str_kernels.backends.triton.backend.blas_refusal", lambda *a: "no")
    assert [eps(n) for n in (255, 256)] == [0, DEFAULT_EPS]
    assert eps(8, chosen="torch") == DEFAULT_EPS
    assert (
        "fewer"
        in selection.resolve(
            LossOptions(), backend, dtype=torch.bfloat16, device=CUDA, indexed=True, positions=8
        ).reason
    )
