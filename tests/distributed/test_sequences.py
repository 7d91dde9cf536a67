"""A sequence split over processes: right by its labels, refused where a weight needs all of it."""

from __future__ import annotations

import sys
import types
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from str_kernels import patch_model
from tests.distributed.models import Case, Found, assert_right, gradients
from tests.distributed.pool import WORLD


@dataclass(frozen=True)
class Unattentive(Case):
    """No token sees another, so that any split of a sequence is exact."""

    labels: tuple[int, ...] = (4, 9)

    def model(self) -> nn.Module:
        model = super().model()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "v_proj" in name and "lora_A" not in name:
                    parameter.zero_()
                if "v_proj" in name or "q_proj" in name:
                    parameter.requires_grad_(False)
        return model


def parts(case: Case, rank: int, *, numbered: bool) -> dict[str, Tensor]:
    """A half of every sequence, with the labels of the whole ones."""
    batch = case.batch()
    batch["shift_labels"] = nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:]
    if numbered:
        batch["position_ids"] = torch.arange(batch["labels"].shape[1]).expand_as(batch["labels"])
    half = batch["labels"].shape[1] // WORLD
    mine = slice(rank * half, (rank + 1) * half)
    return {name: x[:, mine].contiguous() for name, x in batch.items()}


def split(case: Case, *, numbered: bool = True, config: Any = None, ulysses: bool = False) -> Found:
    from accelerate.state import AcceleratorState

    deepspeed = "deepspeed.runtime.sequence_parallel.parallel_state_sp"
    if config is not None:
        AcceleratorState._shared_state["parallelism_config"] = config
    if ulysses:
        sys.modules[deepspeed] = types.SimpleNamespace(_SEQUENCE_PARALLEL_GROUP=object())
    try:
        model = case.model()
        patch_model(model, case.safety, positions=case.positions if case.safety else "all")
        inputs = parts(case, torch.distributed.get_rank(), numbered=numbered)
        loss = model(**inputs, num_items_in_batch=torch.tensor(case.items)).loss
    finally:
        AcceleratorState._shared_state.pop("parallelism_config", None)
        if ulysses:
            del sys.modules[deepspeed]
    loss.backward()
    total, found = loss.detach().clone(), gradients(model)
    for x in (total, *found.values()):
        torch.distributed.all_reduce(x)
    return Found(total.item(), found)


@pytest.mark.parametrize("numbered", [True, False])
@pytest.mark.parametrize("kind", ["none", "kl"])
def test_labels_need_no_whole_sequence(ranks, kind, numbered):
    case = Unattentive(kind, positions="labels")
    assert_right(ranks.run(split, case, numbered=numbered), case.truth())


@pytest.mark.parametrize("positions", ["all", 2])
@pytest.mark.parametrize("kind", ["cp", "sp"])
def test_accelerate_tells_of_its_split(ranks, kind, positions):
    from accelerate.parallelism_config import ParallelismConfig

    config = ParallelismConfig(**{f"{kind}_size": WORLD})
    errors = ranks.errors(split, Unattentive(positions=positions), config=config)
    for error in errors:
        assert f"positions={positions!r}" in error
        assert f"{kind}_size={WORLD}" in error
        assert "use positions='labels'" in error


def test_ulysses_tells_of_its_split(ranks):
    """A stand-in for DeepSpeed's module, which holds the group."""
    for error in ranks.errors(split, Unattentive(), ulysses=True):
        assert "DeepSpeed's Ulysses" in error


def its_error(case: Case) -> str | None:
    try:
        patch = patch_model(case.model(), case.safety, positions=case.positions)
        patch.model(**parts(case, torch.distributed.get_rank(), numbered=True))
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize("positions", ["all", 2])
def test_another_split_is_seen_where_a_part_has_no_beginning(ranks, positions):
    """The first process cannot know; the others end the run."""
    first, second = ranks.run(its_error, Unattentive(positions=positions))
    assert first is None
    assert "no position id is 0" in second
