"""The public function: what it accepts, what it refuses, and the edges in between."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

import str_kernels
from str_kernels import LinearCrossEntropyLoss, SafetyConstraint, linear_cross_entropy
from str_kernels.backends import TorchBackend
from str_kernels.bench.launches import counted_launches
from str_kernels.options import DEFAULT_STRENGTHS
from str_kernels.training.settings import TrainSettings
from tests.oracle import assert_close, make_case, relative_error

SAFETY = SafetyConstraint([1, 2], 0.5)


def call(**changes):
    """A small valid call with some arguments replaced."""
    arguments = {
        "hidden_states": torch.randn(2, 3, 4),
        "weight": torch.randn(7, 4),
        "labels": torch.randint(0, 7, (2, 3)),
        **changes,
    }
    return linear_cross_entropy(**arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_states": [1.0]}, "hidden_states is a list"),
        ({"hidden_states": torch.ones(2, 3, 4).long()}, r"hidden_states \[2, 3, 4\] int64"),
        ({"hidden_states": torch.randn(2, 3, 5)}, "D=4"),
        ({"weight": torch.randn(7, 4).half()}, r"weight \[7, 4\] float16"),
        ({"weight": torch.randn(28)}, r"weight \[28\].*must be \[V, D\]"),
        ({"weight": torch.randn(7, 4, device="meta")}, "meta device"),
        ({"labels": torch.zeros(2, 4).long()}, r"labels \[2, 4\].*\[2, 3\]"),
        ({"labels": torch.zeros(2, 3)}, "labels.*must be int64"),
        ({"labels": torch.tensor([[0, 1, 2], [3, 4, 7]])}, r"labels\[1, 2\]=7: .*0 to 6"),
        ({"labels": torch.tensor([[0, 1, 2], [3, -1, 5]])}, r"labels\[1, 1\]=-1"),
        ({"bias": torch.randn(6)}, r"bias \[6\].*V=7"),
        ({"safety": SAFETY}, "reference=None"),
        ({"safety": SAFETY, "reference": torch.randn(3)}, r"reference \[3\].*K=2"),
        (
            {"safety": SafetyConstraint([1, 9], 1.0), "reference": torch.randn(2)},
            "token_ids holds 9: the head has 7 rows",
        ),
        ({"reference": torch.randn(2)}, "without safety"),
        ({"position_weights": torch.ones(2, 3)}, "without safety"),
        (
            {
                "safety": SAFETY,
                "reference": torch.randn(2),
                "position_weights": torch.full((2, 3), -1.0),
            },
            r"position_weights\[0, 0\]=-1.0",
        ),
        (
            {"safety": SAFETY, "reference": torch.randn(2, requires_grad=True)},
            "reference requires a gradient",
        ),
        ({"softcap": 0.0}, "softcap=0.0"),
        ({"label_smoothing": 1.5}, "label_smoothing=1.5"),
        ({"z_loss": -1.0}, "z_loss=-1.0"),
        ({"reduction": "avg"}, "reduction='avg'"),
        ({"logit_scale": float("inf")}, r"logit_scale=inf: must be a finite number\.$"),
        ({"filter_eps": 1.0}, "filter_eps=1.0"),
        ({"filter_eps": "Auto"}, "filter_eps='Auto': must be 'auto' or a number"),
        ({"num_items_in_batch": -1}, "num_items_in_batch=-1"),
        ({"num_items_in_batch": float("inf")}, "num_items_in_batch=inf"),
        ({"num_items_in_batch": 4, "reduction": "sum"}, "denominator of reduction='mean'"),
        ({"backend": "cuda"}, "backend='cuda': must be one of"),
        ({"backend": TorchBackend}, "must be a name or a Backend instance"),
        ({"index": "index.safetensors"}, "index='index.safetensors': must be a VocabularyIndex"),
        ({"screen": "fp4"}, "screen='fp4'"),
        ({"screen": "fp8"}, "screen='fp8': the torch backend has no fp8 screen"),
        ({"screen": "bf16", "backend": "dense"}, "screen='bf16': backend='dense'"),
        ({"screen": "bf16", "filter_eps": 0.0}, "screen='bf16' with filter_eps=0.0"),
    ],
    ids=lambda x: str(x)[:40] if isinstance(x, str) else "",
)
def test_bad_input_is_named(changes, message):
    """Each mistake is a ValueError that names the argument, its value and the rule."""
    with pytest.raises(ValueError, match=message):
        call(**changes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], 1.0), "0 entries"),
        ((range(1025), 1.0), "1025 entries"),
        (([3, 5, 3], 1.0), "holds 3 2 times"),
        (([-1], 1.0), r"token_ids\[0\]=-1"),
        (([1, 2], -1.0), "strength=-1.0"),
        (([1, 2], float("nan")), "strength=nan"),
        (([1], 1.0), "1 entry with a weight above 0: kind='kl' compares the proportions"),
        (([1, 2], 1.0, "kl", [0.0, 1.0]), "1 entry with a weight above 0"),
        (([1], 1.0, "l2"), "kind='l2'"),
        (([1], 1.0, "mse", [1.0, 2.0]), "token_weights has 2 entries"),
        (([1], 1.0, "mse", [0.0]), "all zero"),
        (([1], 1.0, "floor"), "kind='floor' was removed in 0.2: .* use kind='kl'"),
        (([1], "auto", "mse"), "strength='auto' was removed in 0.2: .*give a number"),
        (([1], "much", "mse"), "strength='much'"),
        (([1], 1.0, "mse", None, 2.0), "temperature=2.0: only kind='kl'"),
        (([1], 1.0, "kl_mass", [3.0]), "with 1 weighted token does not hold; leave"),
        (([1, 2], 1.0, "kl_mass", [0.0, 3.0], 2.0), "with 1 weighted token does not hold; leave"),
    ],
)
def test_bad_constraints_are_named(arguments, message):
    """A constraint checks itself when it is built."""
    with pytest.raises(ValueError, match=message):
        SafetyConstraint(*arguments)


@pytest.mark.parametrize(("kind", "strength"), DEFAULT_STRENGTHS.items())
def test_a_strength_that_is_not_given(kind, strength):
    """Is the kind's own, by whatever door; and zero stays zero."""
    assert SafetyConstraint([1, 2], kind=kind).strength == strength
    assert TrainSettings("model", "data", "out", kind=kind).strength == strength
    assert SafetyConstraint([1, 2], 0.0, kind).strength == 0.0
    assert SafetyConstraint([1, 2]) == SafetyConstraint([1, 2], 10.0, "kl")


