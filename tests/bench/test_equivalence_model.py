"""Equivalence of training on a model that is given: same batches, same adapter, its own head."""

from __future__ import annotations

import json
import sys

import pytest

from benchmarks import equivalence_model
from str_kernels.bench.report import SCHEMA, read_rows


@pytest.mark.slow
def test_a_quick_run(tmp_path, tiny_model_dir, monkeypatch):
    """Each head of each seed once; exact is the materialised curve; a second call measures none."""
    data = tmp_path / "answers.jsonl"
    rows = [{"prompt": f"say {i}", "response": "of course " * (3 + i)} for i in range(4)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out"
    heads = ("--heads", "materialised,exact", "--out", str(out), "--quick")
    command = ["", "--model", str(tiny_model_dir), "--data", str(data), *heads]
    monkeypatch.setattr(sys, "argv", command)
    equivalence_model.main()
    (file,) = (out / "quick").glob("*.jsonl")
    _, measured = read_rows(file, SCHEMA)
    assert [(row["seed"], row["head"]) for row in measured] == [
        (seed, head) for seed in range(2) for head in ("materialised", "exact")
    ]
    for plain, exact in zip(measured[::2], measured[1::2], strict=True):
        assert len(plain["losses"]) == 4
        assert max(abs(a - b) for a, b in zip(plain["losses"], exact["losses"], strict=True)) < 1e-4
    assert measured[0]["losses"][-1] < measured[0]["losses"][0]
    monkeypatch.setattr(equivalence_model, "train", None)
    equivalence_model.main()
    assert read_rows(file, SCHEMA)[1] == measured
    assert "answers" in file.with_suffix(".md").read_text()
    assert file.with_suffix(".png").is_file()


@pytest.mark.parametrize(
    ("given", "message"),
    [(("--seeds", "1"), "--seeds 1: must be 2"), (("--heads", "exact"), "--heads exact: must be")],
)
def test_what_cannot_be_compared_is_refused(monkeypatch, capsys, given, message):
    monkeypatch.setattr(sys, "argv", ["", "--model", "no", "--data", "no.jsonl", *given])
    with pytest.raises(SystemExit):
        equivalence_model.main()
    assert message in capsys.readouterr().err
