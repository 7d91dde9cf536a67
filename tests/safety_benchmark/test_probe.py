import math

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.safety.findings import read
from benchmarks.safety.methods import HARSH, MSE, PLAIN, Run, plan_order
from benchmarks.safety.probe import RunProbe, points, rank_correlation, sentences
from benchmarks.safety.report import write
from tests.safety_benchmark.test_report import put, result_of
from tests.tiny import exchanges


def test_spearman_by_hand():
    """Ranks alone count, ties share theirs, and a constant has no coefficient."""
    assert rank_correlation([1, 2, 3], [1, 10, 100]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    # ranks 1, 2.5, 2.5, 4 and 1, 3, 2, 4: 1 - 6 Σd² / 60 does not hold with ties
    assert rank_correlation([0, 5, 5, 9], [0, 2, 1, 3]) == pytest.approx(4.5 / (4.5 * 5) ** 0.5)
    assert math.isnan(rank_correlation([1, 1], [0, 1]))
    with pytest.raises(ValueError, match="same runs"):
        rank_correlation([1], [1, 2])


def test_a_run_is_probed(aligned_model_dir):
    """Every twentieth step and the last one; an untouched model has lost nothing."""
    model = AutoModelForCausalLM.from_pretrained(aligned_model_dir)
    tokenizer = AutoTokenizer.from_pretrained(aligned_model_dir)
    rows = [{"prompt": request} for request, _ in exchanges(forbidden=True)[:4]]
    probe = RunProbe.of(model, tokenizer, rows, (5, 6))
    for step in (1, 20):
        probe.after(model, step)
    probe.after(model, 21, last=True)
    found = probe.as_dict()
    assert (found["steps"], found["requests"]) == ([20, 21], 4)
    assert found["refusal"] == pytest.approx([1, 1])
    assert found["divergence"] == pytest.approx([0, 0], abs=1e-9)
    rows = [{"prompt": request} for request, _ in exchanges(forbidden=False)[:2]]
    assert RunProbe.of(model, tokenizer, rows, (5, 6)) is None


def test_the_report_orders_runs_by_their_probe(tmp_path):
    """Runs without a probe are left out, and a report without any has no such section."""
    lost = ["refusal"] * 2 + ["compliance"] * 8
    put(tmp_path, "old", result_of(Run(PLAIN, HARSH, 0), lost))
    write(tmp_path)
    assert "probe" not in (tmp_path / "APPENDIX.md").read_text()
    for seed, (refused, left) in enumerate([(2, 0.1), (5, 0.4), (9, 0.97)], start=1):
        outcomes = ["refusal"] * refused + ["compliance"] * (10 - refused)
        run = Run(MSE, HARSH, seed)
        put(tmp_path, run.name, {**result_of(run, outcomes), "probe": {"refusal": [1.0, left]}})
    found = points(read(tmp_path, plan_order()))
    assert [(p.probe, p.refused) for p in found] == [(0.1, 0.2), (0.4, 0.5), (0.97, 0.9)]
    assert sentences(found) == "Over 3 runs the rank correlation (Spearman) is 1.00."
    write(tmp_path)
    assert "![refusals against the probe](probe.png)" in (tmp_path / "APPENDIX.md").read_text()
    assert (tmp_path / "probe.png").is_file()
