"""The oracle itself, against closed forms and finite differences."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from str_kernels import SafetyConstraint, linear_cross_entropy
from tests.oracle import assert_close, make_case


def _loss(logits: torch.Tensor, labels: list[int], **settings) -> torch.Tensor:
    """The oracle on given logits: hidden states are the logits, the head is the identity."""
    head = torch.eye(logits.shape[1], dtype=torch.float64)
    return linear_cross_entropy(
        logits.double(), head, torch.tensor(labels), backend="dense", **settings
    )


def test_uniform_logits_cost_log_v():
    """Equal logits cost log V whatever the label."""
    assert _loss(torch.zeros(3, 7), [0, 3, 6]).item() == pytest.approx(math.log(7), abs=1e-12)


def test_z_loss_and_smoothing_closed_form():
    """Two logits 0 and a: every term by hand."""
    a, smoothing, z = 1.5, 0.2, 0.01
    lse = math.log(1 + math.exp(a))
    want = lse - 0.8 * a - smoothing / 2 * a + z * lse**2
    got = _loss(torch.tensor([[0.0, a]]), [1], label_smoothing=smoothing, z_loss=z)
    assert got.item() == pytest.approx(want, abs=1e-12)


def test_scale_comes_before_softcap():
    """Z = softcap · tanh(scale · x / softcap)."""
    z = 2.0 * math.tanh(3.0 * 1.0 / 2.0)
    got = _loss(torch.tensor([[0.0, 1.0]]), [1], logit_scale=3.0, softcap=2.0)
    assert got.item() == pytest.approx(math.log(1 + math.exp(z)) - z, abs=1e-12)


@pytest.mark.parametrize(
    ("kind", "extra", "value"),
    [
        ("mse", {}, (1.0 * (1 - 3) ** 2 + 2.0 * (2 - 1) ** 2) / 2),
        ("logprob", {}, None),
        ("kl", {"temperature": 2.0}, None),
    ],
)
def test_constraint_closed_forms(kind, extra, value):
    """Z = (1, 2) on tokens 0 and 2, r = (3, 1), ω = (1, 2)."""
    safety = SafetyConstraint([0, 2], 1.0, kind=kind, token_weights=[1.0, 2.0], **extra)
    logits, reference = torch.tensor([[1.0, 0.0, 2.0]]), torch.tensor([3.0, 1.0])
    lse = math.log(math.e + 1 + math.e**2)
    if kind == "logprob":
        value = ((1 - lse - 3) ** 2 + 2 * (2 - lse - 1) ** 2) / 2
    if kind == "kl":
        q = [math.exp(1.5), 2 * math.exp(0.5)]
        q = [x / sum(q) for x in q]
        p = [math.exp(0.5), 2 * math.exp(1.0)]
        p = [x / sum(p) for x in p]
        value = 4 * sum(a * math.log(a / b) for a, b in zip(q, p, strict=True))
    got = _loss(
        logits,
        [-100],
        safety=safety,
        reference=reference,
        position_weights=torch.ones(1),
        reduction="sum",
    )
    assert got.item() == pytest.approx(value, abs=1e-12)


def test_kl_mass_closed_form():
    """Z = (1, 0, 2, 0), tokens 0 and 2, and what is left; the reference has all three."""
    safety = SafetyConstraint([0, 2], 1.0, kind="kl_mass")
    q, p = [0.5, 0.2, 0.3], [math.e, math.e**2, 2.0]
    p = [x / sum(p) for x in p]
    got = _loss(
        torch.tensor([[1.0, 0.0, 2.0, 0.0]]),
        [-100],
        safety=safety,
        reference=torch.tensor(q, dtype=torch.float64).log(),
        position_weights=torch.ones(1),
        reduction="sum",
    )
    held, mass = sum(q[:2]), sum(p[:2])
    among = sum(
        a / held * math.log((a / held) / (b / mass)) for a, b in zip(q[:2], p, strict=False)
    )
    of_mass = held * math.log(held / mass) + q[2] * math.log(q[2] / p[2])
    assert got.item() == pytest.approx(among + of_mass, abs=1e-12)


@pytest.mark.parametrize("backend", ["dense", "torch"])
@pytest.mark.parametrize("weights", [None, [1.0, 3.0, 0.5], [0.0, 1.0, 2.0]])
@pytest.mark.parametrize("kind", ["mse", "logprob", "kl"])
def test_nothing_is_asked_of_who_stayed(kind, weights, backend):
    """At the reference itself neither penalty nor gradient, whatever the tokens weigh."""
    case = make_case(6, 20, 5, k=3, kind=kind, constraint={"token_weights": weights}, weighted=True)
    logits = case.hidden_states @ case.weight.T
    held = logits.log_softmax(-1) if kind == "logprob" else logits
    case.reference = held[:, case.settings["safety"].token_ids]
    case.labels[:] = -100
    got = case.run(backend=backend, reduction="sum")
    assert all(values.abs().max() < 1e-12 for values in got.values())


@pytest.mark.parametrize("backend", ["dense", "torch"])
@pytest.mark.parametrize("weights", [None, [1.0, 0.0, 2.0]])
@pytest.mark.parametrize("kind", ["kl", "kl_mass"])
def test_a_token_that_cannot_come_costs_nothing(kind, weights, backend):
    """Its logit is -inf in the reference, and then in the model too; neither makes NaN."""
    case = make_case(6, 20, 5, k=3, kind=kind, constraint={"token_weights": weights}, weighted=True)
    case.reference[:, 1] = -torch.inf
    token = case.settings["safety"].token_ids[1]
    case.labels[case.labels == token] = -100
    got = [case.run(backend=backend)]
    case.bias = torch.zeros(20, dtype=torch.float64)
    case.bias[token] = -torch.inf
    got.append(case.run(backend=backend))
    for values in got:
        assert all(values[name].isfinite().all() for name in ("loss", "hidden_states", "weight"))
    # of proportions the token is no part: what is left of the constraint is that of the others
    if kind == "kl" and weights is None:
        safety = case.settings["safety"]
        others = replace(safety, token_ids=[t for t in safety.token_ids if t != token])
        case.settings["safety"], case.reference = others, case.reference[:, [0, 2]]
        assert_close(got[1], case.run(backend=backend), 1e-12)


@pytest.mark.parametrize("kind", ["mse", "logprob", "kl", "kl_mass"])
def test_gradcheck(kind):
    """The derivative of every constraint with all options on equals finite differences."""
    case = make_case(
        5,
        11,
        4,
        k=3,
        kind=kind,
        bias=True,
        weighted=True,
        softcap=4.0,
        logit_scale=1.3,
        label_smoothing=0.1,
        z_loss=0.01,
    )
    leaves = [x.requires_grad_() for x in (case.hidden_states, case.weight, case.bias)]

    def loss(backend):
        return lambda hidden, weight, bias: linear_cross_entropy(
            hidden,
            weight,
            case.labels,
            bias=bias,
            reference=case.reference,
            position_weights=case.position_weights,
            backend=backend,
            reduction="none",
            **case.settings,
        )

    assert torch.autograd.gradcheck(loss("dense"), leaves)
    assert torch.autograd.gradcheck(loss("torch"), leaves)
