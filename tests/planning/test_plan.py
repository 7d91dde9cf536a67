"""A plan counts what a step takes: beside measured bytes, and for each error of its arguments."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import transformers
from packaging.version import Version

from str_kernels.planning import Levers, plan
from str_kernels.planning.check import measured_bytes
from str_kernels.planning.counts import Counter
from str_kernels.planning.levers import ladder
from str_kernels.planning.longest import STEP, Longest
from str_kernels.planning.request import GIB, Request
from str_kernels.planning.step import SHARED
from str_kernels.planning.subject import subject_of

LLAMA = {
    "model_type": "llama",
    "vocab_size": 600,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "dtype": "float32",
}
GEMMA = LLAMA | {
    "model_type": "gemma3_text",
    "head_dim": 16,
    "sliding_window": 64,
    "layer_types": ["sliding_attention", "full_attention"],
    "tie_word_embeddings": True,
}
MIXTRAL = LLAMA | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
QWEN = LLAMA | {
    "model_type": "qwen3_moe",
    "num_experts": 8,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 64,
    "head_dim": 16,
}
DEEPSEEK = LLAMA | {
    "model_type": "deepseek_v3",
    "num_key_value_heads": LLAMA["num_attention_heads"],
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "head_dim": 8,
    "v_head_dim": 16,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
ROUTED = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.0"), reason="its experts are a loop by values"
)
FUSED = Levers(fused_head=True)
EVERY = Levers(True, "disk", 64, fused_head=True)


def written(tmp_path, values: dict, name: str = "config.json") -> str:
    """The path of a configuration."""
    path = tmp_path / name
    path.write_text(json.dumps(values), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("values", "levers", "tolerance"),
    [
        (LLAMA, Levers(), 0.001),  # the model's own code alone: nothing of it is estimated
        (LLAMA, EVERY, 0.05),
        (GEMMA, Levers(gradient_checkpointing=True, fused_head=True), 0.05),
        pytest.param(GEMMA, Levers(), 0.001, marks=pytest.mark.slow),
        pytest.param(GEMMA, EVERY, 0.05, marks=pytest.mark.slow),
        pytest.param(LLAMA, FUSED, 0.05, marks=pytest.mark.slow),
        (GEMMA, Levers(window_attention=True), 0.001),
        pytest.param(GEMMA, replace(EVERY, window_attention=True), 0.05, marks=pytest.mark.slow),
        pytest.param(MIXTRAL, Levers(True, fused_head=True), 0.02, marks=ROUTED),
        pytest.param(
            DEEPSEEK, Levers(True, fused_head=True), 0.02, marks=(ROUTED, pytest.mark.slow)
        ),
        pytest.param(QWEN, Levers(), 0.001, marks=(ROUTED, pytest.mark.slow)),
        # in tiles the sorting of so few tokens by expert shows, which has no kernel on meta
        pytest.param(QWEN, EVERY, 0.1, marks=(ROUTED, pytest.mark.slow)),
    ],
)
def test_a_count_is_what_a_step_takes(tmp_path, values, levers, tolerance):
    """The bytes that two real steps have alive, at the allocator."""
    path = written(tmp_path, values)
    counter = Counter(subject_of(path, rank=4, dtype="auto"), request(path))
    counted = counter.count(300, levers).total
    measured = measured_bytes(
        path,
        300,
        levers,
        rank=4,
        dtype=torch.float32,
        batch=1,
        safety_tokens=8,
        device=torch.device("cpu"),
    )
    assert counted == pytest.approx(measured, rel=tolerance)


@pytest.mark.parametrize("tile_all", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_count_in_bfloat16_is_what_a_step_takes(tmp_path, tile_all):
    """With the copies in fp32 of what adapters multiply, and with these in tiles."""
    wide = {"hidden_size": 512, "intermediate_size": 1024, "head_dim": 128}
    values = LLAMA | {"num_hidden_layers": 1, "vocab_size": 40} | wide
    path, levers = written(tmp_path, values), replace(EVERY, tile_all=tile_all)
    counter = Counter(subject_of(path, rank=4, dtype="bfloat16"), request(path))
    given = {"rank": 4, "batch": 1, "safety_tokens": 8, "device": torch.device("cpu")}
    measured = measured_bytes(path, 1024, levers, dtype=torch.bfloat16, **given)
    assert counter.count(1024, levers).total == pytest.approx(measured, rel=0.05)


def request(path: str, **given) -> Request:
    """A small request on the CPU."""
    return Request(path, 300, rank=4, device="cpu", safety_tokens=8, **given)


@pytest.mark.parametrize(
    ("pattern", "layers"),
    [
        (["full_attention"], 8),
        pytest.param(["sliding_attention", "full_attention"], 12, marks=pytest.mark.slow),
    ],
)
def test_equal_layers_are_counted_once(tmp_path, pattern, layers):
    """Two depths tell the whole model's step to the byte, with each kind of layer among them."""
    kinds = (pattern * layers)[:layers]
    values = GEMMA | {"num_hidden_layers": layers, "layer_types": kinds}
    path = written(tmp_path, values)
    subject = subject_of(path, rank=4, dtype="auto")
    counter = Counter(subject, request(path))
    assert counter.depths.more < layers
    every = Counter(subject, request(path))
    every.depths = every.depths._replace(few=layers, more=layers)
    for levers in (FUSED, Levers(gradient_checkpointing=True, fused_head=True)):
        assert every.count(100, levers)[:2] == counter.count(100, levers)[:2]


