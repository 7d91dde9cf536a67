"""FSDP1 (``FullyShardedDataParallel``): right where the root has the head, refused elsewhere."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel as Fsdp1
from torch.distributed.fsdp import ShardingStrategy
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from str_kernels import patch_model
from tests.distributed.models import KINDS, Case, Found, assert_right, gradients, step
from tests.distributed.pool import WORLD

pytestmark = pytest.mark.one_in(4)

wrap = functools.partial(Fsdp1, use_orig_params=True, device_id=torch.device("cpu"))


def sharded(
    case: Case, *, patched: str = "before", strategy: str = "FULL_SHARD", units: tuple = ()
) -> Found:
    model = case.model()
    given = {} if case.safety is None else {"positions": case.positions}
    if patched == "before":
        patch = patch_model(model, case.safety, **given)
    net = wrap(
        model,
        auto_wrap_policy=ModuleWrapPolicy({LlamaDecoderLayer, *units}),
        sharding_strategy=ShardingStrategy[strategy],
    )
    if patched != "before":
        patch = patch_model(net if patched == "net" else net.module, case.safety, **given)
    for _ in range(2):
        net.zero_grad()
        found = step(case, net)
    assert patch.last_parts is not None
    with Fsdp1.summon_full_params(net, with_grads=True):
        found.gradients = gradients(net)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind(ranks, kind):
    case = Case(kind)
    assert_right(ranks.run(sharded, case), case.truth())


@pytest.mark.parametrize("patched", ["net", "module"])
def test_patched_afterwards(ranks, patched):
    case = Case()
    assert_right(ranks.run(sharded, case, patched=patched), case.truth())


def test_gradients_and_optimizer_alone_are_sharded(ranks):
    case = Case()
    assert_right(ranks.run(sharded, case, strategy="SHARD_GRAD_OP"), case.truth())


def test_a_tied_head(ranks):
    case = Case(tied=True)
    assert_right(ranks.run(sharded, case), case.truth())


def test_a_trained_head(ranks):
    case = Case("none", trained_head=True)
    assert_right(ranks.run(sharded, case), case.truth())


@pytest.mark.parametrize("patched", ["before", "net"])
def test_a_head_of_its_own_is_refused(ranks, patched):
    """It is gone before the loss; the error says what to do."""
    errors = ranks.errors(sharded, Case(), patched=patched, units=(nn.Linear,))
    assert len(errors) == WORLD
    for error in errors:
        assert "FSDP1 has wrapped its head as a unit of its own" in error
        assert "leave the head in the root unit" in error
