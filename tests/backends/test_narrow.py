"""Few rows of 16-bit operands: the pass that reads the weight once, against the fp64 truth."""

from __future__ import annotations

import pytest
import torch

from str_kernels.backends.torch import exact, narrow
from str_kernels.engine import forward
from tests.backends.test_exact import OPTIONS, TOLERANCE
from tests.oracle import assert_close, make_case

HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def passes(monkeypatch):
    """Cut small problems too: pieces of 11 rows of the weight, blocks of 3 pieces at most."""
    monkeypatch.setattr(narrow, "_CACHEFUL", 11 * 24)
    monkeypatch.setattr(narrow, "_CACHEFULS", 3)
    monkeypatch.setattr(forward, "_KEPT", 0)  # kept probabilities are the other pass's
    found = []

    def narrow_pass(*args):
        found.append(narrow.narrow_pass(*args))
        return found[-1]

    monkeypatch.setattr(exact, "narrow_pass", narrow_pass)
    return found


@pytest.mark.parametrize("rows", [1, 2, 37])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option_equals_the_truth(passes, options, dtype, rows):
    """In each dtype and option, of one row, of two and of many; smoothing needs the other pass."""
    case = make_case(rows, ignored=0.3 if rows > 2 else 0.0, **options).to(dtype)
    got, truth = case.run(), case.truth()
    assert_close(got, truth, TOLERANCE[dtype])
    assert abs(got["loss"] - truth["loss"]) <= 3e-6 * truth["loss"]
    smooth = "label_smoothing" in options
    assert passes == [] if smooth else len(passes) == 1 and passes[0] is not None


def test_without_rows():
    """Nothing has a label: a zero loss, zero gradients."""
    case = make_case(5, ignored=1.1).to(torch.bfloat16)
    assert_close(case.run(), case.truth(), 1e-6)


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize(
    ("tokens", "value", "taken"),
    [
        (slice(200, 201), 200.0, False),  # too far above the first ones for their shift
        (slice(0, 33), -1e9, False),  # all tokens of the first block are masked
        (slice(0, 33), float("-inf"), True),
        (slice(40, 60), float("-inf"), True),
        (slice(299, 301), float("inf"), False),
        (slice(77, 78), float("nan"), False),
    ],
)
def test_logits_that_spread(passes, tokens, value, taken, rows):
    """Logits too far above the shift are left to the other pass; all are right, or not finite."""
    case = make_case(rows, bias=True, ignored=0.0).to(torch.bfloat16)
    case.bias[tokens] = value
    case.labels[:] = torch.arange(rows) + 100
    got, truth = case.run(), case.truth()
    if value < 1e3:
        assert abs(got["loss"] - truth["loss"]) <= 1e-5 * truth["loss"]
        assert_close({"h": got["hidden_states"]}, {"h": truth["hidden_states"]}, 2.0**-8)
    else:
        assert not got["loss"].isfinite()
    assert (passes[0] is not None) == taken


def test_autocast_rounds_the_weight():
    """An fp32 weight is rounded to bf16 first, as for many rows."""
    case = make_case(3, ignored=0.0).to(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = case.run()
    rounded = case.to(torch.bfloat16)
    assert abs(got["loss"] - rounded.truth()["loss"]) < 1e-6 * got["loss"]
