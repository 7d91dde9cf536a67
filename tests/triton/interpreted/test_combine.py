"""The kernels around the expensive ones: a row gradient in one pass, and the plan of chunks."""

from __future__ import annotations

import pytest
import torch

from str_kernels.backends.triton.combine import combine_rows as combine
from str_kernels.backends.triton.route import plan_chunks
from str_kernels.engine.contract import Block, Head, OpenRows, RowShares
from str_kernels.engine.rows import combine_rows
from str_kernels.options import LossOptions


@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("also", [None, 1, 2])
@pytest.mark.parametrize("silent", [False, True])
def test_it_is_what_torch_makes_of_the_same(hidden_dtype, parts, also, silent):
    """More columns than a block and no multiple of it; W in fp32; NaN in a silent row."""
    rows, dim, vocab = 7, 1300, 40
    g = torch.Generator().manual_seed(parts)

    def random(*shape):
        return torch.randn(*shape, generator=g)

    head = Head(random(rows, dim).to(hidden_dtype), random(vocab, dim), None)
    labels = torch.tensor([3, -1, 0, 39, 5, -1, 3])
    live, dead = random(rows, dim), random(rows, dim).bfloat16() if parts == 2 else None
    live[1] = float("nan")
    shares = RowShares(
        random(rows),
        torch.where(labels < 0, 0.0, random(rows)),
        None if also is None else random(*((rows, dim) if also == 2 else (dim,))),
        labels < 0 if silent else None,
    )
    whole = OpenRows(live, dead, random(rows))
    block = Block(head, labels, None, LossOptions())
    got = combine(block, whole, shares)
    want = combine_rows(block, whole, shares, spare=False)
    assert got.dtype == want.dtype
    assert not silent or not got[labels < 0].any()
    close = {"rtol": 1e-2, "atol": 1e-2} if hidden_dtype == torch.bfloat16 else {}
    torch.testing.assert_close(got, want, equal_nan=True, **close)


@pytest.mark.slow
def test_a_long_plan():
    """More tiles than are added up at once, and more chunks of a tile than are written at once."""
    g = torch.Generator().manual_seed(0)
    counts = torch.randint(0, 3, (1500,), generator=g, dtype=torch.int32)
    counts[700] = 300
    plan = plan_chunks(counts, 300, 8)
    number = int(plan[0, 0])
    want = [
        [tile, tile * 300 + first, tile * 300 + min(first + 8, count)]
        for tile, count in enumerate(counts.tolist())
        for first in range(0, count, 8)
    ]
    assert plan[1 : 1 + number].tolist() == want
