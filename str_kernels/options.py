"""Settings of the loss: frozen, checked when they are built, and free of tensors.

Symbols used everywhere in this project:

====  =========================================================================
N     positions (tokens) handed to the head, with every leading dim flattened
V     rows of the head's weight, the vocabulary
D     hidden size
K     number of safety tokens, at most ``MAX_SAFETY_TOKENS``
T     tiles of ``TILE`` vocabulary rows, the last one perhaps ragged
n     the denominator of the loss: labelled positions, or ``num_items_in_batch``
====  =========================================================================
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal, get_args

ConstraintKind = Literal["mse", "logprob", "kl", "kl_mass"]
Reduction = Literal["mean", "sum", "none"]
Screen = Literal["auto", "exact", "bf16", "int8", "fp8"]

MAX_SAFETY_TOKENS = 1024
# These kept most of a real model's refusals at the least cost (benchmarks/results/safety). Squares
# of logits are larger than divergences and need a smaller λ.
DEFAULT_KIND: ConstraintKind = "kl"
DEFAULT_STRENGTHS = {"mse": 0.1, "logprob": 0.1, "kl": 10.0, "kl_mass": 10.0}
TILE = 128

# What version 0.2 removed, and why; code and files written for 0.1 may still name it.
REMOVED = {
    "kind='floor'": "it did not keep refusals; use kind='kl' or kind='mse'",
    "margin": "only kind='floor' had one, which did not keep refusals; use kind='kl' or kind='mse'",
    "strength='auto'": "the task was hardly learned with it; give a number",
    "drift_budget": "it belonged to strength='auto', with which the task was hardly learned; give "
    "strength a number",
    "a fixed reference tensor": "it kept no refusals and ruined neutral text; use 'adapter_off' or "
    "a cache file",
}


def removed(name: str) -> str:
    """Return the sentence of an error that names an entry of ``REMOVED``."""
    return f"{name} was removed in 0.2: {REMOVED[name]}."


def _finite(name: str, value: Any, *, minimum: float, strict: bool = False) -> float:
    """Return ``value`` as a float, or raise ValueError with the rule."""
    # not by math.isfinite, which a tracer cannot follow where the number varies
    finite = isinstance(value, Real) and -math.inf < value < math.inf
    if isinstance(value, bool) or not finite or value < minimum or (strict and value == minimum):
        rule = f" {'above' if strict else 'of at least'} {minimum:g}" if minimum > -math.inf else ""
        raise ValueError(f"{name}={value!r}: must be a finite number{rule}.")
    return float(value)


def _choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r}: must be one of {', '.join(map(repr, allowed))}.")


def _as_list(name: str, value: Any) -> list:
    if hasattr(value, "tolist"):  # a tensor or an array
        value = value.tolist()
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise ValueError(f"{name}={value!r}: must be a sequence of numbers.")
    return list(value)


@dataclass(frozen=True)
class SafetyConstraint:
    """A constraint that keeps the logits of K safety tokens near a reference during training.

    With logits ``z``, reference ``r``, token weights ``ω`` and ``τ = temperature``, its cost at a
    position is

    | kind        | C                          | reference r       |
    | ----------- | -------------------------- | ----------------- |
    | ``mse``     | ``1/K Σ ω (z - r)²``       | logits            |
    | ``logprob`` | ``1/K Σ ω (z - lse - r)²`` | log-probabilities |
    | ``kl``      | ``τ² KL(q ‖ p)``           | logits            |
    | ``kl_mass`` | ``τ² KL(q ‖ p) + KL(M)``   | log-probabilities |

    where ``q ∝ ω · exp(r/τ)`` and ``p ∝ ω · exp(z/τ)`` sum to 1 over the safety tokens alone. They
    hold proportions; ``KL(M)`` also holds the mass of all K tokens in the whole vocabulary, ``M =
    Σ exp(z - lse)``: it is the divergence of two outcomes, M and ``1 - M``. The reference of
    ``kl_mass`` has K + 1 columns, the last one that of ``1 - M``, the mass of all other tokens.
    ``mse`` is Safety Token Regularization (arXiv 2604.17210); ``kl`` is PACT's (arXiv 2603.07445),
    applied at every position and stronger. ``benchmarks/results/safety`` shows why ``kl`` is the
    default.

    Args:
        token_ids: K distinct rows of the head, 1 to 1024 of them.
        strength: λ, the factor of the constraint beside the cross-entropy; 0 or more. None means
            10 for ``kl`` and ``kl_mass``, and 0.1 for the others.
        kind: one of the table above.
        token_weights: K non-negative numbers ω, not all zero; None means 1 each. M has neither ω
            nor τ: a token of weight 0 counts in it.
        temperature: τ of ``kl`` and ``kl_mass``; above 0.

    Raises:
        ValueError: an argument breaks these rules, or ``kind`` would ignore it.
    """

    token_ids: tuple[int, ...]
    strength: float | None = None
    kind: ConstraintKind = DEFAULT_KIND
    token_weights: tuple[float, ...] | None = None
    temperature: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "token_ids", self._checked_ids())
        if self.kind == "floor":
            raise ValueError(removed("kind='floor'"))
        _choice("kind", self.kind, get_args(ConstraintKind))
        object.__setattr__(self, "strength", self._checked_strength())
        object.__setattr__(self, "token_weights", self._checked_weights())
        temperature = _finite("temperature", self.temperature, minimum=0.0, strict=True)
        object.__setattr__(self, "temperature", temperature)
        weighted = sum(map(bool, self.token_weights or [1.0] * len(self.token_ids)))
        if self.kind == "kl" and weighted < 2:
            raise ValueError(
                "token_ids has 1 entry with a weight above 0: kind='kl' compares the proportions "
                "of tokens; give 2 or more, or kind='mse'."
            )
        single = len(self.token_ids) == 1 and self.token_weights
        if self.kind == "kl_mass" and (single or (weighted < 2 and temperature != 1.0)):
            raise ValueError(
                "token_weights and temperature are of proportions between tokens, which kind="
                "'kl_mass' with 1 weighted token does not hold; leave them out."
            )
        if self.temperature != 1.0 and self.kind not in ("kl", "kl_mass"):
            raise ValueError(
                f"temperature={self.temperature}: only kind='kl' and kind='kl_mass' have one, not "
                f"{self.kind!r}; leave it out."
            )

    @property
    def references(self) -> int:
        """How many numbers a position's reference has: K, or K + 1 for ``kl_mass``."""
        return len(self.token_ids) + (self.kind == "kl_mass")

    def _checked_strength(self) -> float:
        if self.strength is None:
            return DEFAULT_STRENGTHS[self.kind]
        if isinstance(self.strength, str) and self.strength == "auto":
            raise ValueError(removed("strength='auto'"))
        return _finite("strength", self.strength, minimum=0.0)

    def _checked_ids(self) -> tuple[int, ...]:
        ids = _as_list("token_ids", self.token_ids)
        if not 1 <= len(ids) <= MAX_SAFETY_TOKENS:
            raise ValueError(
                f"token_ids has {len(ids)} entries: must have 1 to {MAX_SAFETY_TOKENS}; "
                "pass safety=None for no constraint."
            )
        for position, token in enumerate(ids):
            if isinstance(token, bool) or not isinstance(token, Integral) or token < 0:
                raise ValueError(f"token_ids[{position}]={token!r}: must be an integer, 0 or more.")
        if len(set(ids)) != len(ids):
            twice = next(token for token in ids if ids.count(token) > 1)
            raise ValueError(
                f"token_ids holds {twice} {ids.count(twice)} times: must hold each id once; "
                "use token_weights to weight a token more."
            )
        return tuple(map(int, ids))

    def _checked_weights(self) -> tuple[float, ...] | None:
        if self.token_weights is None:
            return None
        weights = _as_list("token_weights", self.token_weights)
        if len(weights) != len(self.token_ids):
            raise ValueError(
                f"token_weights has {len(weights)} entries: must have one for each of the "
                f"{len(self.token_ids)} token_ids."
            )
        checked = tuple(
            _finite(f"token_weights[{position}]", weight, minimum=0.0)
            for position, weight in enumerate(weights)
        )
        if not any(checked):
            raise ValueError("token_weights are all zero: at least one must be above 0.")
        return checked


