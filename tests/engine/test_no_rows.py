"""Without a row that needs the vocabulary, the vocabulary is not read."""

from __future__ import annotations

import pytest
import torch

from str_kernels import SafetyConstraint, linear_cross_entropy
from str_kernels.backends.torch import TorchBackend
from str_kernels.vocabulary import VocabularyIndex

ROWS, VOCAB, DIM = 5, 300, 16


class Blind(TorchBackend):
    """It cannot read the vocabulary."""

    def exact(self, *_):
        raise AssertionError("the vocabulary was read")

    screen = exact


@pytest.mark.parametrize("kind", [None, "kl", "mse", "logprob", "kl_mass"])
@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_no_labelled_row(kind, indexed, smoothing):
    """All is zero, the penalty is that of the dense loss, and so are the gradients."""
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(VOCAB, DIM, generator=g)
    hidden = torch.randn(ROWS, DIM, generator=g).requires_grad_()
    labels = torch.full((ROWS,), -100)
    index = VocabularyIndex.build(weight, hidden.detach()) if indexed else None
    more = {}
    if kind is not None:
        safety = SafetyConstraint([3, 7, 200], 2.0, kind=kind)
        # two kinds read the vocabulary of a constrained row, so there is none
        weights = torch.full((ROWS,), 0.0 if kind in ("logprob", "kl_mass") else 0.5)
        reference = torch.randn(ROWS, safety.references, generator=g)
        more = {"safety": safety, "reference": reference, "position_weights": weights}
    found = []
    for backend in (Blind(), "dense"):
        index = index if isinstance(backend, Blind) else None
        loss = linear_cross_entropy(
            hidden, weight, labels, index=index, backend=backend, reduction="sum",
            label_smoothing=smoothing, **more,
        )  # fmt: skip
        found.append((loss.detach(), *torch.autograd.grad(loss, hidden)))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want)


def test_a_trained_head_has_a_gradient():
    """It is zero."""
    weight = torch.randn(VOCAB, DIM).requires_grad_()
    labels = torch.full((ROWS,), -100)
    linear_cross_entropy(torch.randn(ROWS, DIM), weight, labels, reduction="sum").backward()
    assert not weight.grad.any()
