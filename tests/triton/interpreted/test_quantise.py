"""Rows in 8 bits on the device: the numbers of ``quantise_rows``, kept by an index or made anew."""

from __future__ import annotations

import pytest
import torch

from str_kernels import VocabularyIndex
from str_kernels.backends.torch import TorchBackend
from str_kernels.backends.triton import TritonBackend, screen
from str_kernels.backends.triton.quantise import quantised
from str_kernels.engine.contract import Block, Head, Tiles
from str_kernels.engine.forward import tiles_of
from str_kernels.options import TILE, LossOptions
from str_kernels.quantise import EIGHT_BITS, balance, quantise_rows
from tests.backends.test_routed import clustered_case, index_of
from tests.cpus import set_cpu
from tests.oracle import assert_close
from tests.triton.interpreted.test_truth import TOLERANCE


@pytest.mark.parametrize("dtype", EIGHT_BITS.values(), ids=str)
@pytest.mark.parametrize(("count", "dim"), [(1, 1), (7, 77), (130, 64), (5, 2050)])
def test_the_numbers(count, dim, dtype):
    """As torch rounds; a row of zeros and one of huge numbers among them."""
    rows = torch.randn(count, dim, generator=torch.Generator().manual_seed(dim)).bfloat16()
    rows[0] = 0.0
    rows[-1] *= 1e30
    (eight, scales), (want, want_scales) = quantised(rows, dtype), quantise_rows(rows, dtype)
    torch.testing.assert_close(scales, want_scales, rtol=1e-6, atol=0.0)
    differ = (eight.float() - want.float()).abs()
    if dtype == torch.int8:
        # where a product lies on the edge between two numbers, its last bit decides
        assert (differ > 0).float().mean() < 0.02
        assert differ.max() <= 1.0
    else:  # the interpreter loses the carry that rounds 127 to 128; a GPU's numbers: test_gpu.py
        near = differ <= (want.float().abs() / 8).clamp(min=2.0**-6)
        assert near.float().mean() > 0.95


def test_through_an_order():
    """Places of the order, from anywhere to the end of the vocabulary; columns scaled first."""
    rows, columns = torch.randn(300, 40), torch.rand(40) + 0.1
    order = torch.randperm(300)
    eight, scales = quantised(
        rows, torch.int8, order=order, places=range(128, 300), columns=columns
    )
    want, want_scales = quantise_rows(rows[order[128:]], torch.int8, columns)
    torch.testing.assert_close(scales, want_scales, rtol=1e-6, atol=0.0)
    differ = (eight.float() - want.float()).abs()
    assert differ.max() <= 1.0
    assert (differ > 0).float().mean() < 0.02


@pytest.mark.parametrize("dtype", EIGHT_BITS.values(), ids=str)
@pytest.mark.parametrize(("dim", "width"), [(24, 32), (77, 80), (1030, 1040)])
def test_rows_that_are_padded(dim, width, dtype):
    """The same numbers in wider rows, whose rest is 0."""
    rows, columns = torch.randn(5, dim), torch.rand(dim) + 0.1
    eight, scales = quantised(rows, dtype, columns=columns, width=width)
    plain, same = quantised(rows, dtype, columns=columns)
    assert eight.shape == (5, width)
    assert torch.equal(eight[:, :dim].float(), plain.float())
    assert torch.equal(scales, same)
    assert not eight[:, dim:].float().any()


@pytest.mark.parametrize(("dim", "width"), [(24, 32), (77, 80)])
def test_a_hidden_size_that_is_no_multiple_of_16(dim, width, monkeypatch):
    """Rows made in a call are padded; loss and gradients are those of the truth."""
    case = clustered_case(40, 300, dim, bias=True, ignored=0.2).to(torch.bfloat16)
    index = index_of(case)
    widths = []
    real = screen._screen

    def seen(given, *rest):
        if given.hidden.element_size() == 1:
            widths.append(given.weight.shape[1])
        real(given, *rest)

    monkeypatch.setattr(screen, "_screen", seen)
    got = case.run(backend=TritonBackend(), screen="int8", index=index, filter_eps=1e-30)
    assert_close(got, case.truth(), TOLERANCE[torch.bfloat16])
    assert widths == [width]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_so(value):
    """Its row's scale is no number, and no other's: the guard sees it in the log-sum-exp."""
    rows = torch.randn(6, 33)
    rows[2, 5] = value
    _, scales = quantised(rows, torch.int8)
    assert scales.isfinite().tolist() == [row != 2 for row in range(6)]


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"bias": True, "softcap": 5.0}], ids=str)
@pytest.mark.parametrize("ordered", [False, True])
def test_rows_made_anew_are_those_an_index_keeps(options, ordered, backend):
    """Some tiles at a time, the last of them ragged; masses and slopes are the same."""
    case = clustered_case(40, 5 * TILE + 19, 72, **options).to(torch.bfloat16)
    index = VocabularyIndex.build(case.weight, case.hidden_states if ordered else None)
    order, inverse = (index.order, index.inverse) if ordered else (None, None)
    rows = case.weight if order is None else case.weight[order]
    columns = index.columns if ordered else None
    rows = quantised(rows, torch.int8, columns=columns)
    kept = Tiles(order, inverse, index.mean_rows, *rows, columns)
    head = Head(case.hidden_states, case.weight, case.bias)
    anew = kept._replace(quantised=None, row_scales=None)
    small = TritonBackend(byte_budget=8 * TILE * 72)
    settings = LossOptions(softcap=options.get("softcap"))
    got = small.screen(Block(head, case.labels, anew, settings), "int8")
    want = backend.screen(Block(head, case.labels, kept, settings), "int8")
    for one, other in zip(got, want, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)


