"""Hot tiles: all rows multiplied with them beside the lists of the others."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from str_kernels import linear_cross_entropy
from str_kernels.backends.torch import TorchBackend
from str_kernels.backends.triton import TritonBackend
from str_kernels.engine.contract import Block, Head, Wanted
from str_kernels.engine.forward import tiles_of
from str_kernels.options import TILE, LossOptions
from tests.backends.test_routed import clustered_case, index_of
from tests.oracle import assert_close, relative_error

HOT = 2
OPTIONS = [{}, {"softcap": 5.0, "bias": True, "logit_scale": 0.7}]


def block_of(dtype, *, hot=HOT, n=40, **options):
    """A block of rows whose first tiles are hot, some labels among them."""
    settings = {name: x for name, x in options.items() if name != "bias"}
    case = clustered_case(n, 4 * TILE + 19, 32, **options).to(dtype)
    index = replace(index_of(case), hot=torch.arange(hot))
    labels = case.labels.masked_fill(case.labels < 0, -1)
    labels[1] = index.order[5]
    head = Head(case.hidden_states, case.weight, case.bias)
    return Block(head, labels, tiles_of(case.weight, index, fresh=False), LossOptions(**settings))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("deterministic", [False, True])
def test_sums_of_all_pairs(options, dtype, deterministic):
    """With every pair live the sums are the torch backend's, but for 16-bit exponentials.

    The budget takes a few rows at a time. Rounding each exponential by 2⁻⁹ moves a sum of many
    rows by less.
    """
    block, reference, backend = block_of(dtype, **options), TorchBackend(), TritonBackend(1 << 15)
    masses = reference.screen(block, "exact")
    want = reference.refine(block, reference.route(block, masses, 1e-30), Wanted(True, True, False))
    work = backend.route(block, reference.screen(block, "exact"), 1e-30)
    assert work.live().all()
    assert work.counts.tolist() == [0] * HOT + [40] * 3
    torch.use_deterministic_algorithms(deterministic)
    try:
        got = backend.refine(block, work, Wanted(True, True, False))
    finally:
        torch.use_deterministic_algorithms(False)
    tolerance = 2e-6 if dtype == torch.float32 else 2.0**-10
    for name in ("mass", "expected"):
        assert relative_error(getattr(got, name), getattr(want, name)) < tolerance, name
    torch.testing.assert_close(got.maximum, want.maximum, rtol=1e-5, atol=1e-5)
    alone = backend.refine(block, work, Wanted(False, True, False))
    assert alone.expected is None
    assert relative_error(alone.mass, want.mass) < 2e-6


def test_only_hot_tiles_are_live_for_all_rows(backend):
    """The other pairs are live as before, and listed."""
    block = block_of(torch.float32)
    masses = TorchBackend().screen(block, "exact")
    want = TorchBackend().route(block, masses._replace(log_mass=masses.log_mass.clone()), 0.01)
    got = backend.route(block, masses, 0.01)
    assert got.live()[:, :HOT].all()
    assert torch.equal(got.live()[:, HOT:], want.live()[:, HOT:])
    assert not want.live()[:, :HOT].all()
    assert torch.equal(got.counts[HOT:].long(), want.counts[HOT:])
    assert not got.counts[:HOT].any()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_loss_and_gradient(options, backend):
    """Beside fp64, with hot tiles and without: the error is that of dead pairs, or less."""
    case = clustered_case(60, 4 * TILE + 19, 32, **options).to(torch.float32)
    case.hidden_states *= 0.3  # less sure, so that some pairs are dead
    arguments = {"filter_eps": 0.05, "backend": backend, "screen": "exact"}
    truth, plain = case.truth(), index_of(case)
    errors = []
    for index in (plain, replace(plain, hot=torch.arange(HOT))):
        hidden = case.hidden_states.clone().requires_grad_()
        loss, parts = linear_cross_entropy(
            hidden,
            case.weight,
            case.labels,
            bias=case.bias,
            index=index,
            return_parts=True,
            **arguments,
            **case.settings,
        )
        (gradient,) = torch.autograd.grad(loss, hidden)
        assert relative_error(loss, truth["loss"]) < 0.01
        errors.append((relative_error(gradient, truth["hidden_states"]), parts.dead_mass.mean()))
    assert errors[1][0] < 1.01 * errors[0][0] < 0.05
    assert 0 < errors[1][1] < errors[0][1]


def test_a_trained_head_has_none(backend):
    """Its own gradient would cost more: the same results, bit for bit, whatever is hot."""
    case = clustered_case(40, 4 * TILE + 19, 32).to(torch.float32)
    plain = index_of(case)
    arguments = {"filter_eps": 2.0**-7, "backend": backend, "screen": "exact"}
    torch.use_deterministic_algorithms(True)
    try:
        got, want = (
            case.run(index=index, **arguments)
            for index in (replace(plain, hot=torch.arange(HOT)), plain)
        )
    finally:
        torch.use_deterministic_algorithms(False)
    assert_close(got, want, 0.0)
