"""Each stage of the Triton backend beside the torch backend's, from the same inputs."""

from __future__ import annotations

import pytest
import torch

from str_kernels import VocabularyIndex, linear_cross_entropy
from str_kernels.backends.selection import DEFAULT_EPS
from str_kernels.backends.torch import TorchBackend
from str_kernels.backends.triton import TritonBackend
from str_kernels.backends.triton.launch import launch_for
from str_kernels.backends.triton.route import plan_chunks
from str_kernels.engine.contract import Block, Coefficients, Head, SafetyTerm, Saved, Tiles, Wanted
from str_kernels.engine.finish import join_pairs
from str_kernels.engine.forward import tiles_of
from str_kernels.options import TILE, LossOptions
from tests.backends.test_routed import clustered_case, index_of
from tests.oracle import relative_error

ALL = Wanted(hidden=True, masses=True, entropy=False)
TOLERANCE = 1e-5  # both in fp32, sums in another order


@pytest.fixture(params=[{}, {"softcap": 5.0, "bias": True, "logit_scale": 0.7}], ids=str)
def setting(request):
    """Head, labels, tiles and options of a clustered case in fp32."""
    options = dict(request.param)
    case = clustered_case(70, 900, **options).to(torch.float32)
    index = index_of(case)
    tiles = Tiles(index.order, index.inverse, index.mean_rows)
    options.pop("bias", None)
    head = Head(case.hidden_states, case.weight, case.bias)
    labels = case.labels.masked_fill(case.labels < 0, -1)
    return Block(head, labels, tiles, LossOptions(**options))


def test_screen(setting, backend):
    """Log-masses, and with a softcap the tiles' mean slopes."""
    want = TorchBackend().screen(setting, "exact")
    got = backend.screen(setting, "exact")
    torch.testing.assert_close(got.log_mass, want.log_mass, rtol=TOLERANCE, atol=TOLERANCE)
    if want.slope is not None:
        torch.testing.assert_close(got.slope, want.slope, rtol=1e-4, atol=TOLERANCE)


