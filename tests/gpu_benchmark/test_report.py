"""Tables of what a GPU would have found: milliseconds and units beside each other, reasons kept."""

from __future__ import annotations

import json

import pytest

from benchmarks.gpu.report import publish
from str_kernels.bench.report import SCHEMA

SHAPE = {"case": "synthetic", "dtype": "bfloat16", "N": 8192, "V": 128256, "D": 4096}
UNIT = {
    "gemms": 1.0,
    "seconds": [0.0110, 0.0112, 0.0111],
    "queued_gemms": 1.0,
    "queued_seconds": [0.0130],
    "sensors": {"sm_mhz": 1755.0, "memory_mhz": 3201.0, "celsius": 61.0},
}
OURS = UNIT | {"gemms": 1.5, "seconds": [0.0167], "queued_gemms": 1.25, "queued_seconds": [0.0162]}
MEMORY = {"peak_bytes": 300 << 20, "loss_error": 2e-4, "hidden_error": 5e-3}


@pytest.fixture
def folder(tmp_path):
    """A run's file, of an imagined GPU."""
    profile = {"wall_ms": 20.0, "enqueued_ms": 6.0, "span_ms": 18.0, "busy_ms": 12.0, "idle": 1 / 3}
    profile |= {"kernels": 430, "launches": 430, "torch_calls": 900, "copies": {}}
    profile |= {"waits": {"cudaStreamSynchronize": 5}}
    profile |= {"longest": [{"kernel": "screen|kernel", "count": 26, "ms": 6.2}]}
    rows = [
        {"step": "unit", "name": "unit", **SHAPE, **UNIT},
        {"step": "unit", "name": "copy", "bytes": 2 << 30, "seconds": [0.0005]},
        {"step": "profile", "name": "ours", **SHAPE, **profile},
        {"step": "stages", "name": "ours", **SHAPE, "in_stages": 0.75}
        | {"ms": {"screen": 5.55, "refine": 3.0, "forward": 11.0, "backward": 0.4, "whole": 11.4}},
        {"step": "stages", "name": "refine", **SHAPE, **OURS, "live": 0.049, "hot": 31},
        {"step": "head", "name": "ours", **SHAPE, **OURS, **MEMORY, "contender": "ours"},
        {"step": "head", "name": "quack", **SHAPE, "reason": "not installed"},
        {"step": "screen", "name": "screen byte: a", **SHAPE, **OURS, "lse_error": 0.05},
        {"step": "screen", "name": "screen byte: b", **SHAPE, "reason": "OutOfResources: shared"},
        {"step": "lora", "name": "patched", "context": SHAPE, **OURS, **MEMORY, "loss": 11.0},
        {"step": "tests", "name": "tests", "counts": {"passed": 50}, "failed": ["FAILED x - E"]},
        {"step": "exact", "name": "state", "state": "cut", "reason": "its 40 s were over"},
    ]
    head = {"schema": SCHEMA, "circumstances": {"device": "NVIDIA H200", "versions": {}}}
    lines = "".join(json.dumps(row) + "\n" for row in (head, *rows))
    (tmp_path / "gpu.jsonl").write_text(lines)
    return tmp_path


def test_everything_is_in_the_tables(folder):
    """Medians, units, clocks, memory, errors; and what was cut or refused."""
    written = publish(folder, None, folder / "results")
    assert written[0] == folder / "results" / "h200" / "gpu.md"
    assert [path.suffix for path in written] == [".md", ".jsonl", ".png", ".png"]
    text = written[0].read_text()
    assert (
        "| N 8,192, V 128,256, D 4,096 | 11.1 (1.00) | 11.0 | 13.0 (1.00) | 1755 | 3201 | 61"
        in text
    )
    assert "| 775 | 662 |" in text  # 2·N·V·D in TFLOP/s, single and queued
    assert "4.29 TB/s" in text
    assert (
        "| ours | 16.7 (1.50) | 16.7 | 16.2 (1.25) | 1755 | 3201 | 61 | 300.0 | 2e-04 | 0.5%"
        in text
    )
    assert "| screen | 5.55 | 0.500 |" in text
    assert "| refine (4.9% of the pairs live, 31 tiles hot), N 8,192" in text
    assert "The stages hold 75% of the whole." in text
    assert "| 33% | cudaStreamSynchronize 5 |" in text
    assert "screen\\|kernel" in text
    assert "`pytest -m gpu`: passed 50." in text
    assert "- FAILED x" in text
    for line in ("head, quack: not installed", "screen byte: b: OutOfResources", "exact: its 40 s"):
        assert line in text.split("## What was not measured")[1]


def test_the_readme_takes_its_figures_from_it(folder, monkeypatch):
    """A GPU's folder with a run has its figures from there, else from `benchmarks.head`."""
    from benchmarks import readme

    publish(folder, None, folder / "results")
    monkeypatch.setattr(readme, "RESULTS", folder / "results")
    rows = readme._timed("h200", "bfloat16", 4096)
    assert readme._costs(rows["ours"])[0] == "16.7"
    assert f"{rows['ours']['gemms']:.2f}" == "1.50"
