"""Where the host must not wait, rows are listed on the device, and results are the same."""

from __future__ import annotations

import pytest
import torch

from str_kernels import SafetyConstraint, VocabularyIndex
from str_kernels.backends.selection import DEFAULT_EPS
from str_kernels.engine.contract import ABSENT, RowInputs
from str_kernels.engine.rows import plan_rows
from str_kernels.options import LossOptions
from tests.backends.test_routed import clustered_case
from tests.oracle import assert_close
from tests.triton.interpreted.test_launches import SmallBlocks

KINDS = [None, "mse", "logprob", "kl"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weighted", [False, True])
def test_the_plan_is_the_hosts(kind, weighted, backend, no_waits):
    """Each field is that of ``plan_rows``, and the dense rows stand first, in their order."""
    safety = None if kind is None else SafetyConstraint([3, 5], 0.7, kind=kind)
    options = LossOptions(safety=safety)
    labels = torch.randint(-1, 310, (2100,)).clamp(max=305)  # some are out of range
    labels[torch.rand(2100) < 0.6] = -100
    weights = None
    if weighted and safety is not None:
        weights = torch.rand(2100).mul_(3.0).floor_()
        weights[::97], weights[5::101] = -1.0, float("nan")
    inputs, tiles = RowInputs(labels, None, weights), _tiles(300)
    want = plan_rows(inputs, options, torch.float32, 300)
    got = backend.prepare(inputs, options, 300, tiles)
    for name in ("labels", "labelled", "dense", "safety", "penalty_scale", "bad"):
        one, other = getattr(got, name), getattr(want, name)
        assert (one is None) == (other is None), name
        if one is not None:
            torch.testing.assert_close(one, other, equal_nan=True, rtol=0, atol=0, msg=name)
    rows, listed, places, _, count = got.listed
    assert count == want.dense.sum()
    assert torch.equal(rows[:count], want.dense.nonzero()[:, 0])
    assert torch.equal(rows.sort().values, torch.arange(2100))
    assert torch.equal(listed[:count], want.labels[rows[:count]])
    assert (listed[count:] == ABSENT).all()
    has = listed >= 0
    assert torch.equal(places[has].long(), tiles.inverse[listed[has]])
    assert torch.equal(places[~has].long(), listed[~has])


def _tiles(vocab):
    from str_kernels.engine.forward import tiles_of

    index = VocabularyIndex.of_order(torch.randn(vocab, 4), torch.randperm(vocab))
    return tiles_of(torch.randn(vocab, 4), index, fresh=False)


OPTIONS = [
    {},
    {"k": 5, "kind": "logprob", "weighted": True, "uneven": True, "softcap": 5.0, "bias": True},
    {"k": 5, "kind": "kl", "weighted": True, "label_smoothing": 0.1, "z_loss": 0.1},
]


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("screen", [None, "exact", "int8"])
def test_results_are_the_same(options, screen, no_waits, monkeypatch):
    """Loss and every gradient, two thirds of the rows ignored, some with inf and NaN states."""
    case = clustered_case(90, 300, 32, ignored=0.6, **options).to(torch.float32)
    index = VocabularyIndex.build(case.weight, case.hidden_states)
    idle = case.labels == -100
    if case.position_weights is not None:
        idle &= case.position_weights == 0
    where = idle.nonzero()[:2, 0]
    case.hidden_states[where[0]], case.hidden_states[where[1]] = float("inf"), float("nan")
    given = {"filter_eps": 0.0} if screen is None else {"filter_eps": DEFAULT_EPS, "index": index}
    given |= {"screen": screen or "auto", "backend": SmallBlocks(), "reduction": "none"}
    upstream = torch.linspace(-1.0, 2.0, 90)
    got = case.run(upstream, **given)
    with monkeypatch.context() as patch:
        patch.setattr("str_kernels.waits.allowed", lambda device: True)
        want = case.run(upstream, **given)
    assert_close(got, want, 1e-5)


@pytest.mark.parametrize("ignored", [0.0, 1.0])
@pytest.mark.parametrize("screen", [None, "exact"])
def test_every_row_and_none(ignored, screen, no_waits):
    """The edges: all labelled, and all ignored, whose loss and gradients are zeros."""
    case = clustered_case(40, 300, 32, ignored=ignored).to(torch.float32)
    index = VocabularyIndex.build(case.weight, case.hidden_states)
    given = {"filter_eps": 0.0} if screen is None else {"filter_eps": 1e-30, "index": index}
    got = case.run(backend=SmallBlocks(), screen=screen or "auto", **given)
    assert_close(got, case.truth(), 1e-5)