@pytest.mark.parametrize("ids", [np.array([3, 5]), list(np.array([3, 5])), torch.tensor([3, 5])])
def test_numbers_of_other_libraries(ids):
    """Ids and strengths out of numpy and torch are the integers and numbers that they look like."""
    safety = SafetyConstraint(ids, np.float32(0.5), token_weights=np.ones(2, dtype=np.float32))
    assert safety == SafetyConstraint((3, 5), 0.5, token_weights=(1.0, 1.0))
    assert all(type(token) is int for token in safety.token_ids)


@pytest.mark.parametrize("eps", [0.0, 2.0**-11])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_label_at_all(eps, reduction):
    """All labels ignored, or no position: zero, attached to the graph, gradients zero, no NaN."""
    for shape in ((5,), (0,)):
        hidden = torch.randn(*shape, 4, requires_grad=True)
        weight = torch.randn(300, 4, requires_grad=True)
        labels = torch.full(shape, -100)
        loss = linear_cross_entropy(hidden, weight, labels, filter_eps=eps, reduction=reduction)
        assert (loss == 0).all()
        loss.sum().backward()
        assert (hidden.grad == 0).all()
        assert (weight.grad == 0).all()


def test_constrained_positions_need_no_label():
    """A batch without labels can still be held: the penalty alone, over ``num_items_in_batch``."""
    case = make_case(ignored=1.0, k=3)
    case.position_weights = torch.ones(37, dtype=torch.float64)
    got = case.run(num_items_in_batch=10)
    assert got["loss"] > 0
    assert_close(got, case.truth(num_items_in_batch=10), 1e-11)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("eps", [0.0, 2.0**-11])
