"""The counter of launches, waits and copies: each kind of operation is counted as what it is."""

from __future__ import annotations

import torch

from str_kernels.bench.launches import counted_launches


def test_launches_are_counted_and_views_are_not():
    """A product and a fill are launches; views and allocations are not; the backward counts."""
    x, w = torch.randn(4, 4, requires_grad=True), torch.randn(4, 4)
    with counted_launches() as found:
        torch.empty(3)
        y = (x.T.reshape(16)[2:].view(7, 2) + 1.0).sum()
        torch.autograd.grad(y + (x @ w).sum(), x)
    assert found.torch["mm"] == 2  # forward and backward
    assert not {"t", "transpose", "slice", "view", "empty"} & set(found.torch)
    assert found.totals()["waits"] == found.totals()["copies"] == 0


def test_waits_are_counted():
    """Everything by which the host reads values of a device."""
    x = torch.tensor([3.0, 0.0])
    for name, read in {
        "_local_scalar_dense": lambda: x.sum().item(),
        "nonzero": lambda: x.nonzero(),
        "equal": lambda: torch.equal(x, x + 1),
        "masked_select": lambda: x.masked_select(x > 0),
        "index": lambda: x[x > 0],
        "_unique2": lambda: x.unique(),
        "tolist": lambda: x.tolist(),
        "cpu": lambda: x.cpu(),
        "to": lambda: x.to("cpu"),
        "numpy": lambda: x.numpy(),
    }.items():
        with counted_launches() as found:
            read()
        assert found.waits[name] == 1, name
    with counted_launches() as found:
        assert (x > 0).any()
    assert sum(found.waits.values()) == 1


def test_copies_to_a_device_are_counted():
    """A tensor made of the host's numbers is copied; a fill is not."""
    x = torch.zeros(3)
    with counted_launches() as found:
        torch.tensor([1, 2], device=x.device)
        x.new_tensor([1.0])
        torch.as_tensor(3.0, device=x.device)
        torch.full((2,), 1.0)
        torch.as_tensor(x)
    assert found.copies == {"tensor": 1, "new_tensor": 1, "as_tensor": 1}
    assert found.torch == {"full": 1}


def test_counts_are_subtracted():
    """The difference of two calls says what one does more."""
    x = torch.ones(3)
    with counted_launches() as once:
        x.mul(2.0)
    with counted_launches() as more:
        x.mul(2.0).add(1.0).mul(2.0)
    assert (more - once).torch == {"mul": 1, "add": 1}
