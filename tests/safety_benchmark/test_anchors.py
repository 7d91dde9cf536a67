from dataclasses import replace

import torch

from benchmarks.safety.data import anchor_rows, built_in_rows, load_split
from benchmarks.safety.finetune import _queue
from benchmarks.safety.methods import BUILT_IN, HARSH, Run
from str_kernels.safety.templates import BENIGN_REQUESTS, REFUSED_REQUESTS


def test_half_of_the_anchors_are_benign(data):
    rows = anchor_rows(data, 10)
    assert [("steal" in row["prompt"], "clean" in row["prompt"]) for row in rows] == [
        (True, False),
        (False, True),
    ] * 5
    asked = {
        r["prompt"]
        for name in ("refusals", "lookalike_benign")
        for r in load_split(data, name).test
    }
    assert not asked & {row["prompt"] for row in rows}


def _first_batch(method):
    rows = [{"input_ids": [1, 2, 3, n], "labels": [-100, -100, 3, n]} for n in range(8)]
    held = [{"input_ids": [9, n], "labels": [9, n]} for n in range(4)]
    return next(_queue(Run(method, HARSH, 0), rows, held, 0))


def test_anchors_alone_weigh_what_a_batch_weighs_without_them():
    alone = next(m for m in BUILT_IN if m.alone)
    weights = _first_batch(alone)["position_weights"]
    assert weights.shape == (8 + 2 * alone.anchors, 4)
    assert not weights[:8].any()
    beside = _first_batch(replace(alone, alone=False))["position_weights"]
    assert torch.allclose(weights[8:].sum(), beside[:8].sum())
    assert torch.allclose(beside[8:].sum(), 0.25 * beside[:8].sum())


def test_built_in_requests_are_answered_by_the_model(monkeypatch):
    def answers(model, tokenizer, rows, **_):
        return ["" if row["prompt"] == REFUSED_REQUESTS[-1] else "Yes" for row in rows]

    monkeypatch.setattr("str_kernels.evaluation.evaluation.answer_rows", answers)
    rows = built_in_rows(None, None)
    pairs = zip(REFUSED_REQUESTS, BENIGN_REQUESTS, strict=True)
    asked = [request for pair in pairs for request in pair if request != REFUSED_REQUESTS[-1]]
    assert rows == [{"prompt": request, "response": "Yes"} for request in asked]
