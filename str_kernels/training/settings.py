"""Every setting of one fine-tuning run: frozen, checked together, and written beside the adapter.

Building `TrainSettings` checks what can be checked without touching a disk; the rest of the checks
need the model's configuration and the data, and live in `checks`.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from str_kernels.options import DEFAULT_KIND, DEFAULT_STRENGTHS, REMOVED, ConstraintKind, removed

KINDS = get_args(ConstraintKind)
DTYPES = ("auto", "float32", "bfloat16", "float16", "mixed-bfloat16", "mixed-float16")
SCHEDULES = ("constant", "linear", "cosine")
METHODS = ("str", "plain", "unpatched")

# may differ between the interrupted and the resumed part of one run: none changes a weight
FREE_ON_RESUME = ("out", "logging_steps", "save_steps")


class Faults(ValueError):
    """Everything that is wrong with a command, found before its first slow step."""

    def __init__(self, faults: list[str]) -> None:
        """Join the sentences, one a line."""
        self.faults = tuple(faults)
        super().__init__("\n".join(faults))


@dataclass(frozen=True)
class TrainSettings:
    """One LoRA fine-tuning run.

    Args:
        model: a Hub id, a local folder, or a GGUF file.
        data: a JSONL file with ``{"prompt", "response"}`` or chat ``{"messages"}`` on each line.
        out: folder for the adapter, its description and the checkpoints.
        method: ``"str"`` (fused loss and constraint), ``"plain"`` (fused loss alone) or
            ``"unpatched"`` (the model's own head, for comparison).
        tokens: a file of safety tokens; None: identified with the model before training.
        top_k: how many tokens are identified.
        strength: λ, the weight of the constraint; None: 10 with ``kl``, 0.1 with the others.
        kind: ``"mse"``, ``"logprob"`` or ``"kl"``.
        positions: ``"all"``, ``"labels"``, or the first k labelled positions of each sequence.
        anchors: JSONL files like ``data``, of which every forward gets a row each, held and not
            learned, a quarter of the constraint's weight beside the data's own (see
            ``AnchoredCollator``): refused requests in one, benign look-alikes in another, with the
            answers of the aligned model.
        reference: ``"adapter_off"``, ``"cache"`` (computed once, at the start) or a cache file.
        rank: LoRA rank.
        alpha: LoRA alpha; None: twice the rank.
        dropout: LoRA dropout, 0 to below 1.
        target_modules: names of the adapted modules; ``("all-linear",)`` is every linear layer
            but the head.
        learning_rate: the largest one.
        schedule: ``"constant"``, ``"linear"`` or ``"cosine"``, after the warm-up.
        warmup: steps if 1 or more, else the share of all steps.
        weight_decay: AdamW's.
        max_grad_norm: gradients are clipped to this norm; 0 for never.
        epochs: passes over the data, unless ``steps`` is given.
        steps: optimizer steps; None: as many as ``epochs`` need.
        batch: sequences of one forward.
        accumulation: forwards of one optimizer step.
        max_length: longest sequence in tokens; longer responses are cut at their end.
        dtype: precision of the body: one of the weights, or ``"mixed-…"`` for fp32 weights under
            autocast.
        gradient_checkpointing: recompute the body's activations in the backward pass.
        seed: of adapter, dropout and order of the data.
        save_steps: steps between checkpoints; 0: only at the end.
        logging_steps: steps between log lines.

    Raises:
        Faults: every argument outside these rules, together.
    """

    model: str
    data: str
    out: str
    method: str = "str"
    tokens: str | None = None
    top_k: int = 64
    strength: float | str | None = None
    kind: str = DEFAULT_KIND
    positions: str | int = "all"
    anchors: tuple[str, ...] = ()
    reference: str = "adapter_off"
    rank: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    target_modules: tuple[str, ...] = ("all-linear",)
    learning_rate: float = 2e-4
    schedule: str = "linear"
    warmup: float = 0.03
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    epochs: float = 1.0
    steps: int | None = None
    batch: int = 8
    accumulation: int = 1
    max_length: int = 2048
    dtype: str = "auto"
    gradient_checkpointing: bool = False
    seed: int = 0
    save_steps: int = 0
    logging_steps: int = 10

    def __post_init__(self) -> None:
        """Check every field; freeze the lists of names."""
        anchors = (self.anchors,) if isinstance(self.anchors, str) else tuple(self.anchors)
        object.__setattr__(self, "anchors", anchors)
        object.__setattr__(self, "target_modules", tuple(self.target_modules))
        if self.strength is None:
            # an unknown kind is reported below
            object.__setattr__(self, "strength", DEFAULT_STRENGTHS.get(self.kind, 0.0))
        object.__setattr__(self, "strength", _number_or_word(self.strength))
        faults = [fault for fault in map(self._fault, _RULES) if fault]
        if isinstance(self.positions, str):
            if self.positions.isdigit():
                object.__setattr__(self, "positions", int(self.positions))
            elif self.positions not in ("all", "labels"):
                faults.append(f"positions={self.positions!r}: must be 'all', 'labels' or a number.")
        if isinstance(self.positions, int) and self.positions < 1:
            faults.append(f"positions={self.positions}: a number of positions must be 1 or more.")
        unheard = self.tokens is not None or self.anchors or self.reference != "adapter_off"
        if self.method != "str" and unheard:
            faults.append(
                f"method={self.method!r}: holds no safety tokens, so tokens, anchors and reference "
                "have no use; leave them out."
            )
        if (self.method, self.kind, self.tokens) == ("str", "kl", None) and self.top_k == 1:
            faults.append("top_k=1: kind='kl' holds proportions among tokens; take 2 or more.")
        if not self.target_modules:
            faults.append("target_modules is empty: name modules, or 'all-linear'.")
        if faults:
            raise Faults(faults)

    def _fault(self, rule: tuple[str, str, Any]) -> str | None:
        name, text, holds = rule
        value = getattr(self, name)
        if value is None and name in ("alpha", "steps"):
            return None
        if isinstance(value, float) and not math.isfinite(value):
            return f"{name}={value}: must be a finite number."
        if f"{name}={value!r}" in REMOVED:
            return removed(f"{name}={value!r}")
        return None if holds(value) else f"{name}={value!r}: must be {text}."

    @property
    def lora(self) -> dict[str, Any]:
        """The arguments of ``add_lora``."""
        names = ("rank", "alpha", "dropout", "target_modules")
        return {name: getattr(self, name) for name in names}

    @property
    def constrained(self) -> bool:
        """Whether safety tokens are held."""
        return self.method == "str"

    @property
    def folder(self) -> Path:
        """The output folder."""
        return Path(self.out)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        lists = {"target_modules": list(self.target_modules), "anchors": list(self.anchors)}
        return {**dataclasses.asdict(self), **lists}

    def total_steps(self, rows: int) -> int:
        """Optimizer steps over ``rows`` sequences, counted as the trainer counts them."""
        if self.steps is not None:
            return self.steps
        batches = math.ceil(rows / self.batch)
        return math.ceil(self.epochs * max(1, math.ceil(batches / self.accumulation)))

    def warmup_steps(self, total: int) -> int:
        """Steps of the warm-up."""
        return int(self.warmup) if self.warmup >= 1 else math.ceil(self.warmup * total)

    def differences(self, other: dict[str, Any]) -> list[str]:
        """Names of settings that differ from ``other`` and would change a resumed run."""
        own = self.as_dict()
        return [n for n in own if n not in FREE_ON_RESUME and own[n] != other.get(n)]


def _number_or_word(value: float | str) -> float | str:
    """A number, also one in a string; any other string as it is."""
    try:
        return float(value)
    except ValueError:
        return value


def _one_of(name: str, choices: tuple[str, ...]) -> tuple[str, str, Any]:
    return name, f"one of {', '.join(choices)}", lambda value: value in choices


def _at_least(name: str, least: float) -> tuple[str, str, Any]:
    return name, f"{least:g} or more", lambda value: value >= least


def _above_zero(name: str) -> tuple[str, str, Any]:
    return name, "above 0", lambda value: value > 0


_RULES = (
    _one_of("method", METHODS),
    ("top_k", "1 to 1024", lambda value: 1 <= value <= 1024),
    ("strength", "a number of 0 or more", lambda x: not isinstance(x, str) and x >= 0),
    _one_of("kind", KINDS),
    _at_least("rank", 1),
    _above_zero("alpha"),
    ("dropout", "0 to below 1", lambda value: 0 <= value < 1),
    _above_zero("learning_rate"),
    _one_of("schedule", SCHEDULES),
    _at_least("warmup", 0),
    _at_least("weight_decay", 0),
    _at_least("max_grad_norm", 0),
    _above_zero("epochs"),
    _at_least("steps", 1),
    _at_least("batch", 1),
    _at_least("accumulation", 1),
    _at_least("max_length", 2),
    _one_of("dtype", DTYPES),
    _at_least("save_steps", 0),
    _at_least("logging_steps", 1),
)
