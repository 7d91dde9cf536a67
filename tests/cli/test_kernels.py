"""doctor --kernels: what the compilers make of the kernels, for chips that are not here."""

import importlib.util
import json

import pytest

from tests.cli.calling import call

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


@pytest.fixture
def only_the_router(monkeypatch, tmp_path):
    """Compiles one small kernel, anew."""
    from str_kernels.backends.triton import ahead

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    every = ahead.cases
    monkeypatch.setattr(
        ahead, "cases", lambda arch: [case for case in every(arch) if case.name == "route"]
    )
    return ahead


@needs_triton
def test_what_was_compiled_is_told(capsys, only_the_router):
    """Registers, shared memory, spills and instruction, for each chip that was asked for."""
    called = call(capsys, "doctor", "--kernels", "--arch", "sm_80", "--arch", "gfx942", "--json")
    assert called.code == 0, called.err
    found = json.loads(called.out)
    assert found["schema"] == "str_kernels.kernels/1"
    assert {row["chip"] for row in found["rows"]} == {"sm_80", "gfx942"}
    for row in found["rows"]:
        assert (row["kernel"], row["operands"], row["tile"]) == ("route", "float32", [1024])
        assert 0 < row["registers"] <= 255
        assert row["spilled_bytes"] == 0
        assert row["instructions"] == []
        assert row["fits"]


@needs_triton
def test_a_spill_fails(capsys, monkeypatch, only_the_router):
    """A kernel that does not fit is marked in the table, and the command exits with 1."""
    real = only_the_router.compile_case
    monkeypatch.setattr(
        only_the_router, "compile_case", lambda *given: real(*given)._replace(spilled=8)
    )
    called = call(capsys, "doctor", "--kernels", "--arch", "90")
    assert called.code == 1
    assert "NOT" in called.out
    assert "please report" in called.err


@needs_triton
def test_what_cannot_be_compiled_is_refused(capsys, monkeypatch, tmp_path):
    """An unknown chip, the interpreter, and a Triton without its assembler: each with a remedy."""
    from str_kernels.backends.triton import ahead

    called = call(capsys, "doctor", "--kernels", "--arch", "75")
    assert called.code == 2
    assert "arch=75" in called.err
    assert "gfx942" in called.err
    monkeypatch.setattr(ahead, "TOOLS", tmp_path)
    called = call(capsys, "doctor", "--kernels", "--arch", "90")
    assert called.code == 2
    assert "ptxas and cuobjdump are missing" in called.err
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    called = call(capsys, "doctor", "--kernels")
    assert called.code == 2
    assert "unset it" in called.err


def test_without_triton_it_says_so(capsys, monkeypatch):
    """Where triton is not installed the command names it; --arch alone is a wrong command line."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    called = call(capsys, "doctor", "--kernels")
    assert called.code == 2
    assert "pip install triton" in called.err
    assert call(capsys, "doctor", "--arch", "90").code == 2
