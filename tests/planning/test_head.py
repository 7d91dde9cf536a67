"""The head's part of a plan beside what is measured at the allocator."""

from __future__ import annotations

import pytest
import torch

from str_kernels import VocabularyIndex
from str_kernels.bench.memory import peak_bytes
from str_kernels.planning.head import HeadShape, building_bytes


@pytest.mark.parametrize(
    ("vocabulary", "width"),
    [(16384, 64), (8192, 1024), pytest.param(65536, 128, marks=pytest.mark.slow)],
)
def test_building_the_index_takes_what_is_counted(vocabulary, width):
    """Blocks of rows take the most, the directions of wide rows, or splitting many rows."""
    weight = torch.randn(vocabulary, width)
    states = torch.randn(256, width)
    device = torch.device("cpu")
    peak = peak_bytes(lambda: VocabularyIndex.build(weight, states), device).peak
    assert building_bytes(HeadShape(weight, 0, "cpu")) == pytest.approx(peak, rel=0.1)
