"""The kernels' losses and gradients are exact relative to themselves, however large logits are."""

from __future__ import annotations

import pytest
import torch

from tests.backends.test_large_logits import (
    DTYPES,
    check,
    check_statistics,
    dead_truth,
    large_case,
    truth_of,
)

LEVELS = [(0, 1), (64, 1), (1000, 1), (16384, 1), (-16384, 1)]
OPTIONS = [{"label_smoothing": 0.1, "bias": True}, {"z_loss": 2.0**-14}, {"kind": "logprob"}]


@pytest.mark.parametrize("level", LEVELS, ids=str)
def test_every_dtype(level, backend):
    """The exact path, and one that approximates tiles."""
    case = large_case(*level, n=12, vocab=300)
    truth, promised = truth_of(case), dead_truth(case, 0.3)
    for dtype in DTYPES:
        check(case, dtype, truth, backend=backend, filter_eps=0.0)
    check(case, torch.float32, promised, backend=backend, filter_eps=0.3, screen="exact")


@pytest.mark.parametrize("level", [(16384, 1), (-16384, 1)], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option(options, level, backend):
    """The exact path, and one that refines every tile."""
    case = large_case(*level, n=12, vocab=300, **options)
    truth = truth_of(case)
    for eps in (0.0, 1e-30):
        check(case, torch.float32, truth, backend=backend, filter_eps=eps)


def test_statistics(backend):
    """Entropies and log-probabilities."""
    case = large_case(16384, 1, n=12, vocab=300, kind="logprob")
    check_statistics(case.to(torch.float32), backend)


@pytest.mark.parametrize("softcap", [1e3, 1e6])
def test_a_softcap_far_above_the_logits(softcap, backend):
    """Its tanh is nearly the identity, and must not lose their digits."""
    case = large_case(0, 1, n=12, vocab=300, softcap=softcap, z_loss=1e-3)
    check(case, torch.float32, truth_of(case), backend=backend, filter_eps=0.0)


def test_one_token(backend):
    """A vocabulary of one: no other logit, no loss."""
    case = large_case(64, 1, n=3, vocab=1)
    case.labels[:] = 0
    for eps in (0.0, 1e-3):
        got = case.to(torch.float32).run(backend=backend, filter_eps=eps, return_parts=False)
        assert all(values.abs().max() == 0 for values in got.values())
