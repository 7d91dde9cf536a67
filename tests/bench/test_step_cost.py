"""What a constraint adds to a whole step: every variant trains both models on the same rows."""

from __future__ import annotations

import json
import sys

import pytest

from benchmarks import step_cost
from str_kernels.bench.report import SCHEMA, read_rows


@pytest.mark.slow
def test_every_variant_is_measured_once(tmp_path, tiny_model_dir, monkeypatch):
    data = tmp_path / "answers.jsonl"
    rows = [{"prompt": f"say {i}", "response": "of course " * (3 + i)} for i in range(4)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--batch", "2", "--max-length", "64", "--repeats", "1", "--out", str(tmp_path)]
    command = ["", "--model", str(tiny_model_dir), "--data", str(data), *options]
    monkeypatch.setattr(sys, "argv", command)
    step_cost.main()
    _, measured = read_rows(tmp_path / "step_cost.jsonl", SCHEMA)
    assert [row["variant"] for row in measured] == [v.name for v in step_cost.VARIANTS]
    for row in measured:
        assert row["steps"] == 2
        assert 0 < row["labelled"] < row["tokens"]
        assert row["ratio"] > 0
    monkeypatch.setattr(step_cost, "_Bench", None)
    step_cost.main()  # nothing is measured again
    assert "kl_mass, cached" in (tmp_path / "step_cost.md").read_text()
