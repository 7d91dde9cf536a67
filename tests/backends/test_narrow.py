"""Few rows of 16-bit operands: the pass that reads the weight once, against the fp64 truth."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from str_kernels import VocabularyIndex
from str_kernels.backends.torch import TorchBackend, backend, exact, narrow
from str_kernels.engine import forward
from str_kernels.engine.contract import Head
from tests.backends.test_exact import OPTIONS, TOLERANCE
from tests.cpus import set_cpu
from tests.oracle import Case, assert_close, make_case, relative_error

pytestmark = pytest.mark.one_in(3)

HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def passes(monkeypatch):
    """Cut small problems too: pieces of 11 rows of the weight, blocks of 3 pieces at most."""
    monkeypatch.setattr(narrow, "_CACHEFUL", 11 * 24)
    monkeypatch.setattr(narrow, "_CACHEFULS", 3)
    monkeypatch.setattr(forward, "_KEPT", 0)  # kept probabilities are the other pass's
    found = []

    def narrow_pass(*args):
        found.append(narrow.narrow_pass(*args))
        return found[-1]

    monkeypatch.setattr(exact, "narrow_pass", narrow_pass)
    return found


@pytest.mark.parametrize("rows", [1, 2, 37])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option_equals_the_truth(passes, options, dtype, rows):
    """In each dtype and option, of one row, of two and of many; smoothing needs the other pass."""
    case = make_case(rows, ignored=0.3 if rows > 2 else 0.0, **options).to(dtype)
    got, truth = case.run(), case.truth()
    assert_close(got, truth, TOLERANCE[dtype])
    assert abs(got["loss"] - truth["loss"]) <= 3e-6 * truth["loss"]
    smooth = "label_smoothing" in options
    assert passes == [] if smooth else len(passes) == 1 and passes[0] is not None


def test_without_rows():
    """Nothing has a label: a zero loss, zero gradients."""
    case = make_case(5, ignored=1.1).to(torch.bfloat16)
    assert_close(case.run(), case.truth(), 1e-6)


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize(
    ("tokens", "value", "taken"),
    [
        (slice(200, 201), 200.0, False),  # too far above the first ones for their shift
        (slice(0, 33), -1e9, False),  # all tokens of the first block are masked
        (slice(0, 33), float("-inf"), True),
        (slice(40, 60), float("-inf"), True),
        (slice(299, 301), float("inf"), False),
        (slice(77, 78), float("nan"), False),
    ],
)
def test_logits_that_spread(passes, tokens, value, taken, rows):
    """Logits too far above the shift are left to the other pass; all are right, or not finite."""
    case = make_case(rows, bias=True, ignored=0.0).to(torch.bfloat16)
    case.bias[tokens] = value
    case.labels[:] = torch.arange(rows) + 100
    got, truth = case.run(), case.truth()
    if value < 1e3:
        assert abs(got["loss"] - truth["loss"]) <= 1e-5 * truth["loss"]
        assert_close({"h": got["hidden_states"]}, {"h": truth["hidden_states"]}, 2.0**-8)
    else:
        assert not got["loss"].isfinite()
    assert (passes[0] is not None) == taken


def test_autocast_rounds_the_weight():
    """An fp32 weight is rounded to bf16 first, as for many rows."""
    case = make_case(3, ignored=0.0).to(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = case.run()
    rounded = case.to(torch.bfloat16)
    assert abs(got["loss"] - rounded.truth()["loss"]) < 1e-6 * got["loss"]


@pytest.fixture
def as_such(monkeypatch):
    """As on a CPU that multiplies bf16, with a weight that leaves its cache."""
    set_cpu(monkeypatch, bf16=True)
    monkeypatch.setattr(narrow, "_LARGE", 0)
    monkeypatch.setattr(narrow, "_PRODUCT", 100 * 24)


def bf16_head(case: Case) -> dict[str, torch.Tensor]:
    """Loss and gradient of the hidden states of a head whose products are of bf16."""
    hidden = case.hidden_states.clone().requires_grad_()
    logits = F.linear(hidden, case.weight, case.bias) * case.settings.get("logit_scale", 1.0)
    if softcap := case.settings.get("softcap"):
        logits = torch.tanh(logits / softcap) * softcap
    loss = F.cross_entropy(logits.float(), case.labels)
    loss.backward()
    return {"loss": loss.detach(), "hidden_states": hidden.grad}


@pytest.mark.parametrize("rows", [1, 3, 37])
@pytest.mark.parametrize(
    "options", [{}, {"bias": True, "logit_scale": 0.3}, {"softcap": 5.0}], ids=str
)
def test_products_of_bf16(passes, as_such, options, rows):
    """The loss is three times as exact as a bf16 head's, over ten seeds, its gradient no less."""
    ours, heads = [], []
    for seed in range(10):
        case = make_case(rows, ignored=0.0, seed=seed, **options).to(torch.bfloat16)
        truth = case.truth()
        for errors, got in ((ours, case.run()), (heads, bf16_head(case))):
            errors.append([relative_error(got[x], truth[x]) for x in ("loss", "hidden_states")])
    assert all(dense is not None for dense in passes)
    assert len(passes) == 10
    (loss, gradient), (head_loss, head_gradient) = (
        torch.tensor(errors).square().mean(0).sqrt().tolist() for errors in (ours, heads)
    )
    assert loss < head_loss / 3
    assert gradient < head_gradient


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("has", [True, False])
@pytest.mark.parametrize("rows", [1, 2])
def test_which_products_are_of_bf16(monkeypatch, dtype, has, rows):
    """Those of one row, and of a few where the CPU has instructions; never of other dtypes."""
    set_cpu(monkeypatch, bf16=has)
    case = make_case(rows).to(dtype)
    head = Head(case.hidden_states, case.weight, None)
    assert not narrow._multiplies_as_such(head)  # the weight lies in the cache
    monkeypatch.setattr(narrow, "_LARGE", 0)
    assert narrow._multiplies_as_such(head) == (dtype == torch.bfloat16 and (has or rows == 1))


def test_few_rows_are_not_filtered(monkeypatch):
    """By default, even with an index; a filter that was asked for is applied."""
    monkeypatch.setattr(backend, "FEWEST_FILTERED", 129)
    case = make_case(5, ignored=0.0).to(torch.float32)
    index = VocabularyIndex.build(case.weight, case.hidden_states)
    assert_close(case.run(index=index), case.truth(), 5e-6)
    assert not TorchBackend().filters(torch.float32, torch.device("cpu"), 128)
    assert TorchBackend().filters(torch.float32, torch.device("cpu"), 129)
