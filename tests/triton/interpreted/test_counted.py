"""The formulas of `benchmarks.work` against what the kernels issue in the interpreter."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from triton.runtime import interpreter

from benchmarks import work
from str_kernels import VocabularyIndex, linear_cross_entropy
from str_kernels.backends.selection import DEFAULT_EPS
from str_kernels.backends.triton import TritonBackend
from str_kernels.backends.triton.backend import DEFAULT_BYTE_BUDGET
from str_kernels.backends.triton.launch import launch_for
from str_kernels.engine import products
from str_kernels.engine.contract import Block, Head
from str_kernels.engine.forward import tiles_of
from str_kernels.options import LossOptions
from tests.backends.test_routed import clustered_case

DTYPE = torch.bfloat16


@pytest.fixture
def traffic(monkeypatch):
    """Bytes of the lanes that are not masked, by what is done with them; as a GPU has bf16."""
    monkeypatch.setattr(products, "multiplies_bf16", lambda device: True)
    counted = {"loaded": 0, "stored": 0, "added": 0}
    builder = interpreter.InterpreterBuilder

    def watch(name, kind, size, mask):
        real = getattr(builder, name)

        def counting(self, *given, **more):
            counted[kind] += int(np.count_nonzero(mask(given).data)) * size(given)
            return real(self, *given, **more)

        monkeypatch.setattr(builder, name, counting)

    def pointed(given):
        return given[0].dtype.scalar.element_ty.primitive_bitwidth // 8

    watch("create_masked_load", "loaded", pointed, lambda given: given[1])
    watch("create_masked_store", "stored", pointed, lambda given: given[2])
    watch(
        "create_atomic_rmw", "added", lambda given: given[2].data.itemsize, lambda given: given[3]
    )
    return counted


def _case():
    return clustered_case(200, 2000, 96, ignored=0.0).to(DTYPE)


def _launches(screen=DTYPE):
    stages = ("columns", "softmax", "gradient", "refine", "expected", "weight", "backward")
    chosen = {stage: launch_for(0, stage, DTYPE) for stage in stages}
    return chosen | {"screen": launch_for(0, "screen", screen)}


def _run(case, backend, dot_flops, trainable, **arguments):
    dot_flops["flops"] = 0
    hidden = case.hidden_states.clone().requires_grad_()
    weight = case.weight.clone().requires_grad_(trainable)
    linear_cross_entropy(hidden, weight, case.labels, backend=backend, **arguments).backward()
    return dot_flops["flops"]


def _check(stages, shape, operations, traffic):
    """Operations exactly; products that torch does are not the kernels'."""
    torchs = ("dead tiles", "weight, dead tiles", "hot tiles")
    kernels = [stage for stage in stages if stage.stage not in torchs]
    assert work.gemms(kernels, shape) * shape.gemm == pytest.approx(operations, rel=1e-12)
    for kind, bytes_ in traffic.items():
        assert sum(getattr(stage, kind) for stage in kernels) == pytest.approx(
            bytes_, rel=2e-3
        )  # but scalars


@pytest.mark.slow
@pytest.mark.parametrize(
    ("screen", "kept", "trainable"),
    [
        ("exact", False, False),
        ("int8", False, False),
        ("int8", True, False),
        ("exact", False, True),
    ],
)
def test_routed_work(screen, kept, trainable, backend, dot_flops, traffic):
    """A frozen head with both screens and a trainable one: operations, and bytes of each kind."""
    case, eight_bits = _case(), screen == "int8"
    index = VocabularyIndex.build(case.weight, case.hidden_states, screen=screen if kept else None)
    tiles = tiles_of(case.weight, index, fresh=False)
    head = Head(case.hidden_states, case.weight, None)
    block = Block(head, case.labels, tiles, LossOptions())
    counts = backend.route(block, backend.screen(block, screen), DEFAULT_EPS).counts
    traffic.update(dict.fromkeys(traffic, 0))
    arguments = {"screen": screen, "index": index, "filter_eps": DEFAULT_EPS}
    operations = _run(case, backend, dot_flops, trainable, **arguments)
    shape = work.Shape(200, 2000, 96, 2)
    launches = _launches(torch.int8 if eight_bits else DTYPE)
    stages = work.routed(shape, counts, launches, eight_bits=eight_bits, kept=kept)
    if trainable:
        stages += work.routed_weight(shape, counts, launches)
    _check(stages, shape, operations, traffic)


@pytest.mark.parametrize("trainable", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_exact_work(trainable, dot_flops, traffic):
    """Every logit by Triton: two products with a frozen head, four with a trainable one; bytes."""
    case, shape = _case(), work.Shape(200, 2000, 96, 2)
    backend = TritonBackend(exact="triton")
    operations = _run(case, backend, dot_flops, trainable, filter_eps=0.0)
    stages = work.exact(shape, _launches(), DEFAULT_BYTE_BUDGET // 2)
    if trainable:
        stages += work.exact_weight(shape, _launches())
    _check(stages, shape, operations, traffic)
