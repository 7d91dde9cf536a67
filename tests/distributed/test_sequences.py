"""A sequence split over processes: the constraint of the whole one, or an error that says what."""

from __future__ import annotations

import types
from contextlib import nullcontext
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from str_kernels import patch_model
from str_kernels.huggingface import build_reference_cache
from tests.distributed.models import KINDS, Case, Found, assert_right, gradients
from tests.distributed.pool import WORLD
from tests.distributed.splitting import SCHEMES, attending, items, part, told
from tests.distributed.test_fsdp2 import shard
from tests.distributed.test_sweep import SEVERAL, alone

pytestmark = pytest.mark.one_in(4)

LABELS = (3, 9)  # with half of 12 tokens each, one process has no label of the first sequence
PROMPT = (2, 3)  # and the first none at all


def split(
    case: Case,
    scheme: str,
    engine: str = "plain",
    reference: str = "adapter_off",
    starts: Tensor | None = None,
    whole: dict[str, Tensor] | None = None,
    **more: Any,
) -> Found:
    """One step with a part of every sequence, ``more`` of the batch split with it."""
    model = case.model()
    if case.safety is None:
        patch_model(model)
    else:
        patch_model(model, case.safety, positions=case.positions, reference=reference)
    net = DistributedDataParallel(model) if engine == "ddp" else model
    net = shard(model, engine) if engine not in ("ddp", "plain") else net
    with told(scheme), attending(model, scheme, starts):
        batch = {name: x for name, x in {**case.batch(), **more}.items() if x is not None}
        loss = net(**part(batch, scheme), **items(batch), **(whole or {})).loss
        (loss * (1 if engine == "plain" else WORLD)).backward()
    total, found = loss.detach().clone(), gradients(model)
    torch.distributed.all_reduce(total)
    for x in found.values() if engine == "plain" else ():
        torch.distributed.all_reduce(x)
    return Found(total.item(), found)


