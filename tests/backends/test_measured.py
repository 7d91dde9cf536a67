"""On a CPU of an unknown kind the screen is measured once, and what was measured is kept."""

from __future__ import annotations

import json
import logging

import pytest
import torch

from str_kernels import notices
from str_kernels.backends.torch import TorchBackend, measured
from str_kernels.files import VARIABLE
from tests.cpus import set_cpu

CPU = torch.device("cpu")


@pytest.fixture
def unknown(monkeypatch, tmp_path):
    """An unknown CPU with bf16 and int8, a new process and an empty cache folder, which it is."""
    set_cpu(monkeypatch, bf16=True, int8=True, amx=True, known=False)
    monkeypatch.setenv(VARIABLE, str(tmp_path / "cache"))
    measured.fastest_screen.cache_clear()
    yield tmp_path / "cache"
    measured.fastest_screen.cache_clear()


@pytest.fixture
def timed(monkeypatch):
    """Seconds that a test chooses, and which screens were measured."""
    seconds, asked = {"exact": 3.0, "bf16": 2.0, "int8": 1.0}, []

    def answer(screen, dtype):
        asked.append(screen)
        return seconds[screen]

    monkeypatch.setattr(measured, "_seconds", answer)
    return seconds, asked


def chosen(dtype: torch.dtype) -> str:
    """Choose as a new process would."""
    measured.fastest_screen.cache_clear()
    return TorchBackend().auto_screen(dtype, CPU, 2048)


def test_the_fastest_is_chosen_and_kept(unknown, timed, monkeypatch, caplog):
    """Once for each dtype; a second process reads the file, whatever it would measure."""
    seconds, asked = timed
    monkeypatch.setattr(notices, "_said", set())
    with caplog.at_level(logging.INFO, logger="str_kernels"):
        assert chosen(torch.float32) == "int8"
    assert "screen=int8 for torch.float32 was the fastest here" in caplog.text
    assert asked == ["exact", "bf16", "int8"]
    seconds["int8"] = 9.0
    assert chosen(torch.float32) == "int8"
    assert len(asked) == 3
    assert chosen(torch.bfloat16) == "exact"
    assert asked[3:] == ["exact", "int8"]
    assert len(json.loads((unknown / "screens.json").read_text())) == 2


@pytest.mark.parametrize("text", ["", "[1]", '{"x": 1}', '{"x": {"exact": "fast"}}'])
def test_a_file_that_is_no_such_file(unknown, timed, text):
    """It is measured anew, and written."""
    unknown.mkdir()
    (unknown / "screens.json").write_text(text)
    assert chosen(torch.float32) == "int8"
    assert len(json.loads((unknown / "screens.json").read_text())) == 1


def test_what_it_depends_on(unknown, timed, monkeypatch):
    """Instructions that oneDNN must not use, and other candidates, are measured apart."""
    asked = timed[1]
    assert chosen(torch.float32) == "int8"
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "SSE41")  # the suite itself may run under another
    chosen(torch.float32)
    assert len(asked) == 6
    set_cpu(monkeypatch, bf16=True, known=False)
    assert chosen(torch.float32) == "bf16"
    assert asked[6:] == ["exact", "bf16"]


def test_without_a_cache_folder(unknown, timed, monkeypatch, tmp_path):
    """It is measured once in a process where nothing may be kept, or written."""
    monkeypatch.setenv(VARIABLE, "off")
    assert chosen(torch.float32) == "int8"
    (tmp_path / "file").touch()
    monkeypatch.setenv(VARIABLE, str(tmp_path / "file" / "below"))
    assert chosen(torch.float32) == "int8"


def test_a_known_cpu_is_not_measured(unknown, timed, monkeypatch):
    """Nor is fp64, nor another device."""
    assert TorchBackend().auto_screen(torch.float64, CPU, 2048) == "exact"
    assert TorchBackend().auto_screen(torch.float32, torch.device("cuda"), 2048) == "exact"
    set_cpu(monkeypatch, int8=True)
    assert chosen(torch.float32) == "int8"
    assert timed[1] == []


@pytest.mark.parametrize("screen", ["exact", "bf16", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_seconds_are_measured(monkeypatch, screen, dtype):
    """Every screen runs, on a smaller problem here."""
    monkeypatch.setattr(measured, "_ROWS", 8)
    monkeypatch.setattr(measured, "_VOCAB", 256)
    monkeypatch.setattr(measured, "_DIM", 32)
    assert 0.0 < measured._seconds(screen, dtype) < 60.0
