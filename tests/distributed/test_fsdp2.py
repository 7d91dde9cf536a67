"""FSDP2 (``fully_shard``): every process has a part of the batch, and of every parameter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from str_kernels import patch_model
from tests.distributed.models import KINDS, Case, Found, assert_right, step
from tests.distributed.pool import WORLD

pytestmark = pytest.mark.one_in(4)

GROUPS = ("root", "alone", "norm", "tied")
# products of bf16, 2^-8 each; the truth is of fp32
COARSE = 0.05


def shard(
    model: nn.Module,
    group: str,
    *,
    reshard: bool | None = None,
    checkpointing: bool = False,
    low: bool = False,
) -> nn.Module:
    """Layers in groups of their own, the head in ``group``, all else in the root's.

    With ``"only"`` there is the root's group alone.
    """
    mesh = init_device_mesh("cpu", (WORLD,))
    settings: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": reshard}
    if low:
        settings["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    base = model.get_base_model()
    body = base.model
    if checkpointing:
        model.enable_input_require_grads()
        base.gradient_checkpointing_enable()
    for layer in body.layers if group != "only" else ():
        fully_shard(layer, **settings)
    together = {
        "alone": [base.lm_head],
        "norm": [body.norm, base.lm_head],
        "tied": [body.norm, body.embed_tokens, base.lm_head],
    }.get(group)
    if together:
        fully_shard(together[0] if len(together) == 1 else together, **settings)
    return fully_shard(model, **settings)


def sharded(
    case: Case,
    group: str = "root",
    *,
    steps: int = 1,
    patched: str = "before",
    reference: str = "adapter_off",
    options: dict | None = None,
    **how: Any,
) -> Found:
    model = case.model()
    given = {} if case.safety is None else {"positions": case.positions, "reference": reference}
    if patched == "before":
        patch = patch_model(model, case.safety, **given, **(options or {}))
    shard(model, group, **how)
    if patched == "after":
        patch = patch_model(model, case.safety, verify=False, **given, **(options or {}))
    for _ in range(steps):
        model.zero_grad()
        found = step(case, model)
    assert patch.last_parts is not None  # fused, not only right
    return found


@pytest.mark.parametrize("reshard", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("kind", ["none", "kl"])
def test_groups_of_the_head(ranks, kind, group, reshard):
    """Wherever the head is, whole or gathered again for the loss and for backward."""
    case = Case(kind, tied=group == "tied")
    assert_right(ranks.run(sharded, case, group, reshard=reshard, steps=2), case.truth())


@pytest.mark.parametrize("group", ["root", "alone", "norm"])
def test_patched_afterwards(ranks, group):
    case = Case()
    found = ranks.run(sharded, case, group, patched="after", reshard=True)
    assert_right(found, case.truth())


@pytest.mark.parametrize("group", ["root", "alone", "tied"])
@pytest.mark.parametrize("kind", ["none", "kl"])
def test_a_trained_head(ranks, kind, group, tmp_path):
    """Its gradient is that of all processes; backward gathers the weight."""
    from tests.huggingface.dense import constant_cache

    case = Case(kind, tied=group == "tied", trained_head=True)
    more, values = {}, torch.tensor([-1.0, -0.5, 0.5, 1.0])  # exact in the cache's fp16
    if case.safety is not None:
        path = constant_cache(tmp_path / "cache", case.batch(), case.safety, values)
        more["reference"] = str(path)
    found = ranks.run(sharded, case, group, reshard=True, steps=2, **more)
    assert_right(found, case.truth(values if more else None))


@pytest.mark.parametrize("kind", KINDS[2:])
def test_other_kinds(ranks, kind):
    case = Case(kind)
    assert_right(ranks.run(sharded, case, "norm", reshard=True), case.truth())


def test_rows_that_do_not_divide(ranks):
    case = Case(vocab=97)
    assert_right(ranks.run(sharded, case, "alone", reshard=True), case.truth())


def test_a_process_without_labels(ranks):
    case = Case(labels=(0, 0, 8, 10))
    assert_right(ranks.run(sharded, case, "alone", reshard=True), case.truth())


def test_checkpointing(ranks):
    case = Case()
    found = ranks.run(sharded, case, "norm", reshard=True, checkpointing=True)
    assert_right(found, case.truth())


def test_the_guard_gathers_the_head(ranks):
    case, often = Case("none"), {"check_accuracy_every": 1}
    found = ranks.run(sharded, case, "alone", reshard=True, steps=2, options=often)
    assert_right(found, case.truth())


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS)
def test_mixed_precision(ranks, group):
    case = Case(tied=group == "tied")
    found = ranks.run(sharded, case, group, reshard=True, low=True, steps=2)
    assert_right(found, case.truth(), gradient=COARSE, loss=COARSE)


def reads_logits(case: Case) -> tuple[str, float]:
    model = case.model()
    patch_model(model)
    shard(model, "alone", reshard=True)
    outputs = model(**case.share(0))
    with pytest.raises(RuntimeError, match=r"has freed.*reshard_after_forward=False"):
        outputs.logits.sum()
    return "refused", outputs.loss.item()


def test_logits_of_a_head_that_is_gone(ranks):
    """One process may read them alone, so they are refused rather than gathered."""
    assert [word for word, _ in ranks.run(reads_logits, Case("none"))] == ["refused"] * WORLD
