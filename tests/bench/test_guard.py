"""Counts that no machine changes: live pairs, and bytes at the allocator. Nothing is timed here."""

from __future__ import annotations

import pytest
import torch

from str_kernels import linear_cross_entropy
from str_kernels.backends.selection import DEFAULT_EPS
from str_kernels.bench.inputs import synthetic
from str_kernels.bench.measure import live_share
from str_kernels.bench.memory import peak_bytes
from str_kernels.options import TILE

CPU = torch.device("cpu")


def peak(case, eps, trainable):
    """Bytes of forward and backward, without what the index itself holds."""
    index = case.index if eps else None

    def step():
        hidden = case.hidden_states.detach().requires_grad_()
        weight = case.weight.detach().requires_grad_(trainable)
        loss = linear_cross_entropy(hidden, weight, case.labels, index=index, filter_eps=eps)
        return torch.autograd.grad(loss, [hidden, weight] if trainable else [hidden])

    return peak_bytes(step, CPU).peak


@pytest.mark.parametrize(("indexed", "pairs"), [(True, 4560), (False, 12935)])
def test_live_share(indexed, pairs):
    """On a fixed case the router keeps as many of 16,384 pairs as it always did.

    3 %: an eigenvector's sign, which LAPACK may choose otherwise, moves the ragged splits.
    """
    case = synthetic(256, 8192, 64)
    live, _ = live_share(case, case.index if indexed else None, screen="exact")
    assert live * 256 * 8192 / TILE == pytest.approx(pairs, rel=0.03)


@pytest.mark.parametrize("eps", [0.0, DEFAULT_EPS])
@pytest.mark.parametrize("trainable", [False, True])
def test_memory_grows_with_positions_by_rows_alone(eps, trainable):
    """Twice the positions add their own rows, no logits: a frozen head two ``[N, D]`` arrays.

    Those are the saved gradient and the returned one; 128 bytes a row are left for labels, losses
    and statistics. A trainable head also keeps each row's tile masses, and its fp32 hidden states
    in the backward.
    """
    vocab, dim, rows = 4096, 32, 4096
    few, many = (peak(synthetic(n, vocab, dim), eps, trainable) for n in (rows, 2 * rows))
    allowed = 2 * dim * 4 + 128
    if trainable:
        allowed += dim * 4 + 2 * 4 * (vocab // TILE)
    assert (many - few) / rows <= allowed


@pytest.mark.parametrize("eps", [0.0, pytest.param(DEFAULT_EPS, marks=pytest.mark.slow)])
def test_memory_is_bounded(eps):
    """At N 4,096 a step takes at most 128 MiB, a quarter of its logits' size in fp32."""
    case = synthetic(4096, 32768, 16)
    assert peak(case, eps, trainable=False) <= 128 << 20
