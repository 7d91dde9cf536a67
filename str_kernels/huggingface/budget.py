"""The strength of ``strength="auto"``: adapted while training, so that the drift stays in budget.

Stage: both terms of a training forward's rows, at strength 1 → the penalty times λ; and once for
every optimizer step, from the sums of its forwards ::

    drift² = EMA(a · Σ w C) / EMA(Σ w)      a, w, C: see SafetyConstraint and its drift_budget
    error  = log(drift / budget), cut to -0.1 and 1
    log λ  = integral + 3 · error,          integral += 0.15 · error

Everything is on the device and nobody waits for it; with torch.distributed the sums are those of
all processes, so λ is the same on each. The forwards of one step share one λ, so accumulation
changes nothing but the rounding.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, distributed

from str_kernels.huggingface.moment import Freshness
from str_kernels.huggingface.notice import Notices
from str_kernels.options import DEFAULT_STRENGTHS, SafetyConstraint
from str_kernels.terms import RowTerms

LOWEST = 1e-3
# A budget that λ = 10 cannot hold costs more than it is worth: on a real model mse at λ = 1000 kept
# every refusal, and the task was not learned. In units of the start, below.
HIGHEST = 10.0
MEMORY = 0.9  # of the EMA: about ten steps, for one batch's drift is noisy
# A run starts without drift, and by the time it sets in λ must not be far down: eased slowly, by
# e in 67 steps, and pressed fast. Neither cut is felt by the noise about the budget.
EASE, PRESS = -0.1, 1.0
INTEGRAL = 0.15  # a step; at 0.08 a drift that needs ever more pressing stayed 15 % above
PROPORTIONAL = 3.0  # brakes the swing that an integral alone has: the drift answers late


class DriftBudget:
    """Finds the strength; `Patch.budget` is one if the constraint's strength is ``"auto"``.

    Args:
        safety: the constraint, its strength ``"auto"``.
        notices: where a budget that cannot be held is told; None for a record of its own.

    Attributes:
        constraint: the same constraint at strength 1, which the rows' penalty is computed with.
        strength: λ of the next forward, a scalar fp32 tensor.
    """

    def __init__(self, safety: SafetyConstraint, notices: Notices | None = None) -> None:
        """Begin at λ = 1, or at the kind's default where that is more, with no drift seen."""
        self._notices = Notices() if notices is None else notices
        self.constraint = safety.at(1.0)
        self._budget, self._scale = safety.drift_budget, _scale(safety)
        start = max(1.0, DEFAULT_STRENGTHS[safety.kind])
        self._highest = HIGHEST * start
        # integral, strength, EMA of a Σ w C, EMA of Σ w
        self._state = torch.tensor([math.log(start), start, 0.0, 0.0])
        self._sums: Tensor | None = None
        self._steps = 0

    @property
    def strength(self) -> Tensor:
        """λ, on the device of the losses."""
        return self._state[1]

    def apply(self, terms: RowTerms, weights: Tensor, *, learning: bool) -> RowTerms:
        """The terms ``[n]`` with λ in their penalty.

        Args:
            terms: of the rows, computed with ``constraint``.
            weights: ``[n]``, of the rows in the constraint.
            learning: whether this forward counts as training, and moves λ after its step.
        """
        self._state = self._state.to(terms.penalty.device)
        if learning:
            if self._steps != Freshness.optimizer_steps():
                self.settle()
            self._add(terms.penalty.detach(), weights)
        return terms._replace(penalty=self.strength * terms.penalty)

    def _add(self, penalty: Tensor, weights: Tensor) -> None:
        # a KL that is zero may round to just below it
        distance = self._scale * penalty.sum().float().clamp_min(0.0)
        added = torch.stack([distance, weights.sum().float()])
        if self._sums is None:
            self._sums, self._steps = added, Freshness.optimizer_steps()
        else:
            self._sums = self._sums + added

    @torch.no_grad()
    def settle(self) -> None:
        """The optimizer has stepped: set λ for the next step from the forwards of this one.

        The next training forward does it unasked. Nothing happens if there was no forward. With
        torch.distributed every process must call it.
        """
        if self._sums is None:
            return
        sums, self._sums = self._sums, None
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(sums)
        integral, _, *before = self._state
        means = MEMORY * torch.stack(before) + (1.0 - MEMORY) * sums
        error = (0.5 * (means[0] / means[1]).log() - math.log(self._budget)).clamp(EASE, PRESS)
        low, high = math.log(LOWEST), math.log(self._highest)
        integral = (integral + INTEGRAL * error).clamp(low, high)
        strength = (integral + PROPORTIONAL * error).clamp(low, high).exp()
        after = torch.stack([integral, strength, *means])
        # a step that overflowed, or constrained nothing, says nothing
        usable = sums.isfinite().all() & (sums[1] > 0)
        self._state = torch.where(usable, after, self._state)

    def report(self) -> dict[str, float]:
        """``safety_strength`` and ``budgeted_drift`` (0 before the first step); waits for both.

        Warns, once, of a strength that would have to stay above its bound.
        """
        integral, strength, distance, weight = self._state.tolist()
        drift = math.sqrt(distance / weight) if weight else 0.0
        # fp32's logarithm may lie on either side of it
        if integral > 0.999 * math.log(self._highest):
            self._notices.say_over_budget(drift, self._budget, self._highest)
        return {"safety_strength": strength, "budgeted_drift": drift}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, in JSON types; between two steps, on every process."""
        self.settle()
        return {"state": self._state.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a ``state_dict``.

        Raises:
            ValueError: not one of these.
        """
        values = state.get("state") if isinstance(state, dict) else None
        if not isinstance(values, list) or len(values) != len(self._state):
            raise ValueError(
                f"state={state!r}: must be what state_dict() gave, with {len(self._state)} numbers."
            )
        self._state, self._sums = torch.tensor(values, device=self._state.device), None


def _scale(safety: SafetyConstraint) -> float:
    """``a`` of ``drift² = a · mean C``."""
    if safety.kind == "kl":
        return 2.0
    weights = safety.token_weights
    return 1.0 if weights is None else len(weights) / sum(weights)
