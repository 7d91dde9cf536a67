"""Losses and gradients are exact relative to themselves, however large the logits are.

The logits are exact: hidden states and rows are small integers over powers of two, and one column
gives all logits the same large offset. So any error is the loss's own.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from str_kernels import SafetyConstraint, linear_cross_entropy
from str_kernels.constraint import constraint_terms
from str_kernels.engine.contract import Backend, Head, RowInputs
from str_kernels.engine.logits import log_probabilities
from str_kernels.options import LossOptions
from str_kernels.terms import row_terms
from tests.oracle import Case, filtered_truth, relative_error

pytestmark = pytest.mark.one_in(3)

# (common offset, spread of the logits around it)
LEVELS = [(0, 1), (64, 1), (1000, 1), (16384, 1), (-16384, 1), (0, 1024), (16384, 16)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Rounding of sums over 500 terms, which some libraries make one after the other; gradients of 16
# bits are rounded once more. A weight's are differences between rows, which magnifies that.
LOSS = 1e-6
GRADIENT = {torch.float32: 5e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
OPTIONS = [
    {},
    {"label_smoothing": 0.1, "bias": True},
    {"z_loss": 2.0**-14},
    {"kind": "mse"},
    {"kind": "logprob"},
    {"kind": "kl", "temperature": 2.0},
    {"kind": "kl_mass"},
]


# far apart, a log-probability is as large as the logits, and so is its rounding
CASES = [
    (options, level)
    for options in OPTIONS
    for level in LEVELS
    if level[1] == 1 or options.get("kind") not in ("logprob", "kl", "kl_mass")
]


def large_case(offset: int, spread: int, n: int = 24, vocab: int = 500, **options) -> Case:
    """Build logits that are exact in fp32, from operands that are exact in bf16 and fp16."""
    g = torch.Generator().manual_seed(5)

    def integers(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(-high, high + 1, shape, generator=g).double()

    hidden = torch.cat([torch.full((n, 1), offset), torch.ones(n, 1), integers(2, n, 6)], 1)
    weight = torch.cat([torch.ones(vocab, 1), torch.zeros(vocab, 1), integers(2, vocab, 6) / 4], 1)
    # a tile's mass differs from another's, so that some are dead
    weight[:, 1] = -(torch.arange(vocab) // 128).double()
    weight[:, 1:] *= spread
    logits = hidden @ weight.T
    labels = (logits + 2.0 * spread * integers(3, n, vocab)).argmax(-1)
    labels[::4] = -100
    bias = integers(8, vocab) / 8 if options.pop("bias", False) else None
    reference = weights = None
    if "kind" in options:
        ids = [3, 200, 77, vocab - 56]
        extra = {"temperature": options.pop("temperature")} if "temperature" in options else {}
        safety = SafetyConstraint(ids, 2.0**-6, kind=options.pop("kind"), **extra)
        values = logits if safety.kind in ("mse", "kl") else logits.log_softmax(-1)
        # near what is there, as in training, and exact in every dtype
        reference = (values[:, ids] / 8).round() * 8 + integers(1, n, 4) * 8
        if safety.kind == "kl_mass":
            reference = torch.nn.functional.pad(reference, (0, 1))
        weights = torch.ones(n)
        options["safety"] = safety
    return Case(hidden, weight, labels, bias, reference, weights, options)


def upstream_of(case: Case) -> torch.Tensor:
    # small, as a mean's: 16384 times a few rows' gradients would leave fp16's range
    return (torch.rand(len(case.labels), generator=torch.Generator().manual_seed(1)) + 0.5) / 16


def check(case: Case, dtype: torch.dtype, truth: dict[str, torch.Tensor], **overrides) -> None:
    """Each row's loss and every gradient, relative to themselves."""
    cast = replace(case.to(dtype), reference=case.reference)  # which 16 bits would round
    got = cast.run(upstream_of(case), reduction="none", **overrides)
    # terms of a divergence cancel: near the reference its rounding is that of a probability
    divergence = "safety" in case.settings and case.settings["safety"].kind in ("kl", "kl_mass")
    atol = 2.0**-23 if divergence else 0
    torch.testing.assert_close(got["loss"].double(), truth["loss"], rtol=LOSS, atol=atol)
    for name in got.keys() - {"loss"}:
        assert relative_error(got[name], truth[name]) <= GRADIENT[dtype], name


def truth_of(case: Case) -> dict[str, torch.Tensor]:
    return case.truth(upstream_of(case), reduction="none")


def dead_truth(case: Case, eps: float) -> dict[str, torch.Tensor]:
    """What the filter promises, which some dead tiles change."""
    order = torch.arange(len(case.weight))
    return filtered_truth(case, upstream_of(case).double(), eps, order)


def test_two_logits_of_which_the_loss_is_known():
    """16384 and 16383.5: log(1 + e^-0.5), which a sum with the logits would round to 0.47461."""
    hidden, weight = torch.tensor([[16384.0, 1.0]]), torch.tensor([[1.0, 0.0], [1.0, -0.5]])
    for backend in ("torch", "dense"):
        loss = linear_cross_entropy(hidden, weight, torch.tensor([0]), backend=backend)
        assert loss.item() == pytest.approx(0.4740769841801067, rel=1e-7)


