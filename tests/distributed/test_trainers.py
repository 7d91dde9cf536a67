"""transformers' and TRL's trainers with two processes, over DDP."""

from __future__ import annotations

import pytest

from tests.distributed.models import KINDS, Case, assert_right
from tests.distributed.trainers import train, train_by_trl, train_sharded

pytestmark = pytest.mark.one_in(4)

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


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["none", "kl"])
def test_accelerate_s_fsdp2(ranks, kind, tied):
    """It groups the head with the last norm, and tied with the embedding too."""
    case = Case(kind, tied=tied, labels=UNEVEN)
    found = ranks.run(train_sharded, case, {"reshard_after_forward": True})
    assert_right(found, case.truth())
    for mine in found:
        parts = mine.more["cross_entropy"] + mine.more["safety_penalty"]
        assert parts == pytest.approx(mine.loss, rel=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        {"reshard_after_forward": False},
        {"cpu_ram_efficient_loading": True},
        {"activation_checkpointing": True},
    ],
    ids=str,
)
def test_settings_of_accelerate_s_fsdp2(ranks, config):
    case = Case("mse", labels=UNEVEN)
    assert_right(ranks.run(train_sharded, case, config), case.truth())


def test_accelerate_s_fsdp2_with_a_trained_head(ranks):
    case = Case("none", trained_head=True, labels=UNEVEN)
    assert_right(ranks.run(train_sharded, case, {}), case.truth())


@pytest.mark.parametrize("kind", [pytest.param("none", marks=pytest.mark.slow), "kl"])
def test_an_sft_trainer_with_fsdp2(ranks, kind):
    pytest.importorskip("trl")
    case = Case(kind, labels=UNEVEN)
    assert_right(ranks.run(train_sharded, case, {}, by_trl=True), case.truth())
