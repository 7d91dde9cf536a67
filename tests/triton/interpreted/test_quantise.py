"""Rows in 8 bits on the device: the numbers of ``quantise_rows``, kept by an index or made anew."""

from __future__ import annotations

import pytest
import torch

from str_kernels import VocabularyIndex
from str_kernels.backends.torch import TorchBackend
from str_kernels.backends.triton import TritonBackend
from str_kernels.backends.triton.quantise import quantised
from str_kernels.engine.contract import Block, Head, Tiles
from str_kernels.engine.forward import tiles_of
from str_kernels.options import TILE, LossOptions
from str_kernels.quantise import EIGHT_BITS, balance, quantise_rows
from tests.backends.test_routed import clustered_case


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


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_so(value):
    """Its row's scale is no number, and no other's: the guard sees it in the log-sum-exp."""
    rows = torch.randn(6, 33)
    rows[2, 5] = value
    _, scales = quantised(rows, torch.int8)
    assert scales.isfinite().tolist() == [row != 2 for row in range(6)]


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
