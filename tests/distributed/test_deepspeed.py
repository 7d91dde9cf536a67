"""DeepSpeed's ZeRO, on its CPU accelerator; without DeepSpeed, hooks of the shape of its own."""

from __future__ import annotations

import gc
import importlib.util
import os
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from str_kernels import patch_model
from str_kernels.engine import autograd
from tests.distributed.models import KINDS, Case, Found, assert_right
from tests.distributed.pool import WORLD
from tests.distributed.splitting import part
from tests.huggingface.adapters import SAFETY, wrap
from tests.huggingface.dense import constant_cache
from tests.huggingface.models import assert_same, batch, build, gradients

pytestmark = pytest.mark.one_in(4)

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"
)


def start_deepspeed() -> None:
    os.environ |= {"DS_ACCELERATOR": "cpu", "DS_BUILD_OPS": "0"}
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # or it would be compiled
    deepspeed.init_distributed(dist_backend="gloo")


def engine_for(case: Case, stage: int, model: torch.nn.Module, persistent: int = 0, **more: Any):
    start_deepspeed()
    import deepspeed

    trained = [p for p in model.parameters() if p.requires_grad]
    settings = {
        "train_micro_batch_size_per_gpu": len(case.labels) // WORLD,
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": 100_000,
            "stage3_param_persistence_threshold": persistent,
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "communication_data_type": "fp32",
    }
    optimizer = torch.optim.SGD(trained, lr=0.0)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=settings, **more)[0]


def sharded(
    case: Case,
    stage: int,
    *,
    steps: int = 1,
    patched: str = "before",
    persistent: int = 0,
    reference: str = "adapter_off",
) -> Found:
    model, calls = case.model(), []
    given = {} if case.safety is None else {"positions": case.positions, "reference": reference}
    if patched == "before":
        patch_model(model, case.safety, **given)
    engine = engine_for(case, stage, model, persistent)
    if patched == "after":
        patch_model(model, case.safety, verify=False, **given)
    from deepspeed.utils import safe_get_full_grad

    with counting(calls, (case.vocab, 32)):
        for _ in range(steps):
            outputs = engine(**case.share(torch.distributed.get_rank()))
            loss = outputs.loss * WORLD
            engine.backward(loss)
            found = {n: safe_get_full_grad(p) for n, p in model.named_parameters()}
            engine.step()
    mean = loss.detach().clone() / WORLD
    torch.distributed.all_reduce(mean)
    gradients = {n: g.float() for n, g in found.items() if g is not None}
    return Found(mean.item(), gradients, {"whole": calls})


@contextmanager
def counting(calls: list[int], shape: tuple[int, int]) -> Iterator[None]:
    """Notes how many whole weights there are at each backward of the fused operator."""
    real = autograd.backward_rows

    def backward_rows(*args):
        every = [x for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter)]
        whole = {x.untyped_storage() for x in every if x.shape == shape and not x.is_meta}
        calls.append(len({x.data_ptr() for x in whole if x.size()}))
        return real(*args)

    autograd.backward_rows = backward_rows
    try:
        yield
    finally:
        autograd.backward_rows = real


@needs_deepspeed
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_and_optimizer_are_sharded(ranks, kind, stage):
    case = Case(kind)
    assert_right(ranks.run(sharded, case, stage), case.truth())


def by_ulysses(case: Case) -> Found:
    """A step of DeepSpeed's own sequence parallelism, with the loss that transformers makes.

    Its gradient is WORLD times the loss's, of an unpatched model too: transformers' gather adds up
    what all processes ask of a loss, and DeepSpeed adds up the parts of a sequence.
    """
    start_deepspeed()
    from deepspeed.runtime.sequence_parallel import parallel_state_sp, ulysses_sp
    from deepspeed.utils import safe_get_full_grad
    from transformers.integrations.deepspeed import deepspeed_sp_compute_loss
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model, attention = case.model(), ALL_ATTENTION_FUNCTIONS["sdpa"]
    if case.safety is not None:
        patch_model(model, case.safety, positions=case.positions)
    mpu = ulysses_sp.UlyssesSPAttentionHF.register_with_transformers(
        model.get_base_model(), "sdpa", WORLD, len(case.labels), disable_in_eval=True
    )
    config = types.SimpleNamespace(sp_backend="deepspeed", sp_size=WORLD)
    try:
        engine = engine_for(case, 1, model, mpu=mpu)
        batch = part(case.batch(), "ulysses")
        loss = deepspeed_sp_compute_loss(None, engine, batch, False, config)
        engine.backward(loss)
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = attention
        parallel_state_sp._release_sequence_parallel_groups()
    found = {n: safe_get_full_grad(p) for n, p in model.named_parameters() if p.requires_grad}
    return Found(loss.item(), {n: g.float() / WORLD for n, g in found.items() if g is not None})