@pytest.mark.parametrize(
    "positions",
    [
        "all",
        pytest.param("labels", marks=pytest.mark.slow),
        pytest.param(2, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_constraint_is_that_of_the_whole_sequence(ranks, scheme, positions):
    case = Case("kl", positions=positions, labels=LABELS)
    assert_right(ranks.run(split, case, scheme), case.truth())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_part_without_labels_has_its_constraint(ranks, scheme):
    case = Case("mse", labels=PROMPT)
    assert_right(ranks.run(split, case, scheme, "ddp"), case.truth())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_cache_is_looked_up_by_whole_sequences(ranks, scheme, tmp_path):
    case, path = Case("kl", positions=2, labels=LABELS), str(tmp_path / "references")
    tokens = {name: x for name, x in case.batch().items() if name != "labels"}
    build_reference_cache(case.model(), [tokens], path, case.safety)
    assert_right(ranks.run(split, case, scheme, reference=path), alone(case, path))


def test_weights_may_be_of_the_part_or_of_the_whole(ranks):
    """Ulysses' loader splits all that is in a batch; context parallelism what it knows."""
    case = Case("kl", labels=LABELS)
    mask = case.batch()["attention_mask"]
    weights = torch.rand(mask.shape, generator=torch.Generator().manual_seed(5)) * mask
    want = alone(case, "adapter_off", position_weights=weights)
    assert_right(ranks.run(split, case, "ulysses", position_weights=weights), want)
    assert_right(ranks.run(split, case, "zigzag", whole={"position_weights": weights}), want)


def packed(case: Case) -> dict[str, Tensor]:
    """Two sequences in each row, of 5 and 7 tokens."""
    ids = torch.cat([torch.arange(5), torch.arange(7)]).expand(len(case.labels), -1)
    batch = case.batch()
    labels = batch["input_ids"].clone()
    labels[:, :2] = labels[:, 5:9] = -100
    return {"position_ids": ids, "labels": labels, "attention_mask": None}


@pytest.mark.parametrize("positions", ["all", pytest.param(2, marks=pytest.mark.slow)])
def test_packed_sequences_stay_apart(ranks, positions):
    case = Case("kl", positions=positions, labels=LABELS)
    given = packed(case)
    starts = given["position_ids"] == 0
    found = ranks.run(split, case, "ulysses", starts=starts, **given)
    assert_right(found, alone(case, "adapter_off", use_cache=False, **given))


def test_packed_sequences_in_another_order_are_refused(ranks):
    case = Case(labels=LABELS)
    for error in ranks.errors(split, case, "zigzag", **packed(case)):
        assert "position_ids: some are given twice" in error
        assert "do not pack, or use positions='labels'" in error


def weighed_by_labels(case: Case) -> Found:
    """As transformers does under DeepSpeed: the means of parts, weighed by their labels."""
    from transformers.integrations.deepspeed import deepspeed_sp_compute_loss

    model = case.model()
    patch_model(model, case.safety, positions=case.positions)
    net = DistributedDataParallel(model)
    group = types.SimpleNamespace(get_group=lambda: torch.distributed.group.WORLD)
    accelerator = types.SimpleNamespace(torch_device_mesh={"sp": group})
    config = types.SimpleNamespace(sp_backend="torch", sp_size=WORLD)
    with told("ulysses"), attending(model, "ulysses"):
        batch = part(case.batch(), "ulysses")
        loss = deepspeed_sp_compute_loss(accelerator, net, batch, False, config)
        loss.backward()
    mean = loss.detach() / WORLD
    torch.distributed.all_reduce(mean)
    return Found(mean.item(), gradients(model))


@pytest.mark.parametrize("labels", [LABELS, PROMPT], ids=str)
@pytest.mark.parametrize("kind", [pytest.param("none", marks=pytest.mark.slow), "kl"])
def test_means_that_are_weighed_by_labels(ranks, kind, labels):
    """A process of prompt alone is left out of them, and its constraint is not."""
    pytest.importorskip("transformers", minversion="5.0")
    case = Case(kind, labels=labels)
    assert_right(ranks.run(weighed_by_labels, case), case.truth())


def evaluated(case: Case, scheme: str) -> dict[str, float]:
    model = case.model().eval()
    patch = patch_model(model, case.safety)
    with told(scheme), attending(model, scheme), torch.no_grad():
        model(**part(case.batch(), scheme))
    return patch.evaluation_meter.take(torch.device("cpu"))


def test_an_evaluation_counts_a_split_sequence_once(ranks):
    """By its loss over all labels, though one process has none."""
    case = Case("mse", labels=PROMPT)
    model = case.model().eval()
    patch = patch_model(model, case.safety)
    loss = model(**case.batch()).loss.item()
    want = patch.evaluation_meter.take()
    for found in ranks.run(evaluated, case, "cp"):
        assert found == pytest.approx(want, rel=1e-5)
        assert found["cross_entropy"] + found["safety_penalty"] == pytest.approx(loss, rel=1e-5)


def refused(case: Case, scheme: str | None, *, grouped: bool = True, left_out: str = "") -> str:
    """The error of a step; some splits are seen by one process alone."""
    model = case.model()
    patch_model(model, case.safety, positions=case.positions)
    batch = part(case.batch(), scheme or "cp")
    batch.pop(left_out, None)
    try:
        with told(scheme, grouped=grouped) if scheme else nullcontext():
            model(**batch)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("scheme", "settings", "named"),
    [
        ("cp", {"grouped": False}, f"cp_size={WORLD}; by no group yet"),
        ("cp", {"left_out": "shift_labels"}, "the labels were not shifted before"),
        ("ulysses", {"left_out": "shift_labels"}, "DeepSpeed's Ulysses; the labels were not"),
        ("cp", {"left_out": "position_ids"}, "position_ids: tell where each part belongs"),
    ],
)
def test_what_tells_too_little_is_refused(ranks, scheme, settings, named):
    for error in ranks.run(refused, Case(positions=2, labels=LABELS), scheme, **settings):
        assert named in error
        assert "positions=2" in error or "position_ids" in error


@pytest.mark.parametrize("positions", ["all", 2])
def test_another_split_is_seen_where_a_part_has_no_beginning(ranks, positions):
    """The first process cannot know; the others end the run."""
    first, second = ranks.run(refused, Case(positions=positions, labels=LABELS), None)
    assert first == ""
    assert "no position id is 0" in second
    assert "use positions='labels'" in second


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("engine", ["plain", "ddp", "root", "alone"])
def test_no_wrong_value(ranks, engine, scheme, tmp_path):
    """Every kind, position and reference; an even, an empty and a crowded half."""
    for kind, positions, labels in product(
        KINDS[1:], ("all", "labels", 2), (LABELS, PROMPT, (11, 0))
    ):
        case = Case(kind, positions=positions, labels=labels)
        assert_right(ranks.run(split, case, scheme, engine), case.truth(), gradient=SEVERAL)
        path = str(tmp_path / f"{kind}{positions}{labels[0]}")
        tokens = {name: x for name, x in case.batch().items() if name != "labels"}
        build_reference_cache(case.model(), [tokens], path, case.safety)
        found = ranks.run(split, case, scheme, engine, path)
        assert_right(found, alone(case, path), gradient=SEVERAL)
