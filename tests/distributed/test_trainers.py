"""transformers' and TRL's trainers with two processes, over DDP."""

from __future__ import annotations

import pytest

from tests.distributed.models import KINDS, Case, assert_right
from tests.distributed.trainers import train, train_by_trl

UNEVEN = (1, 2, 8, 9, 3, 3, 10, 4)


@pytest.mark.parametrize("kind", ["none", "kl"])
def test_a_trainer(ranks, kind):
    """Uneven labels, and several forwards in a step."""
    case = Case(kind, labels=UNEVEN)
    assert_right(ranks.run(train, case), case.truth())


@pytest.mark.parametrize("kind", KINDS)
def test_an_sft_trainer(ranks, kind):
    """DDP clones the outputs, because of the adapters."""
    pytest.importorskip("trl")
    case = Case(kind, labels=UNEVEN)
    assert_right(ranks.run(train_by_trl, case), case.truth())
