"""The loss inside compiled code: one operator, the same values and gradients."""

from __future__ import annotations

import logging
from dataclasses import replace
from fractions import Fraction

import pytest
import torch

from str_kernels import SafetyConstraint, VocabularyIndex, linear_cross_entropy, notices, operator
from str_kernels.engine.contract import Head, RowInputs, Tiles
from str_kernels.options import LossOptions
from tests.backends.test_routed import clustered_case
from tests.oracle import assert_close, make_case

pytestmark = pytest.mark.one_in(3)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()


def compiled(case, frozen=(), **overrides):
    """Loss and gradients of a compiled function, traced whole; ``frozen`` need no gradient."""
    leaves = {
        name: getattr(case, name).detach().clone().requires_grad_(name not in frozen)
        for name in ("hidden_states", "weight", "bias")
        if getattr(case, name) is not None
    }
    settings = {**case.settings, **overrides}

    def loss(hidden_states, weight, labels, bias, reference, position_weights):
        # an operation before and one after, so that there is a graph around the operator
        return 2.0 * linear_cross_entropy(
            hidden_states * 1.5,
            weight,
            labels,
            bias=bias,
            reference=reference,
            position_weights=position_weights,
            **settings,
        )

    arguments = (
        leaves["hidden_states"],
        leaves["weight"],
        case.labels,
        leaves.get("bias"),
        case.reference,
        case.position_weights,
    )
    results = []
    for function in (torch.compile(loss, fullgraph=True, backend="aot_eager"), loss):
        value = function(*arguments)
        wanted = [x for x in leaves.values() if x.requires_grad]
        gradients = torch.autograd.grad(value.sum(), wanted)
        names = [name for name, x in leaves.items() if x.requires_grad]
        results.append({"loss": value.detach(), **dict(zip(names, gradients, strict=True))})
    return results


def test_no_method_of_named_tuples_is_traced(monkeypatch):
    """Torch 2.8 traces none of theirs; the graph is whole all the same."""
    for kind in (Head, Tiles, RowInputs):
        for name in ("_replace", "_asdict"):
            monkeypatch.setattr(kind, name, torch.compiler.disable(getattr(kind, name)))
    case = clustered_case(k=3)
    index = VocabularyIndex.build(case.weight, case.hidden_states)
    # the mean rows of a trained weight are summed in fp32, in another order
    assert_close(*compiled(case, index=index, screen="exact"), 1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": True, "softcap": 5.0, "logit_scale": 1.3, "label_smoothing": 0.1},
        {"k": 4, "kind": "logprob", "weighted": True, "z_loss": 0.01},
        {"k": 4, "kind": "kl", "constraint": {"temperature": 2.0, "token_weights": [1, 2, 0, 1]}},
        {"k": 4, "static": True, "reduction": "none"},
    ],
    ids=str,
)
@pytest.mark.parametrize("frozen", [(), ("weight", "bias"), ("hidden_states",)], ids=str)
def test_compiled_equals_eager(options, frozen):
    """``fullgraph=True``: every gradient that is asked for, to rounding."""
    assert_close(*compiled(make_case(**options), frozen), 1e-12)


def test_filtered_with_an_index(caplog):
    """A frozen head's filter is traced with its index; the backward announces no other choice."""
    notices._said.clear()
    caplog.set_level(logging.INFO, logger="str_kernels")
    case = clustered_case(k=3)
    index = VocabularyIndex.build(case.weight, case.hidden_states)
    assert_close(*compiled(case, ("weight",), index=index, screen="exact"), 1e-12)
    assert "with an index" in caplog.text
    assert "without a vocabulary index" not in caplog.text


def test_num_items_as_a_tensor():
    """A trainer's denominator is a tensor."""
    assert_close(*compiled(make_case(), num_items_in_batch=torch.tensor(7)), 1e-12)


def test_errors_keep_their_names():
    """What the boundary refuses is refused with the same words when the compiled code runs."""
    case = make_case()
    case.labels[2] = 1000
    with pytest.raises(ValueError, match=r"labels\[2\]=1000"):
        compiled(case)


def test_opcheck():
    """Schema, fake kernels and autograd registration hold, by torch's own check."""
    # every row labelled: opcheck does not take the NaN of a row without lse for equal
    case = make_case(9, 50, 6, k=3, kind="logprob", bias=True, ignored=0.0)
    safety: SafetyConstraint = case.settings["safety"]
    for needs in ((True, True, True), (True, False, False)):
        tensors = [
            x.clone().requires_grad_(need)
            for x, need in zip((case.hidden_states, case.weight, case.bias), needs, strict=True)
        ]
        torch.library.opcheck(
            torch.ops.str_kernels.fused_terms.default,
            (
                *(*tensors, case.labels, case.reference, None),
                *[None] * len(operator._INDEX),
                operator._as_json(
                    operator.Settings(LossOptions(safety=safety), "torch", needs, "float64")
                ),
            ),
        )


def test_an_exact_pass_is_said(caplog):
    """A filter that compiled code cannot honour for a trainable head is announced."""
    notices._said.clear()
    with caplog.at_level(logging.INFO, logger="str_kernels"):
        assert_close(*compiled(make_case(), filter_eps=0.0), 1e-12)
        assert "takes the exact pass" not in caplog.text
        got, _ = compiled(make_case(), filter_eps=2.0**-7)
    assert "takes the exact pass" in caplog.text
    # 2.0 · loss of 1.5 · hidden states, as `compiled` computes it
    case = make_case()
    case.hidden_states = 1.5 * case.hidden_states
    torch.testing.assert_close(got["loss"], 2.0 * case.truth()["loss"])


def test_under_autocast():
    """A weight in fp32 meets hidden states in bf16, as it does in eager code."""
    case = make_case(bias=True).to(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(*compiled(case), 1e-6)


def test_settings_survive_their_text():
    """Every field comes back from the operator's string, numbers of other types as floats."""
    safety = SafetyConstraint([3, 1], 0.1 + 0.2, "kl", [0.5, 2.0], temperature=1.5)
    options = LossOptions(logit_scale=Fraction(1, 3), softcap=30, screen="exact", safety=safety)
    settings = operator.Settings(options, "torch", (True, False, True), "bfloat16", autocast=True)
    assert operator.Settings.from_text(operator._as_json(settings)) == replace(
        settings, options=replace(options, logit_scale=1 / 3)
    )