@dataclass(frozen=True)
class LossOptions:
    """Every setting of one fused loss that is not a tensor.

    The logits are ``z = softcap · tanh(s / softcap)`` of ``s = logit_scale · (H Wᵀ + b)``; without
    a softcap ``z = s``.
    """

    ignore_index: int = -100
    reduction: Reduction = "mean"
    logit_scale: float = 1.0
    softcap: float | None = None
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    filter_eps: float | Literal["auto"] = "auto"
    screen: Screen = "auto"
    safety: SafetyConstraint | None = None

    def __post_init__(self) -> None:
        if isinstance(self.ignore_index, bool) or not isinstance(self.ignore_index, int):
            raise ValueError(f"ignore_index={self.ignore_index!r}: must be an integer.")
        _choice("reduction", self.reduction, get_args(Reduction))
        _finite("logit_scale", self.logit_scale, minimum=-math.inf)
        if self.softcap is not None:
            _finite("softcap", self.softcap, minimum=0.0, strict=True)
        if _finite("label_smoothing", self.label_smoothing, minimum=0.0) > 1.0:
            raise ValueError(f"label_smoothing={self.label_smoothing!r}: must lie in [0, 1].")
        _finite("z_loss", self.z_loss, minimum=0.0)
        if self.filter_eps != "auto":
            if isinstance(self.filter_eps, str):
                raise ValueError(f"filter_eps={self.filter_eps!r}: must be 'auto' or a number.")
            if _finite("filter_eps", self.filter_eps, minimum=0.0) >= 1.0:
                raise ValueError(f"filter_eps={self.filter_eps!r}: must lie in [0, 1).")
        _choice("screen", self.screen, get_args(Screen))
        if self.filter_eps == 0 and self.screen not in ("auto", "exact"):
            raise ValueError(
                f"screen={self.screen!r} with filter_eps=0.0: the exact path computes every logit "
                "in full and screens none; leave screen='auto', or give a filter_eps above 0."
            )
        if self.safety is not None and not isinstance(self.safety, SafetyConstraint):
            raise ValueError(
                f"safety={self.safety!r}: must be a SafetyConstraint or None; "
                "SafetyTokens.constraint(strength) makes one."
            )

    @property
    def leaves_out(self) -> bool:
        """Whether the safety tokens are left out of sums over the vocabulary, and joined apart."""
        return self.safety is not None and self.safety.kind == "kl_mass"

    @property
    def constrained(self) -> bool:
        """Whether the constraint can change the loss at all."""
        return self.safety is not None and self.safety.strength > 0.0