@pytest.mark.parametrize("eps", [1e-30, DEFAULT_EPS, 0.1])
def test_route(setting, eps, backend):
    """The same pairs live, listed tile by tile in ascending order; the same dead shares."""
    masses = TorchBackend().screen(setting, "exact")
    want = TorchBackend().route(setting, masses, eps)
    copy = masses._replace(log_mass=masses.log_mass.clone())
    got = backend.route(setting, copy, eps)
    assert torch.equal(got.live(), want.live())
    assert torch.equal(got.counts.long(), want.counts)
    lists = [row[:count] for row, count in zip(got.rows, got.counts.tolist(), strict=True)]
    assert torch.equal(torch.cat(lists).long(), want.rows)
    torch.testing.assert_close(got.shift, want.shift)
    torch.testing.assert_close(got.dead, want.dead, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("deterministic", [False, True])
def test_refine(setting, deterministic):
    """Masses, expected rows and largest logits of the live pairs, with and without atomics."""
    reference, backend = TorchBackend(), TritonBackend(1 << 16)
    torch_work = reference.route(setting, reference.screen(setting, "exact"), 0.01)
    want = reference.refine(setting, torch_work, ALL)
    work = backend.route(setting, backend.screen(setting, "exact"), 0.01)
    torch.use_deterministic_algorithms(deterministic)
    try:
        got = backend.refine(setting, work, ALL)
    finally:
        torch.use_deterministic_algorithms(False)
    for name in ("mass", "expected", "maximum"):
        torch.testing.assert_close(
            getattr(got, name), getattr(want, name), rtol=1e-4, atol=1e-5, msg=name
        )
    without = backend.refine(setting, work, ALL._replace(hidden=False))
    assert without.expected is None
    torch.testing.assert_close(without.mass, want.mass, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("products", ["blas", "triton"])
def test_exact(setting, products):
    """Every field of ``Dense``, by either pass."""
    backend = TritonBackend(exact=products)
    wanted = Wanted(hidden=True, masses=False, entropy=True)
    want = TorchBackend().exact(setting._replace(tiles=None), wanted)
    got = backend.exact(setting._replace(tiles=None), wanted)
    opened = [dense.opened.scale[:, None] * dense.opened.live for dense in (got, want)]
    torch.testing.assert_close(*opened, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.open_mass, want.open_mass, rtol=1e-4, atol=1e-5)
    got, want = got.statistics, want.statistics
    for name in ("lse", "entropy", "dead_mass"):
        torch.testing.assert_close(
            getattr(got, name), getattr(want, name), rtol=1e-4, atol=1e-5, msg=name
        )
    assert torch.equal(got.correct, want.correct)


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("routed", [True, False])
@pytest.mark.parametrize("smoothed", [True, False])
def test_weight_gradients(setting, routed, needs, smoothed):
    """From the same saved state, α, γ, σ and safety term; rows without a gradient stay silent."""
    head, labels, tiles, options = setting[:4]
    if head.bias is None:
        head = head._replace(bias=torch.zeros(head.weight.shape[0]))
    reference, backend = TorchBackend(), TritonBackend(1 << 18)
    if routed:
        block = Block(head, labels, tiles, options)
        masses = reference.screen(block, "exact")
        work = reference.route(block, masses, DEFAULT_EPS)
        dense = join_pairs(block, masses, work, reference.refine(block, work, ALL), ALL)
    else:
        block = Block(head, labels, None, options)
        dense = reference.exact(block, ALL)
    g = torch.Generator().manual_seed(0)
    alpha = torch.randn(70, generator=g) * 1e-6  # a mean over a long batch
    alpha[::5] = 0.0
    sigma = alpha * 1e-3 if smoothed else None
    coefficients = Coefficients(alpha, torch.where(labels < 0, 0.0, 0.9 * alpha), sigma)
    head.hidden_states[0, 0] = float("inf")  # silent, so it must not show ...
    head.hidden_states[0, 0] = 1e30  # ... but inf · 0 would, in any GEMM
    ids = torch.tensor([5, 130, 877])
    safety = SafetyTerm(ids, torch.randn(3, head.weight.shape[1], generator=g) * 1e-6, alpha[1:4])
    lse, rest = dense.statistics[:2]
    saved = Saved(lse, rest, dense.open_mass, dense.masses, dense.slope, None)
    got, want = (
        one.weight_gradients(block, saved, coefficients, safety=safety, needs=needs)
        for one in (backend, reference)
    )
    for mine, other in zip(got, want, strict=True):
        assert (mine is None) == (other is None)
        assert other is None or relative_error(mine, other) < 1e-4


def test_plan_covers_every_live_row_once():
    """Chunks of a tile's rows: none empty, none overlapping, none missing; their number."""
    counts = torch.tensor([0, 3, 64, 65, 0, 200, 1], dtype=torch.int32)
    plan = plan_chunks(counts, 200, 64)
    number = int(plan[0, 0])
    assert number == 0 + 1 + 1 + 2 + 0 + 4 + 1
    covered = [set() for _ in counts]
    for tile, first, stop in plan[1 : 1 + number].tolist():
        chunk = set(range(first - tile * 200, stop - tile * 200))
        assert 0 < len(chunk) <= 64
        assert not chunk & covered[tile]
        covered[tile] |= chunk
    assert [len(rows) for rows in covered] == counts.tolist()


@pytest.mark.parametrize(("screen", "cost"), [("exact", 1.0), ("int8", 0.5)])
def test_counted_work_of_a_frozen_head(screen, cost, backend, dot_flops):
    """Forward and backward are one screen and twice the live share, padding included.

    Counted inside ``tl.dot``, 8-bit operations at half. A chunk of live rows is padded to the
    launch's rows, so that a tile with a live row costs at most one chunk more than its rows.
    """
    case = clustered_case(256, 2048, 128, ignored=0.0).to(torch.float16)
    index = VocabularyIndex.build(
        case.weight, case.hidden_states, screen=None if screen == "exact" else screen
    )
    head = Head(case.hidden_states, case.weight, None)
    tiles = tiles_of(case.weight, index, fresh=False)
    block = Block(head, case.labels, tiles, LossOptions())
    counts = backend.route(block, backend.screen(block, screen), DEFAULT_EPS).counts
    chunk = launch_for(0, "refine", torch.float16).block_r
    padded = (-(-counts // chunk) * chunk).sum().item() * TILE / (256 * 2048)
    live = counts.sum().item() * TILE / (256 * 2048)
    assert live < padded <= live + chunk * len(counts) * TILE / (256 * 2048)
    arguments = {"screen": screen, "index": index, "filter_eps": DEFAULT_EPS}
    want = cost + 16 / 2048 + 2.0 * padded  # the anchors' columns
    assert _work(case, backend, dot_flops, **arguments) == pytest.approx(want)


def test_counted_work_of_the_exact_path(dot_flops):
    """Two GEMMs forward and backward with a frozen head: logits once, expected rows once."""
    case = clustered_case(128, 512, 64, ignored=0.0).to(torch.float16)
    backend = TritonBackend(exact="triton")
    assert _work(case, backend, dot_flops, filter_eps=0.0) == pytest.approx(2.0)


def _work(case, backend, dot_flops, **arguments):
    """GEMMs of one forward and backward by the hidden states."""
    dot_flops["flops"] = 0
    hidden = case.hidden_states.clone().requires_grad_()
    loss = linear_cross_entropy(hidden, case.weight, case.labels, backend=backend, **arguments)
    loss.backward()
    return dot_flops["flops"] / (2 * len(hidden) * case.weight.numel())
