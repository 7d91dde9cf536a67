"""The reduction in one kernel, beside torch calls: values, counts and gradients."""

from __future__ import annotations

import pytest
import torch

from str_kernels import SafetyConstraint
from str_kernels.backends.triton import TritonBackend
from str_kernels.engine.contract import RowTerms, Statistics
from str_kernels.engine.reduce import totals_of
from str_kernels.options import LossOptions

NAN, INF = float("nan"), float("inf")
SAFETY = SafetyConstraint([0, 1])


def both(values, labels, options, count=None):
    """Reduce by the kernel and by torch, and return totals and gradients of each."""
    found = []
    for backend in (TritonBackend(), None):
        ce, penalty = (x.clone().requires_grad_() for x in values)
        statistics = Statistics(*[labels > 2] * 6)
        totals = totals_of(RowTerms(ce, penalty, statistics, backend), labels, options, count)
        (totals.loss * 3.0).backward()
        gradients = [torch.zeros_like(ce) if x.grad is None else x.grad for x in (ce, penalty)]
        found.append([x.detach() for x in totals if x is not None and x is not totals.factor])
        found[-1] += gradients
    return found


COUNTS = [None, 7, 0, 0.5, torch.tensor(9), torch.tensor([0]), torch.tensor(2.5)]


@pytest.mark.parametrize("safety", [None, SAFETY])
@pytest.mark.parametrize("labelled", [0.0, 0.6, 1.0])
def test_it_is_what_torch_calls_make(safety, labelled):
    """Sums and means of more rows than the kernel takes at once, whatever divides them."""
    values, labels = torch.randn(2, 3, 700).square(), torch.randint(0, 9, (3, 700))
    labels[torch.rand(3, 700) >= labelled] = -100
    values[0][labels < 0] = 0.0
    for reduction, count in [("sum", None), *(("mean", count) for count in COUNTS)]:
        options = LossOptions(reduction=reduction, safety=safety)
        for mine, torchs in zip(*both(values, labels, options, count), strict=True):
            torch.testing.assert_close(mine, torchs)


@pytest.mark.parametrize("value", [NAN, INF])
def test_a_broken_row_shows(value):
    """NaN and inf stay in the loss; labels may be int32, and of any stride."""
    values, labels = torch.ones(2, 40), torch.arange(80, dtype=torch.int32)[::2]
    values[0, 3] = value
    mine, torchs = both(values, labels, LossOptions(safety=SAFETY))
    torch.testing.assert_close(mine, torchs, equal_nan=True)
    assert not mine[0].isfinite()


def test_the_loss_is_the_callers():
    """It may be changed in place, as for accumulated steps; no rows give a zero."""
    for count in (5, 0):
        values, labels = torch.ones(2, count), torch.ones(count, dtype=torch.long)
        terms = RowTerms(*values, Statistics(*[labels > 0] * 6), TritonBackend())
        terms = terms._replace(cross_entropy=terms.cross_entropy.clone().requires_grad_())
        loss = totals_of(terms, labels, LossOptions(), None).loss
        loss /= 2
        loss.backward()
        assert loss == (0.5 if count else 0.0)
        torch.testing.assert_close(
            terms.cross_entropy.grad, torch.full((count,), 0.5 / max(1, count))
        )
