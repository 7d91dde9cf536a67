"""The exact path of the torch backend against the fp64 truth, values and every gradient."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from str_kernels import linear_cross_entropy
from str_kernels.backends.torch import TorchBackend
from str_kernels.backends.torch import weight as weight_stage
from str_kernels.engine import forward
from str_kernels.engine.logits import block_logits
from tests.oracle import Case, assert_close, make_case, relative_error

pytestmark = pytest.mark.one_in(3)

# Rounding of fp32 sums over a few hundred terms; for 16-bit operands the gradients are rounded once
# to the operand's own precision (2^-9 and 2^-12 relative, rms below that).
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}

OPTIONS = [
    {},
    {"bias": True, "logit_scale": 0.3},
    {"softcap": 5.0},
    {"label_smoothing": 0.1},
    {"label_smoothing": 0.1, "bias": True, "logit_scale": 0.3},
    {"z_loss": 0.01},
    {"bias": True, "softcap": 5.0, "label_smoothing": 0.1, "z_loss": 0.01, "logit_scale": 1.7},
    {"k": 1, "static": True},
    {"k": 7, "kind": "mse", "weighted": True, "uneven": True},
    {"k": 7, "kind": "mse", "softcap": 5.0},
    {"k": 7, "kind": "logprob", "weighted": True, "label_smoothing": 0.1, "z_loss": 0.01},
    {"k": 7, "kind": "logprob", "softcap": 5.0, "bias": True},
    {"k": 7, "kind": "kl", "constraint": {"temperature": 2.0}, "weighted": True},
    {"k": 7, "kind": "kl", "uneven": True, "static": True},
]


@pytest.fixture(autouse=True, scope="module", params=["kept", "made again"])
def probabilities(request):
    """Everything holds for small problems, which keep p for a trained weight, and for large."""
    with pytest.MonkeyPatch.context() as patching:
        if request.param == "made again":
            patching.setattr(forward, "_KEPT", 0)
        yield request.param


def test_few_probabilities_are_kept(monkeypatch, probabilities):
    """A small problem's weight gradient makes no logits again, a large one's does."""
    made = []

    def count(*operands):
        made.append(operands)
        return block_logits(*operands)

    monkeypatch.setattr(weight_stage, "block_logits", count)
    case = make_case()
    assert_close(case.run(), case.truth(), 1e-11)
    assert bool(made) == (probabilities == "made again")


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option_equals_the_truth(options, dtype):
    """Loss and gradients of hidden states, weight and bias, in each dtype and option."""
    case = make_case(**options).to(dtype)
    assert_close(case.run(), case.truth(), TOLERANCE[dtype])


@given(
    n=st.integers(1, 40),
    vocab=st.integers(2, 300),
    dim=st.integers(1, 20),
    seed=st.integers(0, 2**16),
    scale=st.sampled_from([0.1, 1.0, 5.0]),
    options=st.sampled_from(OPTIONS),
    budget=st.sampled_from([1, 1 << 16, 64 << 20]),
)
@settings(max_examples=40, deadline=None)
def test_any_shape_and_budget(n, vocab, dim, seed, scale, options, budget):
    """Ragged shapes, sharp and flat logits, blocks of every size: fp64 agrees to rounding."""
    options = {**options, "k": min(options.get("k", 0), vocab)}
    case = make_case(n, vocab, dim, seed=seed, scale=scale, **options)
    got = case.run(backend=TorchBackend(budget))
    # gradients below 1e-6 of the weight's size are sums of cancelling terms, in the truth as well
    for name, want in case.truth().items():
        assert (got[name] - want).norm() <= 1e-9 * (want.norm() + 1e-3), name


def test_each_row_has_its_own_upstream_gradient():
    """`reduction="none"` honours a different upstream gradient on each row, twice over."""
    case = make_case(k=5, weighted=True, reduction="none", kind="logprob")
    g = torch.Generator().manual_seed(1)
    for _ in range(2):
        upstream = torch.randn(37, generator=g, dtype=torch.float64)
        assert_close(case.run(upstream), case.truth(upstream), 1e-11)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_reductions(reduction):
    """Sum and mean share their terms with "none"; n is the number of labels."""
    case = make_case(k=5)
    rows = case.run(reduction="none")["loss"]
    count = 1 if reduction == "sum" else (case.labels != -100).sum()
    torch.testing.assert_close(case.run(reduction=reduction)["loss"], rows.sum() / count)


def test_accumulation_has_one_denominator():
    """One batch of 40 rows equals five of 8 with ``num_items_in_batch``, penalty included."""
    case = make_case(40, k=5, weighted=True)
    whole = case.run()
    total = {name: torch.zeros_like(value) for name, value in whole.items()}
    count = int((case.labels != -100).sum())
    for start in range(0, 40, 8):
        part = slice(start, start + 8)
        piece = make_case(40, k=5, weighted=True)
        piece.hidden_states, piece.labels = case.hidden_states[part], case.labels[part]
        piece.reference = case.reference[part]
        piece.position_weights = case.position_weights[part]
        for name, value in piece.run(num_items_in_batch=count).items():
            if name == "hidden_states":
                total[name][part] = value
            else:
                total[name] += value
    assert_close(total, whole, 1e-12)


@pytest.mark.parametrize("scale", [5, 40, 640])
def test_confident_rows_keep_their_gradient(scale):
    """Logits of 5 to 640: a row that is nearly right has the gradient of the truth, not zero.

    The label's probability minus one would cancel; in fp32 the others' sum has the rounding of the
    logits alone, ``scale · 2^-24`` each. Every row is weighed by one over its open mass, so that
    the least open one counts as much as any; below 1e-8 the truth itself cancels, in fp64.
    """
    case = make_case(64, 200, 16, ignored=0.0, reduction="none")
    case.hidden_states /= case.hidden_states.norm(dim=-1, keepdim=True)
    case.weight *= scale / case.weight.norm(dim=-1).max()
    logits = case.hidden_states @ case.weight.T
    case.labels = logits.argmax(-1)
    open_mass = logits.softmax(-1).scatter(1, case.labels[:, None], 0.0).sum(-1)
    case = case.to(torch.float32)
    upstream = torch.where(open_mass > 1e-8, 1 / open_mass, 0.0)
    assert upstream.max() > 1e3 or scale == 5
    got, truth = case.run(upstream), case.truth(upstream)
    del got["loss"], truth["loss"]
    assert_close(got, truth, max(5e-6, scale * 2.0**-22))


def test_logits_far_below_zero():
    """Logits of -2000: what was not summed yet is not scaled up, exp(2000) · 0 is no NaN."""
    case = make_case(bias=True, vocab=600).to(torch.float32)
    case.bias -= 2000
    # adding 2000 rounds the logits to 2^-13
    assert_close(case.run(backend=TorchBackend(1)), case.truth(), 2.0**-12)


@pytest.mark.parametrize("kind", ["mse", "logprob", "kl", "kl_mass"])
def test_prompt_rows_meet_the_vocabulary_only_for_kinds_that_read_it(kind):
    """Without a label a constrained position costs K columns, unless its kind reads the lse."""
    case = make_case(k=5, kind=kind)
    case.position_weights = torch.ones(37)
    rows = []

    class Counting(TorchBackend):
        def exact(self, block, wanted):
            rows.append(len(block.labels))
            return super().exact(block, wanted)

    case.run(backend=Counting())
    assert sum(rows) == (37 if kind in ("logprob", "kl_mass") else (case.labels != -100).sum())


def test_fp16_gradients_wait_for_the_loss_scale():
    """In fp16 a gradient that the upstream one makes representable is there in the end.

    One rounding of the result: 2^-11.
    """
    hidden, weight = torch.ones(1, 1).half(), torch.tensor([[8.0], [-8.0]]).half()
    case = Case(hidden, weight, torch.zeros(1).long())  # a gradient of 1.8e-6; fp16 knows 6e-8
    for factor, settings_ in ((2.0**12, {}), (1e-4, {"logit_scale": 1e4})):
        case.settings = {**settings_, "reduction": "none"}
        case.labels[:] = int("logit_scale" in settings_)  # the wrong one: a gradient of -1.6e5
        upstream = torch.tensor([factor])
        got, truth = case.run(upstream), case.truth(upstream)
        assert relative_error(got["hidden_states"], truth["hidden_states"]) < 2.0**-11


def test_frozen_parts_cost_nothing():
    """What needs no gradient gets none, and a frozen head saves no logits-sized tensor."""
    case = make_case(64, 3000, 16).to(torch.float32)
    saved = []
    hidden = case.hidden_states.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        loss = linear_cross_entropy(hidden, case.weight, case.labels)
    extra = [x for x in saved if x.data_ptr() != case.weight.data_ptr()]
    assert sum(x.nbytes for x in extra) < 4 * 64 * 16 * 4
    loss.backward()
    assert case.weight.grad is None


@pytest.mark.parametrize("eps", [0.0, 2.0**-11])
@pytest.mark.parametrize("name", ["hidden_states", "weight", "bias"])
def test_only_what_is_asked_for_is_computed(name, eps):
    """Each stage is told of the one gradient that can be asked for, and of none in evaluation."""
    asked = []

    class Spy(TorchBackend):
        def exact(self, block, wanted):
            asked.append(wanted.hidden)
            return super().exact(block, wanted)

        def refine(self, block, work, wanted):
            asked.append(wanted.hidden)
            return super().refine(block, work, wanted)

        def weight_gradients(self, *arguments, needs, **others):
            asked.append(needs)
            return super().weight_gradients(*arguments, needs=needs, **others)

    case = make_case(bias=True)
    getattr(case, name).requires_grad_()
    arguments = {"bias": case.bias, "filter_eps": eps, "backend": Spy()}
    loss = linear_cross_entropy(case.hidden_states, case.weight, case.labels, **arguments)
    loss.backward()
    needs = (name == "weight", name == "bias")
    assert asked == [name == "hidden_states", *([needs] if any(needs) else [])]
    with torch.no_grad():
        linear_cross_entropy(case.hidden_states, case.weight, case.labels, **arguments)
    assert asked[-1] is False


def test_backward_twice_and_double_backward():
    """`retain_graph` repeats the same gradient; a second derivative is refused."""
    case = make_case()
    hidden = case.hidden_states.requires_grad_()
    loss = linear_cross_entropy(hidden, case.weight, case.labels)
    first = torch.autograd.grad(loss, hidden, retain_graph=True)[0]
    second = torch.autograd.grad(loss, hidden, retain_graph=True)[0]
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(loss, hidden, create_graph=True)


@pytest.mark.parametrize("what", ["bias", "label", "scale", "token"])
def test_planted_faults_are_seen(what):
    """A dropped bias, a shifted label, a missed scale or a wrong token exceeds every tolerance."""
    import dataclasses

    case = make_case(bias=True, k=5, logit_scale=0.5).to(torch.bfloat16)
    truth, settings_ = case.truth(), case.settings
    if what == "bias":
        case.bias = torch.zeros_like(case.bias)
    elif what == "label":
        case.labels = case.labels.roll(1)
    elif what == "scale":
        case.settings = {**settings_, "logit_scale": 0.55}
    else:
        ids = settings_["safety"].token_ids
        wrong = dataclasses.replace(settings_["safety"], token_ids=(*ids[:-1], (ids[-1] + 1) % 301))
        case.settings = {**settings_, "safety": wrong}
    with pytest.raises(AssertionError):
        assert_close(case.run(), truth, TOLERANCE[torch.bfloat16])
