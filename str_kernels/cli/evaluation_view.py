"""How an evaluation is written down and shown."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from str_kernels.cli.console import print_table
from str_kernels.version import __version__, versions

if TYPE_CHECKING:
    from str_kernels.evaluation.evaluation import Evaluation

MEANINGS = {
    "refusal_rate": "refuses what it should",
    "task_accuracy": "answers the task right",
    "over_refusal_rate": "refuses what is harmless",
    "judge_agreement": "judge and rules agree",
}
FILES = {"refusals": "of what to refuse", "benign": "of what is harmless"}


def record(
    model: str,
    adapter: str | None,
    settings: dict[str, Any],
    paths: dict[str, Path],
    rows: dict[str, list],
    measured: Evaluation,
) -> dict[str, Any]:
    """What was measured, on what, with which settings and versions, as plain JSON types."""
    from str_kernels.evaluation.evaluation import SCHEMA

    files = {
        name: {
            "path": str(path),
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "rows": len(rows[name]),
        }
        for name, path in paths.items()
    }
    return {
        "schema": SCHEMA,
        "model": model,
        "adapter": adapter,
        **measured.as_dict(),
        "settings": settings,
        "files": files,
        "versions": {"str-kernels": __version__, **versions("torch", "transformers", "peft")},
    }


def show(model: str, adapter: str | None, measured: Evaluation) -> None:
    """The rates and the counts of outcomes as tables on stdout."""
    rows = []
    for name, meaning in MEANINGS.items():
        rate = getattr(measured, name)
        if rate is not None:
            low, high = (f"{100 * bound:.1f}" for bound in rate.interval)
            share = f"{100 * rate.value:.1f} %"
            rows.append([meaning, share, f"{low} to {high}", f"{rate.count} of {rate.total}"])
    title = f"{model} with {adapter}" if adapter else model
    print_table(title, ["", "rate", "95 % interval", "rows"], rows)
    if measured.outcomes:
        _show_counts(measured.counts)


def _show_counts(counts: dict[str, dict[str, int]]) -> None:
    outcomes = next(iter(counts.values()))
    rows = [
        [outcome.replace("_", " "), *(str(given[outcome]) for given in counts.values())]
        for outcome in outcomes
        if any(given[outcome] for given in counts.values())
    ]
    print_table("what the answers do", ["", *(FILES[name] for name in counts)], rows)


def next_command(model: str, adapter: str | None) -> str:
    """What a user would do next."""
    if adapter is None:
        return f"next: str-kernels train {model} DATA.jsonl --out ADAPTER"
    return f"next, to compare: str-kernels evaluate {model} with the same files, no --adapter"