def test_a_body_in_four_bits_is_smaller(tmp_path):
    """Packed weights take half a byte and their scales; embeddings and head stay in bf16."""
    path = written(tmp_path, LLAMA)
    four, eight, sixteen = (
        subject_of(path, rank=4, dtype=name).bytes_of(trained=False)
        for name in ("nf4", "int8", "bfloat16")
    )
    linear = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 192)
    outputs = 2 * (64 + 32 + 32 + 64 + 192 + 192 + 64)
    assert sixteen - eight == 2 * linear - linear - 4 * outputs
    assert sixteen - four == 2 * linear - linear // 2 - linear // 64 - _second_scales()


def _second_scales() -> int:
    shapes = [(64, 64), (32, 64), (32, 64), (64, 64), (192, 64), (192, 64), (64, 192)]
    return 2 * sum(4 * -(-(a * b // 64) // 256) for a, b in shapes)


def test_attention_is_the_devices(tmp_path):
    """A window's mask is stored by either device; without one, none stores a matrix of N²."""
    kept = Levers(gradient_checkpointing=True, fused_head=True)
    windows = replace(kept, window_attention=True)
    for values, levers, square in (
        (LLAMA, kept, False),
        (GEMMA, kept, True),
        (GEMMA, windows, False),
    ):
        path = written(tmp_path, values)
        subject = subject_of(path, rank=4, dtype="bfloat16")
        for device in ("cpu", "cuda"):
            asked = Request(path, 2048, rank=4, device=device, safety_tokens=0)
            counter = Counter(subject, asked)
            short, long = (counter.count(n, levers).owners[SHARED] for n in (2048, 4096))
            assert (long - short >= 3 * 2048**2) is square


def test_windows_are_planned_where_the_model_has_them(tmp_path):
    """Each long set is followed by the same in windows; elsewhere they are refused by name."""
    subject = subject_of(written(tmp_path, GEMMA), rank=4, dtype="auto")
    sets = ladder("cpu", windows=subject.slides)
    assert sum(levers.window_attention for levers in sets) == 5
    assert all(
        before == replace(after, window_attention=False)
        for before, after in pairwise(sets)
        if after.window_attention
    )
    other = written(tmp_path, LLAMA)
    with pytest.raises(ValueError, match="window_attention=True: no layer"):
        plan(other, context=256, rank=4, levers=Levers(window_attention=True))


def test_a_plan_finds_the_cheapest_levers_and_the_longest_context(tmp_path):
    """The first set that fits is the cheapest, and a longest context fits."""
    path = written(tmp_path, LLAMA | {"num_hidden_layers": 1})
    given = {"rank": 4, "device": "cpu", "safety_tokens": 8}
    free = plan(path, context=2048, **given)
    assert free.cheapest is None
    totals = [row.count.total for row in free.rows]
    room = (totals[3] + 4096) / GIB
    found = plan(path, context=2048, memory=room, **given)
    assert found.cheapest.levers == found.rows[3].levers
    counter = Counter(subject_of(path, rank=4, dtype="auto"), request(path))
    for row in found.rows:
        assert counter.count(row.longest, row.levers).total <= found.request.room
        assert row.fits is (row.longest >= 2048)
    json.dumps(found.as_dict())


def test_the_longest_context_is_found_on_any_curve():
    """A line, a parabola, a bend and a stair, for rooms in any order, with few counts."""
    most = (1 << 20) - 1
    for curve in (
        lambda n: 10 * n,
        lambda n: n * n // 1000 + n,
        lambda n: max(n * n // 1000, 500 * n + 10**8),
        lambda n: n // 5000 * 7,
    ):
        counted = []
        search = Longest(lambda n, f=curve, seen=counted: seen.append(n) or f(n), most)
        for wanted in (50_000, 3000, 900_000, 50_200):
            found = search.within(curve(wanted))
            assert curve(found) <= curve(wanted) < curve(min(found + STEP, most))
            assert found % STEP == 0
        assert search.within(curve(STEP) - 1) == 0
        assert search.within(curve(most)) == most
        assert len(counted) == len(set(counted)) <= 60
    line = Longest(lambda n: counted.append(n) or n * n // 64 + 7 * n + 5, most)
    counted.clear()
    line.within(10**9)
    assert len(counted) <= 7


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"context": 5000}, "context=5000"),
        ({"context": 1}, "context=1"),
        ({"memory": 1e-5}, "memory=1e-05"),
        ({"memory": -1.0}, "memory=-1.0"),
        ({"dtype": "fp4"}, "dtype='fp4'"),
        ({"dtype": "mixed-bfloat16"}, "dtype='mixed-bfloat16'"),
        ({"device": "tpu"}, "device='tpu'"),
        ({"processes": 0}, "processes=0"),
        ({"safety_tokens": -1}, "safety_tokens=-1"),
        ({"batch": True}, "batch=True"),
        ({"rank": 0}, "rank=0"),
    ],
)
def test_bad_values_are_refused_by_name(tmp_path, given, named):
    """One sentence with the value and what to do."""
    path = written(tmp_path, LLAMA)
    with pytest.raises(ValueError, match=named) as caught:
        plan(path, **given)
    assert str(caught.value).startswith(named)
    assert len(str(caught.value)) <= 300


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"hidden_size": 8}, "model_type"),
        ({"model_type": "never_heard_of"}, "never_heard_of"),
        ([1, 2], "model_type"),
        ({"model_type": "bert", "hidden_size": 64}, "cannot be built"),
    ],
)
def test_bad_configurations_are_refused(tmp_path, values, told):
    """An architecture that transformers does not know, or that has no causal head."""
    path = written(tmp_path, values)
    with pytest.raises(ValueError, match=told):
        plan(path)


def test_what_cannot_be_counted_is_said(tmp_path):
    """Experts in a loop over those that were hit, whose number depends on values; broken shapes."""
    looped = {"experts_implementation": "eager", "num_hidden_layers": 1}
    with pytest.raises(ValueError, match="cannot be counted on tensors without values"):
        plan(written(tmp_path, MIXTRAL | looped), context=64, rank=2)
    unlike = {"num_key_value_heads": 2, "num_hidden_layers": 1}  # fewer than its attention takes
    with pytest.raises(ValueError, match=r"without values \(The size of tensor"):
        plan(written(tmp_path, DEEPSEEK | unlike), context=64, rank=2)


def test_processes_and_batch_cost_what_they_add(tmp_path):
    """DDP's buckets are as large as the gradients; two sequences are no less than one."""
    path = written(tmp_path, LLAMA)
    subject = subject_of(path, rank=4, dtype="auto")
    one, many = (Counter(subject, request(path, processes=p)) for p in (1, 4))
    trained = subject.bytes_of(trained=True)
    assert many.count(256, FUSED).total - one.count(256, FUSED).total == trained
    two = Counter(subject, request(path, batch=2))
    assert two.count(256, FUSED).total > one.count(256, FUSED).total
