"""The only autograd.Function: the rows' gradients are formed forward and scaled backward.

Stage: ``Head`` and ``RowInputs`` → two loss terms per row, differentiable; and the statistics they
were made from, which are not. A frozen head's backward runs no kernel: the saved ``∂CE/∂h`` is
scaled by the upstream gradient and the constraint's K columns are added. Saved tensors are never
changed, so a second backward is right as well.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from str_kernels.constraint import constraint_terms
from str_kernels.engine.contract import (
    Backend,
    Coefficients,
    Filter,
    Head,
    SafetyTerm,
    Saved,
    Tiles,
    Wanted,
)
from str_kernels.engine.forward import Forward, run_forward
from str_kernels.engine.logits import accumulator, logit_slope
from str_kernels.engine.rows import RowPlan, plan_rows, row_blocks, silence, weight_coefficients
from str_kernels.options import LossOptions

_SCRATCH = 4 << 20  # numbers in one block ``[rows, D]`` of the backward
_KEPT = 2 << 20  # probabilities that are kept for a trained weight rather than made again


class RowInputs(NamedTuple):
    """Constants of N rows: ``labels [N]``, ``reference [N, K]`` or ``[K]``, weights ``[N]``."""

    labels: Tensor
    reference: Tensor | None
    position_weights: Tensor | None


class Settings(NamedTuple):
    """How to run; ``grad`` says whether anybody can ask for a gradient later.

    ``dtype`` is that of the hidden states, and of their gradient.
    """

    backend: Backend
    options: LossOptions
    filter: Filter
    tiles: Tiles | None
    entropy: bool
    grad: bool
    dtype: torch.dtype


class FusedRows(Function):
    """``(hidden_states, weight, bias, rows, settings)`` → terms and statistics of N rows."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rows: RowInputs,
        settings: Settings,
    ) -> tuple[Tensor | None, ...]:
        """Return cross-entropy ``[N]`` and penalty ``[N]``, then the statistics."""
        needs = tuple(settings.grad and need for need in ctx.needs_input_grad[:3])
        head = Head(hidden_states, weight, bias)
        done, penalty = forward_rows(head, rows, settings, needs)
        if any(needs):
            ctx.settings, ctx.needs = settings, needs
            ctx.set_materialize_grads(False)  # six statistics have none either
            kept = kept_for_backward(head, rows, done, needs)
            ctx.names = tuple(kept)
            ctx.save_for_backward(*kept.values())
        statistics = (
            done.lse,
            done.safety_logits,
            done.correct,
            done.dead_mass,
            done.live_share,
            done.entropy,
        )
        ctx.mark_non_differentiable(*(output for output in statistics if output is not None))
        return (done.cross_entropy, penalty, *statistics)

    @staticmethod
    def backward(
        ctx: Any, grad_cross_entropy: Tensor | None, grad_penalty: Tensor | None, *_: Any
    ) -> tuple:
        """Gradients of the head from an arbitrary upstream gradient on each row's two terms."""
        if torch.is_grad_enabled():
            raise RuntimeError(
                "linear_cross_entropy is differentiable once: create_graph=True asks for a second "
                "derivative; use backend='dense' for one."
            )
        saved = dict(zip(ctx.names, ctx.saved_tensors, strict=True))
        upstream = [
            torch.zeros_like(saved["lse"]) if grad is None else grad
            for grad in (grad_cross_entropy, grad_penalty)
        ]
        gradients = backward_rows(ctx.settings, ctx.needs, saved, *upstream)
        return *gradients, None, None


def forward_rows(
    head: Head, rows: RowInputs, settings: Settings, needs: tuple[bool, ...]
) -> tuple[Forward, Tensor]:
    """What N rows know of the vocabulary, and their penalty ``[N]``.

    ``needs`` says whether hidden states, weight and bias will be asked for a gradient.
    """
    options = settings.options
    dtype = accumulator(head.hidden_states.dtype)
    plan = plan_rows(rows.labels, rows.position_weights, options, dtype)
    wanted = Wanted(
        hidden=needs[0],
        masses=(needs[1] or needs[2]) and settings.tiles is not None,
        entropy=settings.entropy,
        probabilities=(needs[1] or needs[2])
        and settings.tiles is None
        and options.softcap is None
        and len(head.hidden_states) * len(head.weight) <= _KEPT,
    )
    done = run_forward(
        settings.backend, head, plan, options, settings.filter, settings.tiles, wanted
    )
    return done, _penalty(plan, done, rows.reference, options)


