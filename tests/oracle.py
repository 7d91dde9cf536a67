"""The tests' shared instruments: seeded cases, the fp64 truth, one comparison."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from str_kernels import SafetyConstraint, linear_cross_entropy


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
        return self.to(torch.float64).run(upstream, **{**overrides, "backend": "reference"})


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
        settings["safety"] = SafetyConstraint(ids, settings.pop("strength", 0.7), **chosen)
        reference = normal(k) if static else normal(n, k)
    if weighted:
        weights = torch.rand(n, generator=g, dtype=torch.float64)
        weights[torch.rand(n, generator=g) < 0.3] = 0.0
    return Case(
        hidden_states, weight, labels, normal(vocab) if bias else None, reference, weights, settings
    )


def relative_error(got: Tensor, want: Tensor) -> float:
    """``‖got - want‖ / ‖want‖``; absolute where the truth is zero."""
    norm = want.double().norm()
    return ((got.double() - want.double()).norm() / (norm if norm > 0 else 1.0)).item()


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    """Every entry within a relative error; reports all of them when one is not."""
    errors = {name: relative_error(got[name], want[name]) for name in want}
    assert got.keys() == want.keys()
    assert all(error <= tolerance for error in errors.values()), (errors, tolerance)
