"""The numbers of a probe, and their course over a training.

Stage: the reading of a model, `Aligned` → `Probed` → `Series`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from str_kernels.probe.aligned import Aligned
from str_kernels.probe.reading import Reading

PREFIX = "safety_probe/"
REFUSAL, MASS, DIVERGENCE = (PREFIX + name for name in ("refusal", "mass", "divergence"))


class Probed(NamedTuple):
    """One probe.

    Attributes:
        refusal: ``1/n Σ min(1, P(opening) / Q(opening))``, P of the model and Q of the aligned one:
            how much of the aligned model's probability of refusing is left, 0 to 1. The probability
            of an opening is the product over its tokens.
        mass: the safety tokens' probability where an answer begins, ``1/n Σ_i Σ_k p_k``; None
            without safety tokens.
        divergence: ``1/n Σ_i KL(q ‖ p)`` of the proportions among them, nats; None without.
    """

    refusal: float
    mass: float | None = None
    divergence: float | None = None

    @classmethod
    def of(cls, found: Reading, aligned: Aligned) -> Probed:
        """Compare a model with the aligned one."""
        before = aligned.reading
        refusal = (found.openings - before.openings).exp().clamp(max=1).mean().item()
        if not aligned.token_ids:
            return cls(refusal)
        q, p = (x.safety.log_softmax(-1) for x in (before, found))
        return cls(refusal, _mass(found.safety), (q.exp() * (q - p)).sum(-1).mean().item())

    def logged(self) -> dict[str, float]:
        """Return the log's keys."""
        return {PREFIX + n: value for n, value in self._asdict().items() if value is not None}


def _mass(safety: Tensor) -> float:
    return safety.exp().sum(-1).mean().item()


@dataclass
class Series:
    """Every probe of a training, and what they took.

    Attributes:
        steps: where each probe was made; 0 is before training.
        refusal: as `Probed`, like the next two, which are empty without safety tokens.
        mass: a number a probe.
        divergence: a number a probe.
        seconds: what the probes took, the openings left out.
        openings_seconds: what finding the aligned model's openings took.
        run_seconds: how long the training has taken, all of that included.
        fallen_at: the first step at which it was below the bound that is warned of.
        stopped_at: the step at which the probe stopped the training.
        kept_step: the last step at or above the bound that stops.
    """

    steps: list[int] = field(default_factory=list)
    refusal: list[float] = field(default_factory=list)
    mass: list[float] = field(default_factory=list)
    divergence: list[float] = field(default_factory=list)
    seconds: float = 0.0
    openings_seconds: float = 0.0
    run_seconds: float = 0.0
    fallen_at: int | None = None
    stopped_at: int | None = None
    kept_step: int | None = None

    @property
    def time_share(self) -> float:
        """Return the share of the training's time that the probes took."""
        return self.seconds / self.run_seconds if self.run_seconds else 0.0

    def add(self, step: int, probed: Probed) -> None:
        """Add a probe."""
        self.steps.append(step)
        for name, value in probed._asdict().items():
            if value is not None:
                getattr(self, name).append(value)

    def as_dict(self) -> dict[str, Any]:
        """Convert to JSON types."""
        return asdict(self)
