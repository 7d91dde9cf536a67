"""Operations of a step beside its formulas, and what the reference pass costs of them."""

from __future__ import annotations

import pytest

from str_kernels.planning import Levers, plan
from str_kernels.planning.counts import Counter
from str_kernels.planning.operations import Operations
from str_kernels.planning.subject import subject_of
from tests.planning.test_plan import LLAMA, request, written

KEPT = Levers(gradient_checkpointing=True, fused_head=True)


@pytest.mark.parametrize(
    ("layers", "dtype"),
    [
        (2, "auto"),
        pytest.param(12, "auto", marks=pytest.mark.slow),
        pytest.param(2, "nf4", marks=pytest.mark.slow),
        pytest.param(2, "int8", marks=pytest.mark.slow),
    ],
)
def test_operations_are_those_of_the_products(tmp_path, layers, dtype):
    """The reference is one forward of the body; the rest at least two more, and the head."""
    path = written(tmp_path, LLAMA | {"num_hidden_layers": layers})
    counter = Counter(subject_of(path, rank=4, dtype=dtype), request(path))
    n, linear = 300, layers * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 192)
    attention = layers * 2 * n * n * (64 + 64) // 2  # causal
    forward = 2 * n * linear + attention
    reference, rest = counter.operations(n, KEPT)
    assert reference == forward
    head = 4 * n * 600 * 64
    backward = 2 * n * linear + 2.5 * attention  # of the inputs: the weights are frozen
    adapter = rest - head - 2 * forward - backward
    ranks = layers * 4 * (4 * (64 + 64) - 2 * 32 + 3 * (64 + 192))
    assert 0 < adapter <= 5 * 2 * n * ranks  # twice forward, and gradients of three operands
    without = Levers(fused_head=True)
    assert counter.operations(n, without).rest < rest
    with pytest.raises(ValueError, match="tile_tokens: operations"):
        counter.operations(n, Levers(tile_tokens=64, fused_head=True))


def test_a_share_of_the_sequences_costs_its_share():
    """Of 100 operations 20 are the reference's; a quarter of these are 5 of 85."""
    found = Operations(20, 80)
    assert found.share(1.0) == 0.2
    assert found.share(0.25) == pytest.approx(5 / 85)


def test_a_plan_tells_what_the_reference_costs(tmp_path):
    """At the asked context and at those that the model has positions for; without one nothing."""
    path = written(tmp_path, LLAMA | {"num_hidden_layers": 1})
    given = {"context": 300, "rank": 4, "device": "cpu", "levers": KEPT}
    found = plan(path, safety_tokens=8, **given)
    assert [x[:2] for x in found.reference] == [(300, 1.0), (300, 0.25), (4096, 1.0), (4096, 0.25)]
    assert all(0 < x.part < x.share / 2 for x in found.reference)
    assert found.as_dict()["reference_pass"][0]["context"] == 300
    assert not plan(path, safety_tokens=0, **given).reference
