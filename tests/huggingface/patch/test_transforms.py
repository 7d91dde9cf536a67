"""torch's transforms of functions on a patched model: its own loss, or a refusal in words."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap

from str_kernels.huggingface import patch_model
from tests.huggingface.adapters import SAFETY, wrap
from tests.huggingface.dense import dense_loss
from tests.huggingface.models import batch, build, relative


def model_of():
    """With attention in plain operations, which have every derivative."""
    model = wrap(build()).eval()  # vmap refuses dropout, even of nothing
    model.config._attn_implementation = "eager"
    return model


def trained(model) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def loss_of(model, **inputs):
    return lambda parameters: functional_call(model, parameters, (), inputs).loss


def _forward_ad(model):
    with forward_ad.dual_level():
        duals = {name: forward_ad.make_dual(x, x) for name, x in trained(model).items()}
        return forward_ad.unpack_dual(loss_of(model, **batch())(duals)).tangent


def _forward_ad_of_embeddings(model):
    inputs = batch()
    states = model.get_input_embeddings()(inputs.pop("input_ids")).detach()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(states, states)
        return forward_ad.unpack_dual(model(inputs_embeds=dual, **inputs).loss).tangent


def _by_example(model):
    names = list(batch())

    def loss(parameters, *row):
        inputs = {name: x[None] for name, x in zip(names, row, strict=True)}
        return loss_of(model, **inputs)(parameters)

    return vmap(grad(loss), (None, 0, 0, 0))(trained(model), *batch().values())


WAYS = {
    "grad": lambda model: grad(loss_of(model, **batch()))(trained(model)),
    "grad by logits": lambda model: grad(
        lambda p: functional_call(model, p, (), batch()).logits.square().mean()
    )(trained(model)),
    "by example": _by_example,
    "vmap": lambda model: vmap(loss_of(model, **batch()))(
        {name: torch.stack([x, 2 * x]) for name, x in trained(model).items()}
    ),
    "jvp": lambda model: jvp(loss_of(model, **batch()), (trained(model),), (trained(model),))[1],
    "forward mode": _forward_ad,
    "forward mode by embeddings": _forward_ad_of_embeddings,
}


@pytest.mark.parametrize("name", WAYS)
def test_the_model_s_own_loss(name):
    """Without a constraint: what the unpatched model gives, said once."""
    model, way = model_of(), WAYS[name]
    want = way(model)
    with patch_model(model), pytest.warns(UserWarning, match="computes its own loss"):
        got = way(model)
    if isinstance(want, torch.Tensor):
        got, want = {"result": got}, {"result": want}
    assert got.keys() == want.keys()
    assert max(relative(got[name], want[name]) for name in want) <= 1e-6


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("backend", ["auto", "dense"])
def test_a_constraint_is_refused(name, backend):
    """With what to do instead."""
    model = model_of()
    with (
        patch_model(model, SAFETY, backend=backend),
        pytest.raises(ValueError, match=r"safety=None, or call linear_cross_entropy.*torch\.func"),
    ):
        WAYS[name](model)


def second_derivative(model, make_loss) -> list[torch.Tensor]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    first = torch.autograd.grad(make_loss(), parameters, create_graph=True)
    return torch.autograd.grad(sum(x.square().sum() for x in first), parameters)


def test_second_derivatives():
    """Refused by the fused loss; the dense backend has them, of both terms."""
    model, inputs = model_of(), batch()
    want = second_derivative(model, lambda: dense_loss(model, inputs, SAFETY, "all"))
    with (
        patch_model(model, SAFETY),
        pytest.raises(RuntimeError, match=r"differentiable once.*backend='dense'"),
    ):
        second_derivative(model, lambda: model(**inputs).loss)
    with patch_model(model, SAFETY, backend="dense"):
        got = second_derivative(model, lambda: model(**inputs).loss)
    # second derivatives of two layers in fp32, as sums of differences of that size
    assert max(map(relative, got, want)) <= 1e-4


def test_second_derivatives_of_logits():
    """Logits that torch functions read have them; below these they are refused, not dropped."""
    model, inputs = model_of(), batch()

    def by_function():
        return model(**inputs).logits.square().mean()

    def below():
        with torch._C.DisableTorchFunctionSubclass():  # as code in C++ sees them
            return model(**inputs).logits.square().mean()

    want = second_derivative(model, by_function)
    with patch_model(model):
        got = second_derivative(model, by_function)
        with pytest.raises(RuntimeError, match=r"differentiable once.*outputs\.logits\.clone"):
            second_derivative(model, below)
    assert max(map(relative, got, want)) <= 1e-4
