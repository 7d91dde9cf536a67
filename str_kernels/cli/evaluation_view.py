"""The record of an evaluation, and its tables."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from str_kernels.cli.console import print_table, say
from str_kernels.files import sha256_of
from str_kernels.version import __version__, versions

if TYPE_CHECKING:
    from str_kernels.evaluation.evaluation import Evaluation

MEANINGS = {
    "refusal_rate": "refuses what it should",
    "task_accuracy": "answers the task correctly",
    "over_refusal_rate": "refuses harmless requests",
    "judge_agreement": "judge and rules agree",
}
BUILT_IN = "built-in"  # in place of a file of requests to refuse
FILES = {"refusals": "requests to refuse", "benign": "harmless requests"}


class Command(NamedTuple):
    """What the command line asks for: ``paths`` by what their rows are, ``settings`` by name."""

    model: str
    adapter: str | None
    paths: dict[str, Path]
    settings: dict[str, Any]


def record(command: Command, rows: dict[str, list], measured: Evaluation) -> dict[str, Any]:
    """Return what was measured, on what, with which settings and versions, as JSON types."""
    from str_kernels.evaluation.evaluation import SCHEMA

    files = {
        name: {
            "path": str(path),
            "sha256": None if str(path) == BUILT_IN else sha256_of(path),
            "rows": len(rows[name]),
        }
        for name, path in command.paths.items()
    }
    return {
        "schema": SCHEMA,
        "model": command.model,
        "adapter": command.adapter,
        **measured.as_dict(),
        "settings": command.settings,
        "files": files,
        "versions": {"str-kernels": __version__, **versions("torch", "transformers", "peft")},
    }


def show(command: Command, measured: Evaluation) -> None:
    """Print the rates and the counts of outcomes as tables."""
    rows = []
    for name, meaning in MEANINGS.items():
        rate = getattr(measured, name)
        if rate is not None:
            low, high = (f"{100 * bound:.1f}" for bound in rate.interval)
            share = f"{100 * rate.value:.1f} %"
            rows.append([meaning, share, f"{low} to {high}", f"{rate.count} of {rate.total}"])
    title = command.model + (f" with {command.adapter}" if command.adapter else "")
    print_table(title, ["", "rate", "95 % interval", "rows"], rows)
    if measured.outcomes:
        _show_counts(measured.counts)
    unfinished = sum(given["unfinished"] for given in measured.counts.values())
    if unfinished:
        say(f"{unfinished} answers end in the middle of a thought: give more --max-new-tokens.")


def _show_counts(counts: dict[str, dict[str, int]]) -> None:
    outcomes = next(iter(counts.values()))
    rows = [
        [outcome.replace("_", " "), *(str(given[outcome]) for given in counts.values())]
        for outcome in outcomes
        if any(given[outcome] for given in counts.values())
    ]
    print_table("outcomes of the answers", ["", *(FILES[name] for name in counts)], rows)


def next_command(command: Command) -> str:
    """Name the command that a user would run next."""
    if command.adapter is None:
        return f"next: str-kernels train {command.model} DATA.jsonl --out ADAPTER"
    return (
        f"next: str-kernels evaluate {command.model} with the same files, then evaluate --compare "
        "BEFORE.json AFTER.json"
    )
