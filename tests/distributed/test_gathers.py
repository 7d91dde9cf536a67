"""How often FSDP2 gathers a head of its own group, and that what it spares is not needed."""

from __future__ import annotations

from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from str_kernels import patch_model
from str_kernels.engine import autograd
from tests.distributed.models import LENGTH, Case, Found, assert_right, gradients, step
from tests.distributed.pool import WORLD
from tests.distributed.test_fsdp2 import shard
from tests.distributed.test_sweep import SEVERAL
from tests.huggingface.dense import constant_cache

pytestmark = pytest.mark.one_in(4)


class Counts(NamedTuple):
    """Gathers of the head's group, and bytes of it when the backward of the loss begins."""

    forward: int
    backward: int
    alive: int


def head_of(model: nn.Module) -> nn.Module:
    return model.get_base_model().get_output_embeddings()


def bytes_of(head: nn.Module) -> int:
    """What this process has of the head beside its own part."""
    group = head._get_fsdp_state()._fsdp_param_group
    buffers = (x for p in group.fsdp_params for x in p.all_gather_outputs)
    return sum(x.untyped_storage().size() for x in buffers)


def counted(case: Case, group: str, monkeypatch: pytest.MonkeyPatch, **more: Any) -> Counts:
    """The second of two steps; the first has no order yet in which FSDP could prefetch."""
    model = case.model()
    if more.pop("fused", True):
        patch_model(model, case.safety, **more)
    shard(model, group, reshard=True)
    head, sizes, alive = head_of(model), [], []
    size = 32 * (case.vocab + (group == "norm"))  # no other group has as many
    name = "all_gather_single"  # until torch 2.12 it had the other name
    name = name if hasattr(torch.distributed, name) else "all_gather_into_tensor"
    real, backward = getattr(torch.distributed, name), autograd.backward_rows

    def all_gather(output_tensor, *args, **kwargs):
        sizes.append(output_tensor.numel())
        return real(output_tensor, *args, **kwargs)

    def backward_rows(*args):
        alive.append(bytes_of(head))
        return backward(*args)

    monkeypatch.setattr(torch.distributed, name, all_gather)
    monkeypatch.setattr(autograd, "backward_rows", backward_rows)
    step(case, model)
    sizes.clear()
    loss = model(**case.share(torch.distributed.get_rank())).loss
    forward = sizes.count(size)
    sizes.clear()
    loss.backward()
    return Counts(forward, sizes.count(size), alive[-1] if alive else -1)


def all_counts(cases: dict[str, tuple]) -> dict[str, Counts]:
    found = {}
    for name, (case, group, more) in cases.items():
        with pytest.MonkeyPatch.context() as monkeypatch:
            found[name] = counted(case, group, monkeypatch, **more)
    return found


def test_a_frozen_head_is_gathered_once_and_not_for_backward(ranks):
    """Once a pass; the head of the unpatched model is gathered twice, and is there in backward."""
    none, whole = Case("none", vocab=100), 4 * 32 * 100
    cases = {
        "unpatched": (none, "alone", {"fused": False}),
        "alone": (none, "alone", {}),
        "reference": (Case("kl", vocab=100), "alone", {}),
        "with the norm": (none, "norm", {}),
        "trained": (Case("none", vocab=100, trained_head=True), "alone", {}),
    }
    for found in ranks.run(all_counts, cases):
        assert found["unpatched"][:2] == (1, 1)
        assert found["alone"] == (1, 0, 0)
        assert found["reference"] == (2, 0, 0)
        assert found["with the norm"] == (1, 1, whole + 4 * 32)  # the norm's backward needs it
        assert found["trained"] == (1, 1, whole)


def with_real_logits(case: Case, order: str) -> Found:
    """A fused loss and one of real logits in one backward."""
    model = case.model()
    if order == "truth":
        batch = {**case.batch(), "num_items_in_batch": torch.tensor(case.items)}
    else:
        batch = case.share(torch.distributed.get_rank())
        patch_model(model)
        shard(model, "alone", reshard=True)
    plain = {n: x for n, x in batch.items() if n in ("input_ids", "attention_mask")}

    def real() -> torch.Tensor:
        return model(**plain).logits.square().mean(-1).sum() / (len(case.labels) * LENGTH)

    losses = {
        "truth": lambda: model(**batch).loss + real(),
        "real first": lambda: real() + model(**batch).loss,
        "real last": lambda: model(**batch).loss + real(),
    }
    if order == "truth":
        loss = losses["truth"]()
        loss.backward()
        return Found(loss.item(), gradients(model))
    for _ in range(2):
        model.zero_grad()
        loss = losses[order]() * WORLD
        loss.backward()
    mean = loss.detach().clone() / WORLD
    torch.distributed.all_reduce(mean)
    return Found(mean.item(), gradients(model))


