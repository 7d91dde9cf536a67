"""The demo's models over seeds: every kind once, and a second call measures none again."""

from __future__ import annotations

import sys

import pytest

from benchmarks import demo
from str_kernels.bench.report import SCHEMA, read_rows


@pytest.mark.slow
def test_a_quick_run(tmp_path, monkeypatch):
    command = ["", "--seeds", "1", "--quick", "--kinds", "aligned", "mse", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    demo.main()
    _, rows = read_rows(tmp_path / "demo.jsonl", SCHEMA)
    assert [row["kind"] for row in rows] == ["aligned", "mse"]
    assert rows[0]["task_accuracy"] == 0.0  # which the aligned model has not been taught
    monkeypatch.setattr(demo.run, "align", None)
    demo.main()
    assert read_rows(tmp_path / "demo.jsonl", SCHEMA)[1] == rows


def test_a_table_tells_the_median_and_how_far_it_varies():
    settings = {"threads": 1, "isa": "AVX2", "quick": False}
    others = dict.fromkeys(demo.COLUMNS[1:], 1.0)
    rows = [
        {"kind": "mse", "seed": seed, **settings, **others, "refusal_rate": share}
        for seed, share in enumerate((0.5, 1.0, 0.75))
    ]
    assert "| mse | 1, AVX2 | 3 | 75% (50% to 100%) |" in demo.table(rows)