def test_broken_hidden_states_show(bad, eps):
    """NaN or inf in a row of the input shows in its loss and stays in its row."""
    case = make_case(8, 300, 6, ignored=0.0)
    case.hidden_states[3, 2] = bad
    got = case.run(reduction="none", filter_eps=eps, screen="exact")
    clean = torch.arange(8) != 3
    assert not got["loss"][3].isfinite()
    assert not got["hidden_states"][3].isfinite().all()
    assert got["loss"][clean].isfinite().all()
    assert got["hidden_states"][clean].isfinite().all()


@pytest.mark.parametrize("kind", ["mse", "logprob", "kl", "kl_mass"])
def test_broken_constrained_positions_show(kind):
    """NaN at a position that is only constrained shows in its penalty and in its gradient."""
    case = make_case(8, 300, 6, ignored=1.0, k=3, kind=kind, reduction="none")
    case.position_weights = torch.ones(8)
    case.hidden_states[3, 2] = float("nan")
    got = case.run()
    clean = torch.arange(8) != 3
    for name in ("loss", "hidden_states"):
        assert got[name][3].isnan().all()
        assert got[name][clean].isfinite().all()


@pytest.mark.parametrize("eps", [0.0, 2.0**-11])
def test_masked_vocabulary(eps):
    """A bias of -inf removes tokens, whole tiles of them too, as padded vocabularies do."""
    case = make_case(20, 600, 8, bias=True)
    case.labels[case.labels >= 250] = 3
    case.bias[250:] = -float("inf")
    got, truth = case.run(filter_eps=eps, screen="exact"), case.truth()
    for name in ("loss", "hidden_states"):
        assert (got[name] - truth[name]).norm() <= 0.01 * truth[name].norm()


def test_one_token_and_one_word():
    """N = 1; V = 1, where the loss is zero."""
    case = make_case(1, 50, 8, ignored=0.0)
    assert_close(case.run(), case.truth(), 1e-11)
    case = make_case(3, 1, 8, ignored=0.0)
    assert case.run()["loss"].abs() < 1e-12


def test_duplicate_rows_share():
    """Equal rows of the head get equal probability and the label's row its own gradient."""
    case = make_case(20, 40, 8)
    case.weight[20:] = case.weight[:20]
    assert_close(case.run(), case.truth(), 1e-11)


def test_non_contiguous_inputs():
    """Transposed, sliced and expanded inputs give what their copies give."""
    case = make_case(12, 60, 10, k=4, static=True)
    want = case.run()
    case.hidden_states = case.hidden_states.T.contiguous().T
    case.weight = torch.cat([case.weight, case.weight], 1)[:, :10]
    case.labels = torch.stack([case.labels, case.labels], 1)[:, 0]
    assert_close(case.run(), want, 1e-12)


