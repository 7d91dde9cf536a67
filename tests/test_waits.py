"""What the host gives a device once, and what it learns from it late."""

from __future__ import annotations

import pytest
import torch

from str_kernels import SafetyConstraint, linear_cross_entropy, waits

CPU = torch.device("cpu")


def test_constants_are_made_once():
    """The same numbers are the same tensor, which autograd can save whoever asked first."""
    with torch.inference_mode():
        made = waits.constant((3, 1, 2), torch.int64, CPU)
    assert made.tolist() == [3, 1, 2]
    assert not made.is_inference()
    assert waits.constant((3, 1, 2), torch.int64, CPU) is made
    assert waits.constant((3, 1, 2), torch.float32, CPU).dtype == torch.float32


def test_constants_are_bounded():
    """A process that makes many constraints does not keep every one's numbers."""
    for i in range(1000):
        waits.constant((i,), torch.int64, CPU)
    info = waits.constant.cache_info()
    assert info.currsize <= info.maxsize < 1000


def _call(labels, backend="torch", **options):
    torch.manual_seed(0)
    hidden, weight = torch.randn(4, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    loss = linear_cross_entropy(
        hidden, weight, labels, reduction="none", backend=backend, **options
    )
    finite = torch.where(loss.isfinite(), loss, 0.0)
    return loss.detach(), *torch.autograd.grad(finite.sum(), (hidden, weight))


def test_a_bad_label_is_an_error_of_a_later_call(no_waits):
    """Its own call gives NaN there and right numbers elsewhere; the next call names it."""
    good, bad = torch.tensor([1, 2, -100, 4]), torch.tensor([1, 5, -100, 4])
    loss, *gradients = _call(bad)
    assert loss.isnan().tolist() == [False, True, False, False]
    with pytest.raises(ValueError, match=r"an earlier call .* labels\[1\]=5: must be a row"):
        _call(good)
    assert _call(good)[0].isfinite().all()  # it is told once
    want, *without = _call(torch.tensor([1, -100, -100, 4]))
    torch.testing.assert_close(loss[[0, 2, 3]], want[[0, 2, 3]])
    torch.testing.assert_close(gradients, without)


@pytest.mark.parametrize("value", [-1.0, float("inf"), float("nan")])
def test_a_bad_position_weight_is_an_error_of_a_later_call(no_waits, value):
    """Its row is NaN, and no other."""
    options = {"safety": SafetyConstraint([0, 3]), "reference": torch.zeros(2)}
    labels, weights = torch.tensor([1, 2, -100, 4]), torch.tensor([1.0, 0.0, value, 1.0])
    loss, *_ = _call(labels, position_weights=weights, **options)
    assert loss.isnan().tolist() == [False, False, True, False]
    with pytest.raises(ValueError, match=r"earlier call .* position_weights\[2\]=.*finite"):
        _call(labels)


def test_checks_at_once_by_a_variable(no_waits, monkeypatch):
    """``STR_KERNELS_SYNC_CHECKS=1`` makes it the error of its own call."""
    monkeypatch.setenv(waits.VARIABLE, "1")
    with pytest.raises(ValueError, match=r"^labels\[1\]=5"):
        _call(torch.tensor([1, 5, -100, 4]))


def test_dense_checks_at_once(no_waits):
    """The materialised logits are indexed by autograd, which has no late errors."""
    with pytest.raises(ValueError, match=r"^labels\[1\]=5"):
        _call(torch.tensor([1, 5, -100, 4]), backend="dense")


def test_labels_that_have_changed_are_still_told(no_waits):
    """Whoever overwrites the bad labels before the error gets one that says so."""
    labels = torch.tensor([1, 5, -100, 4])
    _call(labels)
    labels.fill_(1)
    with pytest.raises(ValueError, match="changed since"):
        _call(labels)
