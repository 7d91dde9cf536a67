"""What is summed between two logs, against the same sums by hand."""

from __future__ import annotations

import pytest
import torch
from torch.overrides import TorchFunctionMode

from str_kernels import SafetyConstraint
from str_kernels.huggingface import patch_model
from tests.huggingface.adapters import wrap
from tests.huggingface.dense import safety_values, weights
from tests.huggingface.models import batch, build

IDS = [3, 17, 40, 95]
KINDS = {
    "mse": {"token_weights": [0.5, 1.0, 2.0, 4.0]},
    "logprob": {},
    "kl_mass": {},
    "kl": {"temperature": 2.0},
}


def drift_by_hand(model, inputs, safety, positions):
    """Σ w (1/K) Σ (z - r)² and Σ w of one batch, position by position."""
    arguments = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        z = safety_values(model(**arguments).logits, safety)
        with model.disable_adapter():
            r = safety_values(model(**arguments).logits, safety)
    shifted = torch.nn.functional.pad(inputs["labels"], (0, 1), value=-100)[:, 1:]
    w = weights(shifted, inputs["attention_mask"], positions)
    return (w * (z - r).square().mean(-1)).sum(), w.sum()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("positions", ["all", "labels", 2])
def test_drift_over_accumulation_steps(kind, positions):
    """Batches of other sizes between two logs: the distance of every constrained weight counts
    once, in the constraint's unit and without its own weights or temperature.
    """
    safety = SafetyConstraint(IDS, 0.7, kind=kind, **KINDS[kind])
    model = wrap(build())
    batches = [batch(rows=3), batch(rows=1, length=7, seed=5), batch(rows=2, length=9, seed=6)]
    sums = [drift_by_hand(model, inputs, safety, positions) for inputs in batches]
    distance, weight = (torch.stack(parts).sum() for parts in zip(*sums, strict=True))
    with patch_model(model, safety, positions=positions) as patch:
        for inputs in batches:
            model(**inputs).loss.backward()
        got = patch.meter.take()["safety_drift"]
        assert patch.meter.take() == {}
    assert distance > 0.04 * weight  # the adapter has moved them
    # fp32 logits of about 8, off by some 2^-21 of that, in differences of about 0.2
    assert got == pytest.approx((distance / weight).sqrt().item(), rel=1e-4)


@pytest.mark.parametrize("safety", [None, SafetyConstraint(IDS, 0.0)], ids=["none", "strength 0"])
def test_no_constraint_no_drift(safety, monkeypatch):
    """Without a constraint nothing is computed for it, and nothing is said."""
    model = wrap(build())
    with patch_model(model, safety) as patch:
        monkeypatch.setattr(patch.meter, "add_drift", None)  # calling it would fail
        model(**batch()).loss.backward()
        totals = patch.meter.take()
    assert totals["cross_entropy"] > 0
    assert "safety_drift" not in totals


class Reads(TorchFunctionMode):
    """Notes what makes the host wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name in {"item", "tolist", "__bool__", "__float__", "__int__", "nonzero", "cpu"}:
            self.seen.append(name)
        return function(*args, **(kwargs or {}))


def test_only_the_log_reads_the_device(monkeypatch):
    """Adding never reads a value; taking reads one tensor for the terms and one for the drift."""
    from str_kernels.huggingface.patch.meter import LossMeter

    seen: list[str] = []

    def watched(name):
        plain = getattr(LossMeter, name)

        def call(*arguments, **keywords):
            with Reads() as reads:
                plain(*arguments, **keywords)
            seen.append(name)
            assert reads.seen == []

        return call

    for name in ("add", "add_drift"):
        monkeypatch.setattr(LossMeter, name, watched(name))
    model = wrap(build())
    with patch_model(model, SafetyConstraint(IDS, 1.0)) as patch:
        seen.clear()  # of the trial run
        model(**batch())
        assert seen == ["add", "add_drift"]
        with Reads() as reads:
            patch.meter.take()
    assert reads.seen == ["tolist", "tolist"]
