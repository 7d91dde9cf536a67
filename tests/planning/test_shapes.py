"""`Shapes` answers for torch: new tensors as it would make them, and nothing that has an alias."""

from __future__ import annotations

import pytest
import torch

from str_kernels.planning.shapes import Shapes

aten = torch.ops.aten
X = torch.empty(6, 4, dtype=torch.int64, device="meta")
HALF = torch.empty(4, 6, dtype=torch.float16, device="meta").t()
CALLS = [
    (aten.mul.Tensor, (X, 2), {}),
    (aten.mul.Tensor, (X, 2.0), {}),  # equal to 2, and makes floating point
    (aten.mul.Tensor, (X, HALF), {}),
    (aten.empty_like.default, (HALF,), {}),  # keeps strides
    (aten.empty_like.default, (HALF,), {"memory_format": torch.contiguous_format}),
    (aten.cat.default, ([HALF, HALF], 1), {}),
    (aten.topk.default, (HALF, 2), {}),
    (aten.sum.dim_IntList, (HALF, [0]), {"dtype": torch.float64}),
    (aten.sum.dim_IntList, (HALF, [0]), {"dtype": None}),
    (aten.arange.default, (7,), {"device": torch.device("meta")}),
]


def test_results_are_torchs():
    """Shapes, strides and dtypes, the second time as the first; each is a tensor of its own."""
    shapes, kept = Shapes(), []
    for function, args, kwargs in (*CALLS, *CALLS):
        got, want = shapes.run(function, args, kwargs), function(*args, **kwargs)
        assert type(got) in (type(want), tuple)
        for a, b in zip(_listed(got), _listed(want), strict=True):
            assert (a.shape, a.stride(), a.dtype, a.device) == (
                b.shape,
                b.stride(),
                b.dtype,
                b.device,
            )
            kept.append(a)
    assert len({x.untyped_storage()._cdata for x in kept}) == len(kept)


@pytest.mark.parametrize(
    ("function", "args"), [(aten.t.default, (HALF,)), (aten.add_.Tensor, (HALF, 1.0))]
)
def test_an_alias_is_no_new_tensor(function, args):
    """A view and an operand that is written have the storage that they had."""
    shapes = Shapes()
    for _ in range(2):
        made = shapes.run(function, args, {})
        assert made.untyped_storage()._cdata == HALF.untyped_storage()._cdata


def _listed(made):
    return made if isinstance(made, (tuple, list)) else [made]
