"""What processes decide together: one index, one fallback, one log."""

from __future__ import annotations

import sys
import types
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from str_kernels import patch_model, vocabulary
from str_kernels.huggingface.patch import filtering, guard
from str_kernels.vocabulary import VocabularyIndex
from tests.distributed.models import Case, assert_right
from tests.distributed.test_fsdp2 import shard
from tests.distributed.test_trainers import UNEVEN
from tests.distributed.trainers import train

pytestmark = pytest.mark.one_in(4)


@pytest.mark.parametrize("labels", [UNEVEN, (0, 0, 8, 9)])
def test_logs_are_the_batch_s_in_every_process(ranks, labels):
    """A process without labels logs what the others do, and the parts add up to the loss."""
    case = Case("mse", labels=labels)
    found = ranks.run(train, case)
    assert_right(found, case.truth())
    for mine in found:
        parts = mine.more["cross_entropy"] + mine.more["safety_penalty"]
        assert parts == pytest.approx(mine.loss, rel=1e-5)
        assert mine.more["safety_penalty"] == found[0].more["safety_penalty"] > 0


def indexed(case: Case, wrapper: str) -> dict[str, Any]:
    """Three steps with a vocabulary that is large enough, as far as this run is concerned."""
    counts = {"builds": 0, "passes": 0}
    build, means = VocabularyIndex.build, filtering.tile_means
    small, share = filtering.SMALLEST_VOCABULARY, filtering.LARGEST_LIVE_SHARE

    def counted_build(*args: Any, **kwargs: Any) -> VocabularyIndex:
        counts["builds"] += 1
        return build(*args, **kwargs)

    def counted_means(*args: Any) -> torch.Tensor:
        counts["passes"] += 1
        return means(*args)

    VocabularyIndex.build, filtering.tile_means = counted_build, counted_means
    filtering.SMALLEST_VOCABULARY, filtering.LARGEST_LIVE_SHARE = 32, 1.0
    few, hot = vocabulary._HOT_TILES, vocabulary._HOT_SHARE
    vocabulary._HOT_TILES, vocabulary._HOT_SHARE = 4, 0.0  # some tiles are hot
    try:
        model = case.model()
        patch = patch_model(model, case.safety)
        with zero(model) if wrapper == "zero" else nullcontext(model) as net:
            if wrapper != "zero":
                net = DistributedDataParallel(model) if wrapper == "ddp" else shard(model, wrapper)
            for _ in range(3):
                net(**case.share(torch.distributed.get_rank())).loss.backward()
    finally:
        VocabularyIndex.build, filtering.tile_means = build, means
        filtering.SMALLEST_VOCABULARY, filtering.LARGEST_LIVE_SHARE = small, share
        vocabulary._HOT_TILES, vocabulary._HOT_SHARE = few, hot
    parts = {name: getattr(patch._source._index, name) for name in ("order", "columns", "hot")}
    return {**counts, **{name: part.tolist() for name, part in parts.items()}}


@contextmanager
def zero(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """A stand-in for DeepSpeed's ZeRO: what it marks parameters with, and where its group is."""
    for parameter in model.parameters():
        parameter._hp_mapping = None
    groups = types.SimpleNamespace(
        _get_sequence_data_parallel_group=lambda: torch.distributed.group.WORLD
    )
    sys.modules["deepspeed.utils.groups"] = groups
    try:
        yield model
    finally:
        del sys.modules["deepspeed.utils.groups"]


@pytest.mark.parametrize("wrapper", ["ddp", "root", "only", "alone", "norm", "zero"])
def test_one_index(ranks, wrapper):
    """The first process clusters, once; wherever FSDP puts the weight, nobody looks again."""
    first, second = ranks.run(indexed, Case(vocab=1000), wrapper)
    assert first["order"] == second["order"] != sorted(first["order"])
    assert first["columns"] == second["columns"]
    assert first["hot"] == second["hot"] == [0]
    assert (first["builds"], second["builds"]) == (1, 0)
    assert (first["passes"], second["passes"]) == (0, 0)


def dropped(case: Case) -> bool:
    """Whether the index is dropped by processes of which one alone has labels."""
    small, share = filtering.SMALLEST_VOCABULARY, filtering.LARGEST_LIVE_SHARE
    filtering.SMALLEST_VOCABULARY, filtering.LARGEST_LIVE_SHARE = 32, 0.0
    try:
        model = case.model()
        # by name, because so few rows are not filtered by themselves
        patch = patch_model(model, case.safety, filter_eps=2**-11)
        DistributedDataParallel(model)(**case.share(torch.distributed.get_rank()))
    finally:
        filtering.SMALLEST_VOCABULARY, filtering.LARGEST_LIVE_SHARE = small, share
    return patch._source._index is None


def test_an_index_is_dropped_by_all(ranks):
    assert ranks.run(dropped, Case(vocab=1000, labels=(0, 0, 8, 9))) == [True, True]


class Report:
    """A finding that is bad in the second process alone."""

    acceptable = False


def guarded(case: Case) -> tuple[str, list[str]]:
    rank, real = torch.distributed.get_rank(), guard.check_accuracy
    guard.check_accuracy = lambda *args, **kwargs: Report() if rank else None
    try:
        model = case.model()
        patch = patch_model(model, case.safety, check_accuracy_every=1)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            DistributedDataParallel(model)(**case.share(rank))
    finally:
        guard.check_accuracy = real
    found = [str(w.message) for w in said if "less accurate" in str(w.message)]
    return patch.options.screen, found


def test_the_guard_falls_back_in_all(ranks):
    """What one process finds, all change; the first one alone warns."""
    (first, said), (second, unsaid) = ranks.run(guarded, Case("none"))
    assert first == second == "exact"
    assert len(said) == 1
    assert unsaid == []
