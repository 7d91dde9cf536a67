"""What a backward needs: K rows of a frozen head, whose weight may be gone by then."""

from __future__ import annotations

import pytest
import torch

from str_kernels import linear_cross_entropy
from tests.oracle import assert_close, make_case, relative_error

KINDS = ("none", "mse", "kl", "logprob")


def case_of(kind, dtype=torch.float32, **more):
    constraint = {} if kind == "none" else {"k": 5, "kind": kind, "weighted": True}
    return make_case(bias=True, softcap=20.0, **constraint, **more).to(dtype)


def forward(case, weight, hidden, **more):
    return linear_cross_entropy(
        hidden,
        weight,
        case.labels,
        bias=case.bias,
        reference=case.reference,
        position_weights=case.position_weights,
        **{**case.settings, **more},
    )


@pytest.mark.parametrize("eps", [0.0, 2.0**-11], ids=["exact", "filtered"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_frozen_weight_is_not_saved_and_may_be_freed(kind, eps):
    """No tensor of V rows is saved, and both backwards are right without the weight's storage."""
    case = case_of(kind)
    hidden, weight, saved = case.hidden_states.clone().requires_grad_(), case.weight.clone(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        loss = forward(case, weight, hidden, filter_eps=eps)
    storage = weight.untyped_storage()
    assert not [x.shape for x in saved if x.dim() == 2 and x.numel() and len(x) == len(weight)]
    assert storage.data_ptr() not in [x.untyped_storage().data_ptr() for x in saved if x.numel()]
    storage.resize_(0)
    first = torch.autograd.grad(loss, hidden, retain_graph=True)[0]
    second = torch.autograd.grad(loss, hidden, retain_graph=True)[0]
    assert torch.equal(first, second)
    case.settings["filter_eps"] = eps
    assert_close(
        {"loss": loss.detach(), "hidden_states": first},
        {name: x for name, x in case.truth().items() if name in ("loss", "hidden_states")},
        tolerance=1e-5 if eps == 0.0 else 5e-3,
    )
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(loss, hidden, create_graph=True)


@pytest.mark.parametrize("kind", ["none", "logprob"])
def test_compiled_code_saves_as_little(kind):
    """The operator's backward is right without the storage of a frozen weight as well."""
    torch._dynamo.reset()
    case = case_of(kind)
    hidden, weight = case.hidden_states.clone().requires_grad_(), case.weight.clone()
    want = torch.autograd.grad(forward(case, weight, hidden, filter_eps=0.0), hidden)[0]
    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
    loss = compiled(case, weight, hidden, filter_eps=0.0)
    weight.untyped_storage().resize_(0)
    torch.testing.assert_close(torch.autograd.grad(loss, hidden)[0], want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_kept_rows_have_the_dtype_of_the_hidden_states(dtype):
    """Autocast rounds the weight for the forward, so the backward gets it rounded: half of fp32."""
    case, saved = case_of("mse"), []
    hidden = case.hidden_states.to(dtype).requires_grad_()
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x)
    with hooks, torch.autocast("cpu", dtype):
        loss = forward(case, case.weight, hidden, filter_eps=0.0)
    rows = [x for x in saved if x.shape == (5, hidden.shape[1])]
    assert [x.dtype for x in rows] == [dtype]
    found = torch.autograd.grad(loss, hidden)[0]
    assert relative_error(found, case.truth()["hidden_states"]) < torch.finfo(dtype).eps * 2


@pytest.mark.parametrize("trained", ["weight", "bias"])
def test_a_trained_head_keeps_its_weight(trained):
    """Its gradient recomputes the logits; a change before backward is noticed."""
    case = case_of("mse")
    hidden = case.hidden_states.clone().requires_grad_()
    getattr(case, trained).requires_grad_()
    loss = forward(case, case.weight, hidden)
    with torch.no_grad():
        case.weight.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