def test_tied_weight_gets_both_gradients():
    """One tensor as embedding and head: both contributions add up."""
    table = torch.randn(30, 8, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(0, 30, (12,))
    results = []
    for backend in ("torch", "dense"):
        loss = linear_cross_entropy(table[ids], table, ids.roll(-1), backend=backend)
        results.append(torch.autograd.grad(loss, table)[0])
    torch.testing.assert_close(*results)


def test_leading_dimensions_and_parts():
    """``[B, T, D]`` in, ``[B, T]`` out; the parts add up and count."""
    case = make_case(24, 80, 8, k=3, reduction="none")
    loss, parts = linear_cross_entropy(
        case.hidden_states.view(4, 6, 8),
        case.weight,
        case.labels.view(4, 6),
        reference=case.reference.view(4, 6, 3),
        return_parts=True,
        **case.settings,
    )
    assert loss.shape == parts.lse.shape == parts.dead_mass.shape == (4, 6)
    torch.testing.assert_close(parts.cross_entropy + parts.penalty, loss)
    logits = case.hidden_states @ case.weight.T
    labelled = case.labels != -100
    correct = (logits.argmax(-1) == case.labels) & labelled
    assert parts.num_correct == correct.sum()
    assert parts.token_accuracy == correct.sum() / labelled.sum()
    torch.testing.assert_close(parts.lse.flatten()[labelled], logits.logsumexp(-1)[labelled])
    ids = list(case.settings["safety"].token_ids)
    got = parts.safety_logits.view(24, 3)[labelled]
    torch.testing.assert_close(got, logits[labelled][:, ids])


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_autocast_casts_like_linear(autocast):
    """Under autocast fp32 operands take part in its dtype, and gradients come back in fp32."""
    case = make_case(k=4).to(torch.float32)
    with torch.autocast("cpu", dtype=autocast):
        got = case.run()
    assert all(value.dtype == torch.float32 for value in got.values())
    rounded = case.to(autocast)
    rounded.reference = case.reference
    truth = rounded.truth()
    # both operands are rounded and all sums fp32; one gradient comes back through the cast
    torch.testing.assert_close(got["loss"].double(), truth["loss"], rtol=1e-6, atol=0)
    torch.testing.assert_close(got["weight"].double(), truth["weight"], rtol=1e-4, atol=1e-7)
    bound = 2.0**-8 if autocast == torch.bfloat16 else 2.0**-11
    assert relative_error(got["hidden_states"], truth["hidden_states"]) < bound


def test_no_grad_and_inference_mode():
    """Evaluation computes the same loss and saves nothing."""
    case = make_case(k=4)
    want = case.run()["loss"]
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            loss = linear_cross_entropy(
                case.hidden_states,
                case.weight,
                case.labels,
                reference=case.reference,
                **case.settings,
            )
        torch.testing.assert_close(loss, want)
        assert not loss.requires_grad


def test_constants_of_inference_mode():
    """Labels and a reference made under `inference_mode` take part in training as any others."""
    case = make_case(k=4)
    want = case.run()
    with torch.inference_mode():
        case.labels, case.reference = case.labels.clone(), case.reference.clone()
    assert_close(case.run(), want, 0.0)


def test_one_position_without_leading_dimensions():
    """A single hidden state ``[D]`` and a scalar label give a scalar, in every reduction."""
    case = make_case(1, 50, 8, ignored=0.0)
    want = case.run()["loss"]
    hidden = case.hidden_states[0].requires_grad_()
    for reduction in ("mean", "sum", "none"):
        loss = linear_cross_entropy(hidden, case.weight, case.labels[0], reduction=reduction)
        torch.testing.assert_close(loss.detach(), want)
        assert torch.autograd.grad(loss, hidden)[0].shape == (8,)


def test_module_is_the_function():
    """`LinearCrossEntropyLoss` fixes the settings and checks them at once."""
    case = make_case(softcap=5.0)
    module = LinearCrossEntropyLoss(**case.settings)
    torch.testing.assert_close(
        module(case.hidden_states, case.weight, case.labels), case.run()["loss"]
    )
    assert "softcap=5.0" in repr(module)
    with pytest.raises(ValueError, match=r"softcap=-1\.0"):
        LinearCrossEntropyLoss(softcap=-1.0)


def test_public_names():
    """The public interface is exactly this, and each name can be had."""
    assert set(str_kernels.__all__) == {
        "AnchoredCollator",
        "LinearCrossEntropyLoss",
        "LossParts",
        "SafetyConstraint",
        "SafetyLogCallback",
        "SafetyProbe",
        "SafetyTokens",
        "VocabularyIndex",
        "VocabularyShard",
        "__version__",
        "linear_cross_entropy",
        "patch_model",
        "plan",
        "unpatch_model",
    }
    assert all(getattr(str_kernels, name) is not None for name in str_kernels.__all__)


def test_import_is_light():
    """Importing the package and its loss loads neither triton nor transformers."""
    code = (
        "import sys, str_kernels; str_kernels.linear_cross_entropy; "
        "print([m for m in ('triton', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("count", [3, 2.5, 0, torch.tensor(3), torch.tensor([0])], ids=str)
def test_the_denominator_is_not_copied_to_the_device(count):
    """A number stays on the host; the mean is the sum over it, and zero over nothing."""
    case = make_case(9, 40, 4)
    total = case.run(reduction="sum")
    with counted_launches() as found:
        mean = case.run(num_items_in_batch=count)
    assert not found.copies
    for name, value in total.items():
        torch.testing.assert_close(mean[name], value / float(count) if count else value * 0.0)
