"""The kind ``kl_mass``, whose safety tokens every pass leaves out, against the plain formula.

Each backend is asked for losses and all gradients, also where the rest has nearly no probability,
or nearly all, which a difference of sums would lose.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from str_kernels import SafetyConstraint, VocabularyIndex, linear_cross_entropy
from str_kernels.engine.contract import Head, RowInputs
from str_kernels.options import LossOptions
from str_kernels.terms import row_terms
from tests.oracle import Case, assert_close, make_case

pytestmark = pytest.mark.one_in(3)

OPTIONS = [
    {},
    {"weighted": True, "scale": 6.0, "static": True},
    {"bias": True, "softcap": 4.0, "logit_scale": 1.3, "label_smoothing": 0.1, "z_loss": 0.01},
    {"logit_scale": -0.7, "label_smoothing": 0.1, "weighted": True},
    {"k": 200, "weighted": True, "uneven": True, "constraint": {"temperature": 2.0}},
    {"vocab": 6},  # the rest is one token, and may be the label
    {"vocab": 130, "k": 129, "softcap": 3.0},  # a tile of safety tokens alone
]
TOLERANCES = {
    torch.float64: (1e-10, 1e-6),
    torch.float32: (2e-5, 2e-5),
    torch.bfloat16: (0.01,) * 2,
}


def rest_case(n: int = 37, dim: int = 24, *, dtype=torch.float64, **options) -> Case:
    """A case of this kind; the loss is that of each row."""
    made = {"k": 5, "kind": "kl_mass", "reduction": "none", "vocab": 301, **options}
    return make_case(n, made.pop("vocab"), dim, **made).to(dtype)


def extreme_case(shift: float, dtype: torch.dtype, **options) -> Case:
    """The safety tokens' logits are ``shift`` above the others', and the reference is not."""
    case = rest_case(dtype=dtype, dim=25, scale=0.3, weighted=True, **options)
    ids = list(case.settings["safety"].token_ids)
    case.hidden_states[:, -1] = 1.0
    case.weight[:, -1] = 0.0
    case.weight[ids, -1] += shift
    return case


def upstream_of(case: Case) -> torch.Tensor:
    """A gradient that differs from row to row."""
    g = torch.Generator().manual_seed(1)
    return torch.rand(len(case.labels), generator=g, dtype=torch.float64)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("eps", [0.0, 1e-9], ids=["exact", "routed"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_loss_and_gradients_are_the_oracles(options, eps, dtype):
    """Of hidden states, weight and bias, with a label among the safety tokens too."""
    case = rest_case(dtype=dtype, **options)
    case.labels[0] = case.settings["safety"].token_ids[0]
    upstream = upstream_of(case)
    got = case.run(upstream, backend="torch", filter_eps=eps)
    assert_close(got, case.truth(upstream), TOLERANCES[dtype][eps > 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("eps", [0.0, 1e-9], ids=["exact", "routed"])
@pytest.mark.parametrize("shift", [-40.0, -12.0, 12.0, 40.0, 110.0])
def test_a_rest_of_nearly_nothing_or_nearly_all(shift, eps, dtype):
    """The probability of the rest is from e⁻¹¹⁰ to 1 - e⁻⁴⁰, and no gradient loses its digits."""
    case, only = extreme_case(shift, dtype), {"hidden_states"}
    upstream = upstream_of(case)
    got, want = case.run(upstream, backend="torch", filter_eps=eps), case.truth(upstream)
    if shift > 12.0:  # exp(z - lse) of the rest's tokens underflows in the gradient of a weight
        got, want = ({n: x[n] for n in ("loss", *only)} for x in (got, want))
    assert_close(got, want, 2e-5 if dtype == torch.float32 else 0.01)


@pytest.mark.parametrize("backend", ["dense", "torch"])
@pytest.mark.parametrize("shift", [-40.0, 0.0, 40.0])
def test_log_rest_is_exact_relative_to_itself(shift, backend):
    """``log p`` of the rest, near 0 and far below it."""
    case = extreme_case(shift, torch.float64)
    logits = case.hidden_states @ case.weight.T
    safety = torch.zeros(logits.shape[1], dtype=torch.bool)
    safety[list(case.settings["safety"].token_ids)] = True
    odds = logits[:, safety].logsumexp(-1) - logits[:, ~safety].logsumexp(-1)
    want = -torch.nn.functional.softplus(odds, threshold=700.0)
    options = LossOptions(**case.settings)
    inputs = RowInputs(case.labels, case.reference, torch.ones(len(case.labels)))
    head = Head(case.hidden_states, case.weight, None)
    got = row_terms(head, inputs, options, backend=backend).statistics.log_rest
    assert torch.allclose(got, want, rtol=1e-12 if backend == "torch" else 1e-2, atol=1e-15)


def test_who_stayed_pays_nothing_and_who_moved_its_mass_does():
    """``kl`` does not see a model that keeps proportions and leaves the safety tokens."""
    case = rest_case(n=9)
    safety, logits = case.settings["safety"], case.hidden_states @ case.weight.T
    ids = list(safety.token_ids)
    moved = logits.clone()
    moved[:, ids] -= 3.0
    log_p = logits.log_softmax(-1)
    inside = torch.zeros(logits.shape[1], dtype=torch.bool)
    inside[ids] = True
    rest = log_p[:, ~inside].logsumexp(-1, keepdim=True)
    head, labels = torch.eye(logits.shape[1], dtype=torch.float64), torch.full((9,), -100)

    def penalty(kind, states, reference):
        own = replace(safety, kind=kind, strength=1.0)
        settings = {"reduction": "sum", "position_weights": torch.ones(9), "safety": own}
        return linear_cross_entropy(states, head, labels, reference=reference, **settings).item()

    held = torch.cat([log_p[:, ids], rest], -1)
    assert abs(penalty("kl_mass", logits, held)) < 1e-12
    assert penalty("kl", moved, logits[:, ids]) < 1e-12
    assert penalty("kl_mass", moved, held) > 0.1


def test_a_rounded_reference_is_made_to_sum_to_one():
    """A cache in fp16 shifts all outcomes; the loss is that of their proportions."""
    case = rest_case()
    shifted = replace(case, reference=case.reference + 0.3)
    assert_close(shifted.run(backend="torch"), case.truth(), 1e-10)


def test_an_index_and_a_coarse_screen():
    """With tiles of an index and a bf16 screen the loss is near the truth."""
    case = rest_case(200, vocab=2000, dtype=torch.float32, k=40)
    index = VocabularyIndex.build(case.weight, case.hidden_states)
    got = case.run(backend="torch", index=index, screen="bf16", filter_eps=2.0**-11)
    assert_close(got, case.truth(), 0.02)


@pytest.mark.parametrize("needs", [pytest.param("hidden", marks=pytest.mark.slow), "all"])
def test_compiled_code_has_the_same(needs):
    """Through the operator, whose padded tensors have the rest's statistics too."""
    case = rest_case(dtype=torch.float32, weighted=True)
    upstream = upstream_of(case).float()

    def loss(hidden, weight):
        return linear_cross_entropy(
            hidden,
            weight,
            case.labels,
            reference=case.reference,
            position_weights=case.position_weights,
            backend="torch",
            **case.settings,
        )

    results = []
    for call in (loss, torch.compile(loss, backend="eager", fullgraph=True)):
        leaves = [case.hidden_states.clone().requires_grad_(), case.weight.clone()]
        leaves[1].requires_grad_(needs == "all")
        trained = leaves if needs == "all" else leaves[:1]
        results.append(torch.autograd.grad((call(*leaves) * upstream).sum(), trained))
    for eager, compiled in zip(*results, strict=True):
        assert torch.allclose(eager, compiled, rtol=1e-4, atol=1e-6)


def test_shapes_of_its_reference_and_of_its_vocabulary():
    """The reference has K + 1 columns, and some token must be no safety token."""
    case = rest_case()
    with pytest.raises(ValueError, match=r"K \+ 1=6 for kind='kl_mass'"):
        replace(case, reference=case.reference[:, :-1]).run(backend="torch")
    safety = SafetyConstraint(range(301), kind="kl_mass")
    with pytest.raises(ValueError, match="all the head's rows"):
        replace(case, settings={"safety": safety}).run(backend="torch")