def backward_rows(
    settings: Settings,
    needs: tuple[bool, ...],
    saved: dict[str, Tensor | None],
    grad_cross_entropy: Tensor,
    grad_penalty: Tensor,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden states, weight and bias; ``saved`` is of ``kept_for_backward``."""
    # backward() may be called under the user's autocast, which would round the fp32 scratch
    with torch.autocast(grad_cross_entropy.device.type, enabled=False):
        upstream = _Upstream(settings, saved, grad_cross_entropy, grad_penalty)
        hidden = upstream.hidden_gradient() if needs[0] else None
        weight, bias = upstream.weight_gradients(needs[1:]) if any(needs[1:]) else (None, None)
    return hidden, weight, bias


def _penalty(
    plan: RowPlan, done: Forward, reference: Tensor | None, options: LossOptions
) -> Tensor:
    """λ w C ``[N]``; zero where a row has none."""
    if plan.penalty_scale is None:
        return torch.zeros_like(done.cross_entropy)
    value = constraint_terms(options.safety, done.safety_logits, reference, done.lse).value
    return torch.where(plan.penalty_scale > 0, plan.penalty_scale * value, 0.0)


def kept_for_backward(
    head: Head, rows: RowInputs, done: Forward, needs: tuple[bool, ...]
) -> dict[str, Tensor | None]:
    """The tensors that a backward needs, by name; probabilities only where they are few."""
    kept = {
        **{name: _savable(x) for name, x in rows._asdict().items()},
        "rows": done.rows,
        "safety_alone": done.safety_alone,
        "weight": head.weight,
        # outputs are handed out as they are: saved here too, autograd notices an in-place change
        "lse": done.lse,
        "safety_logits": done.safety_logits,
        "ce_gradient": done.ce_gradient,
        "lse_gradient": done.lse_gradient,
    }
    if any(needs[1:]):
        kept |= {
            "hidden_states": head.hidden_states,
            "bias": head.bias,
            "open_mass": done.open_mass,
            "masses": done.masses,
            "slope": done.slope,
            "probabilities": done.probabilities,
        }
    return kept


def _savable(constant: Tensor | None) -> Tensor | None:
    """References and labels may be made under ``inference_mode``, whose tensors cannot be saved."""
    return constant.clone() if constant is not None and constant.is_inference() else constant


class _Upstream:
    """One backward: the upstream gradients of both terms, and what each gradient is made from."""

    def __init__(
        self,
        settings: Settings,
        saved: dict[str, Tensor | None],
        grad_cross_entropy: Tensor,
        grad_penalty: Tensor,
    ) -> None:
        self.settings, self.saved, self.options = settings, saved, settings.options
        self.dtype = saved["lse"].dtype
        self.plan = plan_rows(saved["labels"], saved["position_weights"], self.options, self.dtype)
        self.everything = len(saved["rows"]) == len(self.plan.labels)
        self.grad_cross_entropy = grad_cross_entropy
        self.beta = self.d_lse = self.ids = None
        if self.options.constrained:
            self._differentiate_penalty(grad_penalty * self.plan.penalty_scale)

    def _differentiate_penalty(self, scale: Tensor) -> None:
        """β ``[N, K]`` with the slope of the safety logits, and the penalty's part of α ``[N]``."""
        safety_logits, on = self.saved["safety_logits"], scale != 0
        terms = constraint_terms(
            self.options.safety, safety_logits, self.saved["reference"], self.saved["lse"]
        )
        beta = scale[:, None] * terms.d_logits * logit_slope(safety_logits, self.options)
        self.beta = torch.where(on[:, None], beta, 0.0)
        if terms.d_lse is not None:
            self.d_lse = torch.where(on, scale * terms.d_lse, 0.0)
        ids = self.options.safety.token_ids
        self.ids = torch.tensor(ids, device=safety_logits.device)

    def hidden_gradient(self) -> Tensor:
        """``[N, D]``: scaled row gradients plus the constraint's K columns."""
        weight, dense = self.saved["weight"], self.saved["rows"]
        dtype = self.settings.dtype
        make = torch.empty if self.everything else torch.zeros  # rows that nothing reaches
        out = make(len(self.plan.labels), weight.shape[1], dtype=dtype, device=weight.device)
        size = max(1, _SCRATCH // weight.shape[1])
        for block, rows in row_blocks(dense, len(out), size):
            gradient = self._scaled(self.grad_cross_entropy[rows], "ce_gradient", block)
            if self.d_lse is not None:
                gradient += self._scaled(self.d_lse[rows], "lse_gradient", block)
            if self.beta is not None:
                gradient += self._safety_part(rows)
            out[rows] = gradient.to(dtype)
        if self.beta is not None:
            for rows in self.saved["safety_alone"].split(size):
                out[rows] = self._safety_part(rows).to(dtype)
        return out

    def _scaled(self, upstream: Tensor, name: str, block: slice) -> Tensor:
        gradient = self.saved[name][block] * upstream[:, None]  # in the dtype of upstream
        # a row without any upstream gradient adds nothing, even where its logits overflowed
        return silence(gradient, upstream == 0)

    def _safety_part(self, rows: Tensor | slice) -> Tensor:
        return self.beta[rows] @ self.saved["weight"][self.ids].to(self.dtype)

    def weight_gradients(self, needs: tuple[bool, bool]) -> tuple[Tensor | None, Tensor | None]:
        """Weight ``[V, D]`` and bias ``[V]``; the backend makes the logits again."""
        saved = self.saved
        rows = slice(None) if self.everything else saved["rows"]
        coefficients = weight_coefficients(
            self.plan,
            saved["lse"],
            self.options,
            saved["weight"].shape[0],
            self.grad_cross_entropy,
            self.d_lse,
        )
        gradients = self.settings.backend.weight_gradients(
            Head(saved["hidden_states"][rows].contiguous(), saved["weight"], saved["bias"]),
            self.plan.labels[rows],
            Saved(
                saved["lse"][rows],
                saved["open_mass"],
                self.settings.tiles,
                saved["masses"],
                saved["slope"],
                saved["probabilities"],
            ),
            Coefficients(*(None if c is None else c[rows] for c in coefficients)),
            self._safety_term(),
            self.options,
            needs,
        )
        return gradients.weight, gradients.bias

    def _safety_term(self) -> SafetyTerm | None:
        if self.beta is None:
            return None
        rows = self.plan.safety.nonzero()[:, 0]
        beta = self.beta[rows]
        hidden = self.saved["hidden_states"][rows].to(self.dtype)
        return SafetyTerm(self.ids, beta.T @ hidden, beta.sum(0))
