"""Every setting of one fine-tuning run: frozen, checked together, and written beside the adapter.

Building `TrainSettings` checks what can be checked without touching a disk; the rest of the checks
need the model's configuration and the data, and live in `checks`.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from str_kernels.levers import PLACES, LongContext
from str_kernels.options import MAX_SAFETY_TOKENS
from str_kernels.probe import EVERY
from str_kernels.settings import ConstraintSettings, Rule, above, at_least, one_of, setting

DTYPES = ("auto", "float32", "bfloat16", "float16", "mixed-bfloat16", "mixed-float16")
PACKED = ("nf4", "int8")
SCHEDULES = ("constant", "linear", "cosine")
METHODS = ("str", "plain", "unpatched")
ALL_LINEAR = ("all-linear",)  # every linear layer but the head
LONG = ("refuse", "skip", "truncate")
DEVICES = ("auto", "cpu", "cuda", "mps")

# These may differ between the interrupted and the resumed part of a run: none changes a weight.
FREE_ON_RESUME = (
    *("out", "logging_steps", "save_steps", "report_to"),
    *("probe", "probe_every", "probe_rows", "probe_stop"),
)


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
        "adapter_off",
        "adapter_off, cache (each row computed once, in the first epoch), or a cache file.",
    )
    anchors: tuple[str, ...] = setting(
        (),
        "JSONL like the data. A row of each such file joins every forward: the constraint holds "
        "it, nothing is learned from it. Give refused requests in one file, benign look-alikes in "
        "another, with the answers of the aligned model.",
        option=list[str] | None,
    )
    anchors_every: int = setting(
        1,
        "Anchors join one forward in so many, which the seed and the batch draw, and weigh as much "
        "more, so that the sum is the same on average.",
        at_least(1),
    )
    anchors_alone: bool = setting(
        False,
        "Constrain the anchors alone, as heavily as a whole forward's rows: nothing holds back "
        "what the data teach, and the reference pass runs on the anchors alone.",
    )
    eval: str | None = setting(
        None, "JSONL like the data, held out: both terms are measured on it, nothing is learned."
    )
    eval_steps: int = setting(
        0, "Steps between measurements of --eval; 0: at the end alone.", at_least(0)
    )
    probe: str | None = setting(
        None,
        "JSONL of requests that the model refuses and that are not trained on: how probable "
        "refusing still is, by one forward over them, is logged as safety_probe/… and drawn. "
        "Answers in the file are not read.",
    )
    probe_every: int = setting(EVERY, "Steps between two probes.", at_least(1))
    probe_rows: int = setting(
        8, "How many requests of --probe are asked, from its beginning.", at_least(1)
    )
    probe_stop: float | None = setting(
        None,
        "Stop when less than this share of the aligned model's probability of refusing is left, "
        "such as 0.9, and keep the last adapter above it; default: a warning below 0.9.",
        Rule("above 0 and at most 1", lambda value: 0 < value <= 1),
    )
    rank: int = setting(16, "LoRA rank.", at_least(1))
    alpha: float | None = setting(None, "LoRA alpha; default: 2 x rank.", above(0))
    dropout: float = setting(
        0.0, "LoRA dropout.", Rule("0 to below 1", lambda value: 0 <= value < 1)
    )
    target_modules: tuple[str, ...] = setting(
        ALL_LINEAR,
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
        "mixed-bfloat16 or mixed-float16 for fp32 weights under autocast, nf4 or int8 "
        "(bitsandbytes, below a bf16 head).",
        one_of(*DTYPES, *PACKED),
    )
    device: str = setting(
        "auto",
        "auto, cpu, cuda or mps; one GPU of several is chosen by CUDA_VISIBLE_DEVICES.",
        one_of(*DEVICES),
    )
    gradient_checkpointing: bool = setting(
        False, "Recompute activations in the backward pass: less memory, more time."
    )
    offload: str | None = setting(
        None,
        "Where the checkpoints wait for the backward: cpu (the host's memory, beside a GPU) or "
        "disk (the folder of temporary files); default: on the device.",
        one_of(*PLACES),
    )
    tile_tokens: int | None = setting(
        None,
        "Tokens that an MLP works on at a time, such as 2048; default: all. Its inside is "
        "recomputed in the backward pass.",
        at_least(1),
    )
    tile_all: bool = setting(
        False,
        "With tile_tokens, run projections with an adapter and norms in tiles as well; they are "
        "recomputed once more.",
    )
    window_attention: bool = setting(
        False,
        "Let layers with a sliding window attend in blocks of one window, without a mask.",
    )
    seed: int = setting(0, "Seed of the adapter, the dropout and the order of the data.")
    save_steps: int = setting(0, "Steps between checkpoints; 0: no checkpoints.", at_least(0))
    logging_steps: int = setting(10, "Steps between log lines.", at_least(1))
    report_to: tuple[str, ...] = setting(
        (),
        "Where the logs go as well, comma-separated: tensorboard, wandb, mlflow, …",
        option=str | None,
    )

    def __post_init__(self) -> None:
        """Turn lists of names into tuples, check every field, and fill in the strength."""
        anchors = (self.anchors,) if isinstance(self.anchors, str) else tuple(self.anchors or ())
        object.__setattr__(self, "anchors", anchors)
        object.__setattr__(self, "target_modules", _names(self.target_modules))
        object.__setattr__(self, "report_to", _names(self.report_to))
        super().__post_init__()
        object.__setattr__(self, "strength", self.constraint(range(2)).strength)

    def faults(self) -> list[str]:
        """Return a sentence for each value outside its rule, and for values that do not fit."""
        found = super().faults()
        unused = self.tokens is not None or self.anchors or self.reference != "adapter_off"
        if self.method != "str" and (unused or self.share != 1):
            found.append(
                f"method={self.method!r}: has no constraint, so tokens, anchors, reference and "
                "share have no use; leave them out."
            )
        if self.anchors_every > 1 and not self.anchors:
            found.append(
                f"anchors_every={self.anchors_every}: there are no anchors; give files of them, or "
                "leave it out."
            )
        if self.anchors_alone and not self.anchors:
            found.append("anchors_alone=True: there are no anchors; give files of them.")
        if self.anchors_alone and self.share != 1:
            found.append(
                f"share={self.share}: constrains a share of the data's rows, and "
                "anchors_alone=True none of them; give one of the two."
            )
        if self.eval_steps and self.eval is None:
            found.append(f"eval_steps={self.eval_steps}: nothing is measured without eval.")
        for name, default in (("probe_every", EVERY), ("probe_rows", 8), ("probe_stop", None)):
            if self.probe is None and getattr(self, name) != default:
                found.append(f"{name}={getattr(self, name)}: nothing is probed without probe.")
        if (self.method, self.kind, self.tokens) == ("str", "kl", None) and self.top_k == 1:
            found.append("top_k=1: kind='kl' compares tokens with each other; take 2 or more.")
        if self.packed and self.model.endswith(".gguf"):
            found.append(
                f"dtype={self.dtype!r}: a GGUF file is dequantised when it is loaded; give the "
                "model's folder or Hub id, or another dtype."
            )
        if self.offload is not None and not self.gradient_checkpointing:
            found.append(f"offload={self.offload!r}: needs gradient_checkpointing, set it too.")
        if self.tile_all and self.tile_tokens is None:
            found.append("tile_all=True: needs tile_tokens, set it too, such as 2048.")
        everywhere = self.target_modules == ALL_LINEAR or self.tile_all
        if self.tile_tokens is not None and self.dropout and everywhere:
            what = "a projection" if self.tile_all else "an MLP"
            found.append(
                f"tile_tokens={self.tile_tokens}: {what} cannot run in tiles with a random "
                f"dropout={self.dropout:g} in it; set dropout=0 or leave the tiles out."
            )
        return found

    @property
    def lora(self) -> dict[str, Any]:
        """Return the arguments of ``add_lora``."""
        names = ("rank", "alpha", "dropout", "target_modules")
        return {name: getattr(self, name) for name in names}

    @property
    def packed(self) -> bool:
        """Tell whether the body is in 4 or 8 bits."""
        return self.dtype in PACKED

    @property
    def levers(self) -> LongContext:
        """Return what trades time for memory."""
        return LongContext(**{n.name: getattr(self, n.name) for n in fields(LongContext)})

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
        lists = ("target_modules", "anchors", "report_to")
        return {**dataclasses.asdict(self), **{name: list(getattr(self, name)) for name in lists}}

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


def _names(given: str | tuple[str, ...] | list[str] | None) -> tuple[str, ...]:
    """Return the names of a list, or of a text that commas part."""
    if isinstance(given, str):
        return tuple(name.strip() for name in given.split(",") if name.strip())
    return tuple(given or ())