def test_a_confident_row_keeps_a_loss_below_rounding():
    """A loss of e^-30 is far below the rounding of any logit."""
    head = torch.tensor([[30.0], [0.0]])
    loss = linear_cross_entropy(torch.ones(1, 1), head, torch.tensor([0]), backend="torch")
    assert loss.item() == pytest.approx(9.357622968839299e-14, rel=1e-6)


@pytest.mark.parametrize(("options", "level"), CASES, ids=str)
def test_exact_path(options, level):
    """Without a filter, in every dtype; the materialised head too."""
    case = large_case(*level, **options)
    truth = truth_of(case)
    for dtype in DTYPES:
        check(case, dtype, truth, backend="torch", filter_eps=0.0)
    check(case, torch.float32, truth, backend="dense")


@pytest.mark.parametrize(("options", "level"), CASES, ids=str)
def test_routed(options, level):
    """All tiles refined, and some approximated: their masses are as exact."""
    case = large_case(*level, **options)
    truth = truth_of(case)
    check(case, torch.float32, truth, backend="torch", filter_eps=1e-30, screen="exact")
    # a larger spread leaves no other tile any mass; the promise does not know what is left out
    if level[1] == 1 and options.get("kind") != "kl_mass":
        promised = dead_truth(case, 0.25)
        # the promise is another gradient
        assert relative_error(promised["hidden_states"], truth["hidden_states"]) > 1e-4
        check(case, torch.float32, promised, backend="torch", filter_eps=0.25, screen="exact")


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [("weight",), ()])
def test_compiled_code(frozen):
    """The operator hands the same numbers on."""
    case = large_case(16384, 1, kind="logprob")
    truth, case = truth_of(case), case.to(torch.float32)

    def loss(hidden, weight):
        return linear_cross_entropy(
            hidden,
            weight,
            case.labels,
            reference=case.reference,
            position_weights=case.position_weights,
            reduction="none",
            **case.settings,
        )

    hidden = case.hidden_states.clone().requires_grad_()
    weight = case.weight.clone().requires_grad_("weight" not in frozen)
    losses = torch.compile(loss, fullgraph=True, backend="aot_eager")(hidden, weight)
    torch.testing.assert_close(losses.double(), truth["loss"], rtol=LOSS, atol=0)
    (losses * upstream_of(case)).sum().backward()
    assert relative_error(hidden.grad, truth["hidden_states"]) <= GRADIENT[torch.float32]
    if not frozen:
        assert relative_error(weight.grad, truth["weight"]) <= GRADIENT[torch.float32]


def check_statistics(case: Case, backend: str | Backend) -> None:
    """Entropies and log-probabilities, which references and drift are made of."""
    logits = case.hidden_states.double() @ case.weight.double().T
    found = row_terms(
        Head(case.hidden_states, case.weight, None),
        RowInputs(case.labels, case.reference, case.position_weights),
        LossOptions(**case.settings),
        backend=backend,
        entropy=True,
    ).statistics
    want, ids = logits.log_softmax(-1), list(case.settings["safety"].token_ids)
    # a sum of probabilities near 1 is rounded there
    atol = 2.0**-22
    got = log_probabilities(found.safety_logits, found).double()
    torch.testing.assert_close(got, want[:, ids], rtol=LOSS, atol=atol)
    entropy = -(want.exp() * want).sum(-1)
    torch.testing.assert_close(found.entropy.double(), entropy, rtol=3e-6, atol=atol)


@pytest.mark.parametrize("backend", ["torch", "dense"])
@pytest.mark.parametrize("level", LEVELS, ids=str)
def test_statistics(level, backend):
    """Of exact logits at every level."""
    check_statistics(large_case(*level, kind="logprob").to(torch.float32), backend)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_kl_of_large_logits(temperature):
    """The offset leaves before the division, whose quotient would be rounded."""
    values = 16384 + torch.tensor([[0.0, 0.5, -1.0, 40.0]])
    reference = -16384 + torch.tensor([1.0, 0.0, -0.5, 0.0])
    weights = (1.0, 2.0, 0.5, 0.0)
    safety = SafetyConstraint(range(4), kind="kl", token_weights=weights, temperature=temperature)
    p, q = (
        torch.softmax(x.double()[..., :3] / temperature + torch.tensor(weights[:3]).log(), -1)
        for x in (values, reference)
    )
    want = temperature**2 * F.kl_div(p.log(), q[None], reduction="sum")
    got = constraint_terms(safety, values, reference)
    assert got.value.item() == pytest.approx(want.item(), rel=2e-6)
    torch.testing.assert_close(
        got.d_logits[:, :3].double(), temperature * (p - q), rtol=2e-6, atol=0
    )


def test_a_token_without_weight_may_be_far_above_the_others():
    """Its probability, which kl does not compare, would overflow."""
    safety = SafetyConstraint([0, 1, 2], kind="kl", token_weights=(1.0, 1.0, 0.0))
    values, reference = torch.tensor([[0.0, 1.0, 400.0]]), torch.tensor([1.0, 0.0, 400.0])
    want = constraint_terms(safety, values.clamp(max=1.0), reference.clamp(max=1.0))
    for got, other in zip(constraint_terms(safety, values, reference)[:2], want[:2], strict=True):
        torch.testing.assert_close(got, other)