@pytest.mark.slow
@pytest.mark.parametrize("ignored", [0.0, 0.2], ids=["every row", "some rows"])
def test_w_is_quantised_once_a_call(monkeypatch, ignored):
    """Blocks of rows are screened together, some tiles at a time, and routed one by one."""
    case = clustered_case(300, 2 * TILE + 19, 32, ignored=ignored, softcap=5.0).to(torch.bfloat16)
    index = VocabularyIndex.build(case.weight, case.hidden_states)
    counted, real = [], screen.quantised
    monkeypatch.setattr(screen, "quantised", lambda *a, **k: counted.append(k) or real(*a, **k))
    backend = TritonBackend(byte_budget=1 << 14)
    monkeypatch.setattr(TritonBackend, "screen_rows", lambda *_: 512)
    arguments = {"index": index, "screen": "int8", "filter_eps": 2.0**-11}
    got = case.run(backend=backend, **arguments)
    places = [k["places"] for k in counted if "places" in k]
    groups = -(-int((case.labels >= 0).sum()) // 512)
    assert len(places) > groups  # some tiles at a time
    assert sum(map(len, places)) == groups * len(case.weight)
    monkeypatch.setattr(TritonBackend, "screen_rows", lambda self, head, size, screen: size)
    assert_close(got, case.run(backend=backend, **arguments), 1e-6)


def test_rows_screened_together_stay_within_the_budget():
    """Their masses and rows of H take half of it at most; without 8 bits a block is screened."""
    head = Head(torch.empty(8192, 4096), torch.empty(128256, 4096, device="meta"), None)
    backend = TritonBackend()
    size = backend.row_block(head, 8192, routed=True)
    assert backend.screen_rows(head, size, "exact") == size < 8192
    together = backend.screen_rows(head, size, "int8")
    assert together >= 8192  # all of them at the shape that the launch table is made for
    assert together % size == 0
    assert together * (4096 + 4 * 1002) <= backend.byte_budget / 2


@pytest.mark.parametrize("name", ["exact", "int8"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scale", [3.0, -0.7])
def test_scaled_logits(scale, bias, name, backend, monkeypatch):
    """A scale of either sign, which the screen multiplies into the words' own; the end of V."""
    set_cpu(monkeypatch, int8=True)  # whose products of bf16 are made in fp32
    case = clustered_case(40, 2 * TILE + 19, 32, bias=bias).to(torch.bfloat16)
    tiles = tiles_of(case.weight, index_of(case), fresh=False)
    head = Head(case.hidden_states, case.weight, case.bias)
    block = Block(head, case.labels.clamp(min=-1), tiles, LossOptions(logit_scale=scale))
    got, want = (one.screen(block, name).log_mass for one in (backend, TorchBackend()))
    torch.testing.assert_close(got, want, rtol=0.0, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"softcap": 5.0}], ids=str)
@pytest.mark.parametrize("ordered", [False, True])
def test_columns_are_balanced_as_a_cpu_does(options, ordered):
    """Rows made anew, some tiles at a time: the torch backend's masses and slopes."""
    case = clustered_case(40, 5 * TILE + 19, 72, **options).to(torch.bfloat16)
    case.hidden_states[:, 5] *= 20
    index = VocabularyIndex.build(case.weight, case.hidden_states) if ordered else None
    head = Head(case.hidden_states, case.weight, None)
    columns = balance(case.hidden_states, case.weight)
    tiles = tiles_of(case.weight, index, fresh=False)._replace(columns=columns)
    settings = LossOptions(softcap=options.get("softcap"))
    block = Block(head, case.labels, tiles, settings)
    got = TritonBackend(byte_budget=8 * TILE * 72).screen(block, "int8")
    want = TorchBackend().screen(block, "int8")
    torch.testing.assert_close(got.log_mass, want.log_mass, rtol=0.0, atol=1e-4)
    assert (got.slope is None) == (want.slope is None)
    if got.slope is not None:
        torch.testing.assert_close(got.slope, want.slope, rtol=0.0, atol=1e-4)