@pytest.mark.parametrize("order", ["real first", pytest.param("real last", marks=pytest.mark.slow)])
def test_real_logits_in_the_same_backward(ranks, order):
    """They need the weight, so FSDP gathers it again from then on."""
    case = Case("none")
    assert_right(ranks.run(with_real_logits, case, order), with_real_logits(case, "truth"))


def accumulated(case: Case, group: str, **more: Any) -> Found:
    """Two forwards and backwards, of which the last one alone reduces; evaluations between them."""
    model = case.model()
    patch = patch_model(model, case.safety, **more)
    shard(model, group, reshard=True)
    batch = case.share(torch.distributed.get_rank())
    items, total = batch.pop("num_items_in_batch"), torch.zeros(())
    rows = [{n: x[i : i + 1] for n, x in batch.items()} for i in range(len(batch["labels"]))]
    evaluated = []
    for last, row in enumerate(rows, start=1 - len(rows)):
        model.set_requires_gradient_sync(last == 0)
        loss = model(**row, num_items_in_batch=items).loss * WORLD
        model.eval()
        with torch.no_grad():
            logits = model(**{n: x for n, x in row.items() if n != "labels"}).logits
            cross_entropy = F.cross_entropy(
                logits[:, :-1].flatten(0, 1), row["labels"][:, 1:].flatten(), reduction="sum"
            )
            model(**row, num_items_in_batch=items)
            parts = patch.last_parts
            evaluated.append((parts.cross_entropy.item(), cross_entropy.item()))
        model.train()
        loss.backward()
        total += loss.detach() / WORLD
    torch.distributed.all_reduce(total)
    return Found(total.item(), gradients(model), {"evaluated": evaluated})


@pytest.mark.parametrize(
    ("group", "trained"),
    [
        ("alone", False),
        ("tied", True),
        pytest.param("alone", True, marks=pytest.mark.slow),
        pytest.param("tied", False, marks=pytest.mark.slow),
    ],
)
def test_accumulation_with_evaluations_between(ranks, group, trained, tmp_path):
    case = Case(tied=group == "tied", trained_head=trained)
    more, values = {}, None
    if trained:
        values = torch.tensor([-1.0, -0.5, 0.5, 1.0])
        path = constant_cache(tmp_path / "cache", case.batch(), case.safety, values)
        more["reference"] = str(path)
    found = ranks.run(accumulated, case, group, **more)
    assert_right(found, case.truth(values))
    for mine in found:
        for fused, plain in mine.more["evaluated"]:
            assert fused == pytest.approx(plain, rel=1e-5, abs=1e-6)


def unpatched(case: Case) -> Found:
    """A step of the patched model, and then one without the patch."""
    model = case.model()
    patch = patch_model(model)
    shard(model, "alone", reshard=True)
    step(case, model)
    model.zero_grad()
    patch.unpatch()
    return step(case, model)


def test_an_unpatched_model_is_gathered_as_before(ranks):
    case = Case("none")
    assert_right(ranks.run(unpatched, case), case.truth())


def matrix(case: Case, group: str, reshard: bool, checkpointing: bool, path: str | None) -> Found:
    """Three steps, with a trained head's references from a cache."""
    model = case.model()
    more = {} if path is None or case.safety is None else {"reference": path}
    patch_model(model, case.safety, positions=case.positions, **more)
    shard(model, group, reshard=reshard, checkpointing=checkpointing)
    for _ in range(3):
        model.zero_grad()
        found = step(case, model)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "checkpointed"])
@pytest.mark.parametrize("reshard", [True, False], ids=["freed", "kept"])
@pytest.mark.parametrize("group", ["alone", "norm", "tied"])
def test_groups(ranks, group, reshard, checkpointing, tmp_path):
    """Every group, frozen and trained, freed or not, checkpointed or not."""
    values = torch.tensor([-1.0, -0.5, 0.5, 1.0])
    for kind, trained in product(("none", "kl", "logprob"), (False, True)):
        case = Case(kind, tied=group == "tied", trained_head=trained)
        path = None
        if trained and case.safety is not None:
            path = constant_cache(tmp_path / kind, case.batch(), case.safety, values)
        found = ranks.run(matrix, case, group, reshard, checkpointing, path and str(path))
        assert_right(found, case.truth(None if path is None else values), gradient=SEVERAL)