@needs_deepspeed
def test_ulysses_without_a_patch(ranks):
    """What the next test compares with is right."""
    case = Case("none", labels=(2, 3))
    assert_right(ranks.run(by_ulysses, case), case.truth())


@needs_deepspeed
@pytest.mark.parametrize("labels", [(3, 9), (2, 3)], ids=str)
@pytest.mark.parametrize("positions", ["all", "labels", 2])
def test_ulysses(ranks, positions, labels):
    """A process of prompt alone keeps its constraint; the reference pass exchanges as well."""
    case = Case("kl", positions=positions, labels=labels)
    assert_right(ranks.run(by_ulysses, case), case.truth())


def assert_fused(found: list[Found], want: Found, steps: int = 1, whole: int | None = 0) -> None:
    """Right, by the fused operator once a step, and with so many whole heads in its backward."""
    assert [len(x.more["whole"]) for x in found] == [steps] * WORLD
    if whole is not None:
        assert [x.more["whole"] for x in found] == [[whole] * steps] * WORLD
    assert_right(found, want)


@needs_deepspeed
@pytest.mark.parametrize("kind", KINDS)
def test_parameters_are_sharded(ranks, kind):
    case = Case(kind)
    assert_fused(ranks.run(sharded, case, 3, steps=2), case.truth(), 2)


@needs_deepspeed
@pytest.mark.parametrize("kind", ["none", "kl"])
@pytest.mark.parametrize("tied", [False, True], ids=["apart", "tied"])
def test_a_trained_head_of_zero_3(ranks, kind, tied, tmp_path):
    """DeepSpeed gathers it for backward, as it does for the logits of an unpatched model."""
    case = Case(kind, tied=tied, trained_head=True)
    more, values = {}, torch.tensor([-1.0, -0.5, 0.5, 1.0])
    if case.safety is not None:
        path = constant_cache(tmp_path / "cache", case.batch(), case.safety, values)
        more["reference"] = str(path)
    found = ranks.run(sharded, case, 3, steps=2, **more)
    assert_fused(found, case.truth(values if more else None), 2, whole=None)


@needs_deepspeed
@pytest.mark.parametrize("persistent", [0, 10**6])
def test_a_tied_head_of_zero_3(ranks, persistent):
    """Parameters that are smaller than a threshold stay gathered."""
    case = Case(tied=True)
    found = ranks.run(sharded, case, 3, persistent=persistent)
    assert_fused(found, case.truth(), whole=None if persistent else 0)


@needs_deepspeed
def test_zero_3_that_is_patched_afterwards(ranks):
    case = Case(labels=(0, 0, 8, 10))
    assert_fused(ranks.run(sharded, case, 3, patched="after"), case.truth())


def test_a_hook_of_the_shape_of_deepspeed_s():
    """A stand-in: a closure of its module that scales the gradient of every output."""

    def backward_hook(grad: torch.Tensor) -> torch.Tensor:
        return grad * 0.5

    backward_hook.__module__ = "deepspeed.runtime.utils"
    model, inputs = wrap(build()), batch()
    with patch_model(model, SAFETY):
        want = gradients(model, model(**inputs).loss)
        outputs = model(**inputs)
        for output in (outputs.loss, outputs.logits):
            output.register_hook(backward_hook)
        found = gradients(model, outputs.loss)
    assert_same(found, {n: x if n == "loss" else x / 2 for n, x in want.items()})
