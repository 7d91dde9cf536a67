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
    patch, patched = step_cost.patch_model, []

    def spied(model, safety=None, **settings):
        reference = settings.get("reference", "")
        reference = reference if isinstance(reference, str) else "cache"
        patched.append((safety and safety.kind, reference, settings.get("share")))
        return patch(model, safety, **settings)

    monkeypatch.setattr(step_cost, "patch_model", spied)
    step_cost.main()
    # the unit first, which is not constrained
    wanted = [(v.kind, v.reference, v.share) for v in step_cost.VARIANTS if v.patched]
    assert patched == [(None, "", None), *wanted]
    _, measured = read_rows(tmp_path / "step_cost.jsonl", SCHEMA)
    assert [row["variant"] for row in measured] == [v.name for v in step_cost.VARIANTS]
    for row in measured:
        assert row["steps"] == 2
        assert 0 < row["labelled"] < row["tokens"]
        assert len(row["ratios"]) == len(row["seconds"]) == len(row["unit_seconds"]) == 1
    monkeypatch.setattr(step_cost, "_Bench", None)
    step_cost.main()  # nothing is measured again
    assert "kl_mass, cached" in (tmp_path / "step_cost.md").read_text()
