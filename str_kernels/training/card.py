"""The adapter's card: what was held, how it was trained, and what was measured.

Stage: `Prepared`, safety tokens, `Result` → ``README.md`` beside the adapter, for people; the
metadata at its head are PEFT's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from str_kernels.safety.tokens import SafetyTokens
from str_kernels.training.checks import DESCRIPTION, Prepared
from str_kernels.training.result import Result
from str_kernels.training.settings import TrainSettings
from str_kernels.version import run_versions

CARD = "README.md"
_SHOWN = 12  # tokens that are named
_TRAINING = (
    *("rank", "alpha", "dropout", "target_modules", "learning_rate", "schedule", "warmup"),
    *("weight_decay", "max_grad_norm", "batch", "accumulation", "max_length", "dtype", "seed"),
)
_POSITIONS = {"all": "every position", "labels": "the labelled positions"}


def write_card(path: Path, prepared: Prepared, tokens: SafetyTokens | None, result: Result) -> None:
    """Write what a run says of its adapter into the card that PEFT has put at ``path``."""
    card = ModelCard.load(path)
    parts = (_title(prepared), _held(prepared, tokens), _trained(prepared), _measured(result))
    card.text = "\n\n".join(parts) + "\n"
    card.data.tags = sorted({*(card.data.tags or ()), "str-kernels"})
    card.save(path)


def _title(prepared: Prepared) -> str:
    return f"# A LoRA adapter of {prepared.settings.model}"


def _held(prepared: Prepared, tokens: SafetyTokens | None) -> str:
    settings, title = prepared.settings, "## What was held\n\n"
    if tokens is None:
        return f"{title}Nothing: it was trained without a safety constraint."
    named = ", ".join(f"`{token!r}`" for token in tokens.tokens[:_SHOWN])
    more = " and others" if len(tokens) > _SHOWN else ""
    where = _POSITIONS.get(str(settings.positions))
    where = where or f"the first {settings.positions} positions of each response"
    anchors = ""
    if settings.anchors_alone:
        where = "every position of the anchor rows and of no others"
    if prepared.anchors:
        rows = " and ".join(str(len(file.sequences)) for file in prepared.anchors)
        anchors = f" Anchor rows ({rows}) were held and not learned."
    return (
        f"{title}The logits of {len(tokens)} safety tokens ({named}{more}) at {where}, near those "
        f"of the model without this adapter: kind `{settings.kind}`, strength "
        f"{settings.strength:g}{_temperature(settings)}, reference `{settings.reference}`."
        f"{anchors}\n\nThe constraint keeps refusals that the model had. It makes no model safe, "
        "and promises nothing about what nobody measured."
    )


def _temperature(settings: TrainSettings) -> str:
    return f", temperature {settings.temperature:g}" if settings.kind == "kl" else ""


def _trained(prepared: Prepared) -> str:
    facts, settings = prepared.data.facts(), prepared.settings.as_dict()
    shown = {
        "data": f"{facts['rows']} rows, {facts['tokens']} tokens, SHA-256 {facts['sha256']}",
        **{name.replace("_", " "): settings[name] for name in _TRAINING},
        **{name.replace("_", "-"): version for name, version in run_versions().items()},
    }
    return "## How it was trained\n\n" + _table(shown)


def _measured(result: Result) -> str:
    shown: dict[str, Any] = {
        "steps": f"{result.steps} of {result.total_steps}",
        "seconds a step, median": f"{result.step_seconds:.3f}",
        "tokens a second": f"{result.tokens_per_second:,.0f}",
        "peak memory of the process": f"{result.peak_process_mib:,.0f} MiB",
    }
    if result.peak_device_mib is not None:
        shown["peak memory of the device"] = f"{result.peak_device_mib:,.0f} MiB"
    if result.cross_entropy is not None:
        shown["cross-entropy, last log"] = f"{result.cross_entropy:.4f} nats a token"
    if result.eval_cross_entropy is not None:
        shown["cross-entropy, held out"] = f"{result.eval_cross_entropy:.4f} nats a token"
    if result.safety_penalty is not None:
        shown["safety penalty, last log"] = f"{result.safety_penalty:.4f} nats a token"
    if result.safety_probe is not None:
        shown |= _probed(result.safety_probe)
    return (
        "## What was measured\n\n"
        + _table(shown)
        + "\n\nTraining does not measure what the model still refuses; `str-kernels evaluate` "
        f"does. `{DESCRIPTION}` has every setting and figure, and the safety tokens."
    )


def _probed(probe: dict[str, Any]) -> dict[str, str]:
    step = probe["steps"][-1] if probe["stopped_at"] is None else probe["kept_step"]
    refusal = probe["refusal"][probe["steps"].index(step)]
    shown = {"probability of refusing, of the aligned model's (probe)": f"{refusal:.3f}"}
    if probe["stopped_at"] is not None:
        stopped = f"at step {probe['stopped_at']}, by the probe; these weights are of step {step}"
        shown["stopped"] = stopped
    return shown


def _table(rows: dict[str, Any]) -> str:
    lines = [f"| {name} | {_cell(value)} |" for name, value in rows.items()]
    return "\n".join(["| | |", "| --- | --- |", *lines])


def _cell(value: Any) -> str:
    shown = ", ".join(value) if isinstance(value, list) else str(value)
    return shown.replace("|", "\\|")
