"""Every setting of one fine-tuning run: frozen, checked together, and written beside the adapter.

Building `TrainSettings` checks what can be checked without touching a disk; the rest of the checks
need the model's configuration and the data, and live in `checks`.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from str_kernels.options import MAX_SAFETY_TOKENS
from str_kernels.settings import ConstraintSettings, Rule, above, at_least, one_of, setting

DTYPES = ("auto", "float32", "bfloat16", "float16", "mixed-bfloat16", "mixed-float16")
SCHEDULES = ("constant", "linear", "cosine")
METHODS = ("str", "plain", "unpatched")
LONG = ("refuse", "skip", "truncate")

# These may differ between the interrupted and the resumed part of a run: none changes a weight.
FREE_ON_RESUME = ("out", "logging_steps", "save_steps")


@dataclass(frozen=True)
class TrainSettings(ConstraintSettings):
    """One LoRA fine-tuning run: the constraint's settings, and these.

    Args:
        model: a Hub id, a local folder, or a GGUF file.
        data: a JSONL file with ``{"prompt", "response"}`` or chat ``{"messages"}`` on each line.
        out: folder for the adapter, its description and the checkpoints.
        method: ``"str"`` (fused loss and constraint), ``"plain"`` (fused loss alone) or
            ``"unpatched"`` (the model's own head, for comparison).

    Raises:
        Faults: every argument outside these rules, together.
    """

    model: str
    data: str
    out: str
    method: str = dataclasses.field(default="str", metadata={"rule": one_of(*METHODS)})
    tokens: str | None = setting(None, "Safety tokens file; default: identify at the start.")
    top_k: int = setting(
        64,
        "How many tokens to identify.",
        Rule(f"1 to {MAX_SAFETY_TOKENS}", lambda value: 1 <= value <= MAX_SAFETY_TOKENS),
    )
    reference: str = setting(
        "adapter_off", "adapter_off, cache (computed once, at the start), or a cache file."
    )
    anchors: tuple[str, ...] = setting(
        (),
        "JSONL like the data. A row of each such file joins every forward: the constraint holds "
        "it, nothing is learned from it. Give refused requests in one file, benign look-alikes in "
        "another, with the answers of the aligned model.",
        option=list[str] | None,
    )
    rank: int = setting(16, "LoRA rank.", at_least(1))
    alpha: float | None = setting(None, "LoRA alpha; default: 2 x rank.", above(0))
    dropout: float = setting(
        0.0, "LoRA dropout.", Rule("0 to below 1", lambda value: 0 <= value < 1)
    )
    target_modules: tuple[str, ...] = setting(
        ("all-linear",),
        "Modules to adapt, comma-separated; all-linear means every linear layer but the head.",
        Rule("names of modules, or all-linear", bool),
        option=str,
    )
    learning_rate: float = setting(2e-4, "Peak learning rate.", above(0))
    schedule: str = setting(
        "linear",
        "Learning rate after the warm-up: constant, linear or cosine.",
        one_of(*SCHEDULES),
    )
    warmup: float = setting(
        0.03, "Warm-up: a number of steps, or below 1 a share of all steps.", at_least(0)
    )
    weight_decay: float = setting(0.0, "Weight decay of AdamW.", at_least(0))
    max_grad_norm: float = setting(
        1.0, "Clip the norm of the gradients to this; 0: do not clip.", at_least(0)
    )
    epochs: float = setting(1.0, "Passes over the data.", above(0))
    steps: int | None = setting(None, "Optimizer steps, instead of epochs.", at_least(1))
    batch: int = setting(8, "Sequences in one forward of a process.", at_least(1))
    accumulation: int = setting(1, "Forwards in one optimizer step.", at_least(1))
    max_length: int = setting(
        2048, "Longest sequence, in tokens; longer responses are cut at their end.", at_least(2)
    )
    long: str = setting(
        "refuse",
        "What becomes of a row whose prompt leaves no room for an answer: refuse (the run does not "
        "start), skip (the row is left out), or truncate (the prompt's middle is left out).",
        one_of(*LONG),
    )
    dtype: str = setting(
        "auto",
        "Precision of the body: auto (the checkpoint's), float32, bfloat16, float16, or "
        "mixed-bfloat16 or mixed-float16 for fp32 weights under autocast.",
        one_of(*DTYPES),
    )
    gradient_checkpointing: bool = setting(
        False, "Recompute activations in the backward pass: less memory, more time."
    )
    seed: int = setting(0, "Seed of the adapter, the dropout and the order of the data.")
    save_steps: int = setting(0, "Steps between checkpoints; 0: no checkpoints.", at_least(0))
    logging_steps: int = setting(10, "Steps between log lines.", at_least(1))

    def __post_init__(self) -> None:
        """Turn lists of names into tuples, check every field, and fill in the strength."""
        anchors, modules = self.anchors, self.target_modules
        anchors = (anchors,) if isinstance(anchors, str) else tuple(anchors or ())
        if isinstance(modules, str):
            modules = [name.strip() for name in modules.split(",") if name.strip()]
        object.__setattr__(self, "anchors", anchors)
        object.__setattr__(self, "target_modules", tuple(modules))
        super().__post_init__()
        object.__setattr__(self, "strength", self.constraint(range(2)).strength)

    def faults(self) -> list[str]:
        """Return a sentence for each value outside its rule, and for values that do not fit."""
        found = super().faults()
        unused = self.tokens is not None or self.anchors or self.reference != "adapter_off"
        if self.method != "str" and unused:
            found.append(
                f"method={self.method!r}: has no constraint, so tokens, anchors and reference have "
                "no use; leave them out."
            )
        if (self.method, self.kind, self.tokens) == ("str", "kl", None) and self.top_k == 1:
            found.append("top_k=1: kind='kl' compares tokens with each other; take 2 or more.")
        return found

    @property
    def lora(self) -> dict[str, Any]:
        """Return the arguments of ``add_lora``."""
        names = ("rank", "alpha", "dropout", "target_modules")
        return {name: getattr(self, name) for name in names}

    @property
    def lengths(self) -> dict[str, Any]:
        """Return the arguments of ``encode_file``."""
        return {"max_length": self.max_length, "long": self.long}

    @property
    def constrained(self) -> bool:
        """Tell whether the loss has the constraint."""
        return self.method == "str"

    @property
    def folder(self) -> Path:
        """Return the output folder."""
        return Path(self.out)

    def as_dict(self) -> dict[str, Any]:
        """Convert to JSON types."""
        lists = {"target_modules": list(self.target_modules), "anchors": list(self.anchors)}
        return {**dataclasses.asdict(self), **lists}

    def total_steps(self, rows: int, processes: int = 1) -> int:
        """Count the optimizer steps over ``rows`` sequences as the trainer counts them."""
        if self.steps is not None:
            return self.steps
        batches = math.ceil(rows / (self.batch * processes))
        return math.ceil(self.epochs * max(1, math.ceil(batches / self.accumulation)))

    def warmup_steps(self, total: int) -> int:
        """Count the steps of the warm-up."""
        return int(self.warmup) if self.warmup >= 1 else math.ceil(self.warmup * total)

    def differences(self, other: dict[str, Any]) -> list[str]:
        """Name the settings that differ from ``other`` and would change a resumed run.

        ``other`` may be of an earlier version: a setting that it lacks had its default then.
        """
        own = self.as_dict()
        other = {**TrainSettings(self.model, self.data, self.out).as_dict(), **other}
        return [n for n in own if n not in FREE_ON_RESUME and own[n] != other[n]]
