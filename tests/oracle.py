"""The tests' shared instruments: seeded cases, the fp64 truth, one comparison."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from str_kernels import SafetyConstraint, linear_cross_entropy
from str_kernels.options import TILE, LossOptions
from str_kernels.oracle import dense_logits, dense_penalty


@dataclass
class Case:
    """Arguments of one loss; `run` evaluates it and every gradient."""

    hidden_states: Tensor
    weight: Tensor
    labels: Tensor
    bias: Tensor | None = None
    reference: Tensor | None = None
    position_weights: Tensor | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    def to(self, dtype: torch.dtype) -> Case:
        """The same numbers in another dtype."""

        def cast(x: Tensor | None) -> Tensor | None:
            return None if x is None or not x.is_floating_point() else x.to(dtype)

        return Case(
            cast(self.hidden_states),
            cast(self.weight),
            self.labels,
            cast(self.bias),
            cast(self.reference),
            self.position_weights,
            self.settings,
        )

    def run(self, upstream: Tensor | None = None, **overrides: Any) -> dict[str, Tensor]:
        """Loss and gradients by name; ``upstream`` weighs each row of a ``"none"`` reduction."""
        leaves = {
            name: getattr(self, name).detach().clone().requires_grad_()
            for name in ("hidden_states", "weight", "bias")
            if getattr(self, name) is not None
        }
        loss = linear_cross_entropy(
            leaves["hidden_states"],
            leaves["weight"],
            self.labels,
            bias=leaves.get("bias"),
            reference=self.reference,
            position_weights=self.position_weights,
            **{**self.settings, **overrides},
        )
        total = loss.sum() if upstream is None else (loss * upstream.to(loss.dtype)).sum()
        grads = torch.autograd.grad(total, list(leaves.values()))
        return {"loss": loss.detach(), **dict(zip(leaves, grads, strict=True))}

    def truth(self, upstream: Tensor | None = None, **overrides: Any) -> dict[str, Tensor]:
        """The same in fp64, materialised, by plain autograd."""
        return self.to(torch.float64).run(upstream, **{**overrides, "backend": "dense"})


def make_case(
    n: int = 37,
    vocab: int = 301,
    dim: int = 24,
    *,
    seed: int = 0,
    scale: float = 1.0,
    ignored: float = 0.3,
    bias: bool = False,
    k: int = 0,
    static: bool = False,
    uneven: bool = False,
    weighted: bool = False,
    **settings: Any,
) -> Case:
    """A seeded fp64 case whose logits have a standard deviation of about ``3 * scale``."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    hidden_states, weight = normal(n, dim), normal(vocab, dim) * (3.0 * scale / dim**0.5)
    # likely labels, as a trained model's are: the arg-max of noisy logits
    labels = (hidden_states @ weight.T + 2.0 * scale * normal(n, vocab)).argmax(-1)
    labels[torch.rand(n, generator=g) < ignored] = -100
    reference = weights = None
    if k:
        ids = torch.randperm(vocab, generator=g)[:k].tolist()
        chosen = {"kind": settings.pop("kind", "mse"), **settings.pop("constraint", {})}
        if uneven:
            chosen["token_weights"] = [(1 + i) % 3 for i in range(k)]  # zeros among them
        settings["safety"] = SafetyConstraint(ids, settings.pop("strength", 0.7), **chosen)
        columns = settings["safety"].references
        reference = normal(columns) if static else normal(n, columns)
    if weighted:
        weights = torch.rand(n, generator=g, dtype=torch.float64)
        weights[torch.rand(n, generator=g) < 0.3] = 0.0
    return Case(
        hidden_states, weight, labels, normal(vocab) if bias else None, reference, weights, settings
    )


def filtered_truth(case: Case, upstream: Tensor, eps: float, order: Tensor) -> dict[str, Tensor]:
    """What filtering promises, in fp64 and materialised; names as ``Case.run``'s.

    The loss is the truth's. In the gradient, ``∂lse/∂(HWᵀ + b)`` of a dead tile is replaced by its
    mean over the tile; a tile is dead if it holds at most ``eps`` of the row's open mass.
    """
    case, options = case.to(torch.float64), LossOptions(**case.settings)
    names = [n for n in ("hidden_states", "weight", "bias") if getattr(case, n) is not None]
    leaves = [getattr(case, n).detach().clone().requires_grad_() for n in names]
    products = leaves[0] @ leaves[1].T + (leaves[2] if case.bias is not None else 0.0)
    # an identity head: the oracle applies scale and softcap to the products as they are
    identity = torch.eye(products.shape[1], dtype=products.dtype)
    logits = dense_logits(products, identity, None, options)
    exact_lse = logits.logsumexp(-1)
    slope = torch.autograd.grad(exact_lse.sum(), products, retain_graph=True)[0]
    tile = torch.empty_like(order).index_copy_(0, order, torch.arange(len(order)) // TILE)
    member = torch.nn.functional.one_hot(tile).to(slope.dtype)
    mass = logits.softmax(-1).detach() @ member
    labelled = case.labels != -100
    target = case.labels.clamp(min=0)
    of_label = member[target].bool() & labelled[:, None]
    open_mass = mass.masked_fill(of_label, 0.0).sum(-1, keepdim=True)
    live = (mass > eps * open_mass.clamp(min=2.0**-20)) | of_label
    assert live.any()
    assert not live.all(), "the case has no dead tile"
    spread = slope @ (member / member.sum(0)) @ member.T
    slope = torch.where(live[:, tile], slope, spread)
    moved = (products * slope).sum(-1)
    lse = exact_lse.detach() + moved - moved.detach()
    smoothing = options.label_smoothing
    label_logit = logits.gather(-1, target[:, None])[:, 0]
    loss = lse - (1 - smoothing) * label_logit - smoothing * logits.mean(-1)
    loss = torch.where(labelled, loss + options.z_loss * lse**2, 0.0)
    if options.safety is not None:
        safety, z = options.safety, logits
        if safety.kind == "logprob":  # `mse` of z - lse
            safety, z = replace(safety, kind="mse"), logits - lse[:, None]
        weights = (labelled if case.position_weights is None else case.position_weights).double()
        loss = loss + safety.strength * weights * dense_penalty(safety, z, case.reference)
    grads = torch.autograd.grad((loss * upstream).sum(), leaves)
    return {"loss": loss.detach(), **dict(zip(names, grads, strict=True))}


def relative_error(got: Tensor, want: Tensor) -> float:
    """``‖got - want‖ / ‖want‖``; absolute where the truth is zero."""
    norm = want.double().norm()
    return ((got.double() - want.double()).norm() / (norm if norm > 0 else 1.0)).item()


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    """Every entry within a relative error; reports all of them when one is not."""
    errors = {name: relative_error(got[name], want[name]) for name in want}
    assert got.keys() == want.keys()
    assert all(error <= tolerance for error in errors.values()), (errors, tolerance)
