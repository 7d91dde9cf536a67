"""torch's transforms of functions: right on the dense backend, and refused in words elsewhere."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

from str_kernels import SafetyConstraint, linear_cross_entropy
from str_kernels.backends import TorchBackend

SAFETY = SafetyConstraint([3, 17, 29], 0.5, "kl", temperature=2.0)
_G = torch.Generator().manual_seed(0)
HIDDEN, WEIGHT, TANGENT = (torch.randn(n, 8, generator=_G, dtype=torch.float64) for n in (6, 32, 6))
REFERENCE = torch.randn(6, 3, generator=_G, dtype=torch.float64)
LABELS = torch.tensor([4, 31, -100, 0, 17, 9])
WEIGHTS = torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0, 0.0], dtype=torch.float64)


def formula(hidden, weight=WEIGHT, labels=LABELS, weights=WEIGHTS):
    """``(Σ CE + λ Σ w τ² KL(q ‖ p)) / n``, written out."""
    logits = hidden @ weight.T
    labelled = labels != -100
    chosen = logits.gather(-1, torch.where(labelled, labels, 0)[:, None])[:, 0]
    cross_entropy = torch.where(labelled, logits.logsumexp(-1) - chosen, 0.0)
    q, p = ((x / 2.0).log_softmax(-1) for x in (REFERENCE, logits[:, [3, 17, 29]]))
    penalty = 4.0 * (q.exp() * (q - p)).sum(-1)
    return (cross_entropy.sum() + 0.5 * (weights * penalty).sum()) / labelled.sum()


def of(backend, **settings):
    def loss(hidden, weight=WEIGHT, labels=LABELS, weights=WEIGHTS):
        arguments = {"reference": REFERENCE, "position_weights": weights, **settings}
        return linear_cross_entropy(
            hidden, weight, labels, safety=SAFETY, backend=backend, **arguments
        )

    return loss


def _forward_ad(loss):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(loss(forward_ad.make_dual(HIDDEN, TANGENT))).tangent


def _second_derivative(loss):
    hidden = HIDDEN.clone().requires_grad_()
    first = torch.autograd.grad(loss(hidden), hidden, create_graph=True)[0]
    return torch.autograd.grad((first * TANGENT).sum(), hidden)[0]


def _batched_gradients(loss):
    hidden = HIDDEN.clone().requires_grad_()
    upstream = torch.tensor([1.0, -2.0], dtype=torch.float64)
    return torch.autograd.grad(loss(hidden), hidden, upstream, is_grads_batched=True)[0]


_MORE = torch.stack([LABELS, LABELS.roll(1)])
BY_TORCH_FUNC = {
    "grad": lambda loss: grad(loss)(HIDDEN),
    "grad of the weight": lambda loss: grad(loss, 1)(HIDDEN, WEIGHT),
    "jvp": lambda loss: jvp(loss, (HIDDEN,), (TANGENT,))[1],
    "jacrev": lambda loss: jacrev(loss)(HIDDEN),
    "jacfwd": lambda loss: jacfwd(loss)(HIDDEN),
    "hessian": lambda loss: hessian(loss)(HIDDEN),
    "vmap": lambda loss: vmap(loss)(torch.stack([HIDDEN, TANGENT])),
    "vmap of the weight": lambda loss: vmap(loss, (None, 0))(
        HIDDEN, torch.stack([WEIGHT, 2 * WEIGHT])
    ),
    "vmap of labels": lambda loss: vmap(loss, (None, None, 0))(HIDDEN, WEIGHT, _MORE),
    "gradients by example": lambda loss: vmap(grad(loss), (0, None, 0))(
        torch.stack([HIDDEN, TANGENT]), WEIGHT, _MORE
    ),
    "grad of vmap": lambda loss: grad(
        lambda h: vmap(loss, (None, None, 0, 0))(
            h, WEIGHT, _MORE, torch.stack([WEIGHTS, 2 * WEIGHTS])
        ).sum()
    )(HIDDEN),
}
BY_AUTOGRAD = {
    "forward mode": (_forward_ad, "reverse mode only"),
    "second derivative": (_second_derivative, "differentiable once"),
    "batched gradients": (_batched_gradients, "one after another"),
}
WAYS = {name: (way, r"torch\.func") for name, way in BY_TORCH_FUNC.items()} | BY_AUTOGRAD


@pytest.mark.parametrize("name", WAYS)
def test_right_on_the_dense_backend(name):
    """The formula's own transform, constraint included."""
    way, _ = WAYS[name]
    torch.testing.assert_close(way(of("dense")), way(formula), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("backend", ["auto", "torch", TorchBackend()], ids=str)
def test_refused_elsewhere(name, backend):
    """By an error that says what to use."""
    way, message = WAYS[name]
    with pytest.raises(RuntimeError, match=rf"linear_cross_entropy.*{message}") as caught:
        way(of(backend))
    assert "backend='dense'" in str(caught.value)


def test_checks_reach_through_vmap():
    """A label or a weight out of its range is named although vmap hides its values."""
    wrong = _MORE.clone()
    wrong[1, 4] = 32
    with pytest.raises(ValueError, match=r"labels\[1, 4\]=32: must be a row of the head"):
        vmap(of("dense"), (None, None, 0))(HIDDEN, WEIGHT, wrong)
    negative = torch.stack([WEIGHTS, -WEIGHTS])
    with pytest.raises(ValueError, match=r"position_weights\[1, 0\]=-1.0"):
        vmap(of("dense"), (None, None, None, 0))(HIDDEN, WEIGHT, LABELS, negative)


def test_a_dual_level_without_tangents_is_no_obstacle():
    """Nothing asks for a tangent of this loss, so it is what it was."""
    with forward_ad.dual_level():
        assert of("auto")(HIDDEN) == of("auto")(HIDDEN)


def test_second_derivative_of_compiled_code():
    """Compiled without AOTAutograd, where torch itself would return a gradient without a graph."""
    loss = torch.compile(of("auto"), backend="eager")
    with pytest.raises(RuntimeError, match="differentiable once"):
        _second_derivative(loss)
    hidden = HIDDEN.clone().requires_grad_()
    want = torch.autograd.functional.jacobian(formula, HIDDEN)
    torch.testing.assert_close(torch.autograd.grad(loss(hidden), hidden)[0], want)


def test_derivatives_by_loops_need_no_dense_backend():
    """torch.autograd.functional without vectorize takes one upstream gradient at a time."""
    loss = of("auto", reduction="none")
    got = torch.autograd.functional.jacobian(lambda h: loss(h).sum(), HIDDEN)
    want = torch.autograd.functional.jacobian(formula, HIDDEN) * (LABELS != -100).sum()
    torch.testing.assert_close(got, want)


def test_cross_entropy_alone_is_torch_s():
    """Per-example gradients of the plain loss."""
    batch = torch.stack([HIDDEN, TANGENT])
    plain = vmap(grad(lambda h, y: F.cross_entropy(h @ WEIGHT.T, y)))(batch, _MORE)
    got = vmap(grad(lambda h, y: linear_cross_entropy(h, WEIGHT, y, backend="dense")))(batch, _MORE)
    torch.testing.assert_close(got, plain, rtol=1e-10, atol=1e-12)
