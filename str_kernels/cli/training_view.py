"""Terminal output of a fine-tuning run: progress on stderr, the result on stdout."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

from str_kernels.cli.console import print_json, print_table, quiet_libraries, say
from str_kernels.cli.probe_view import PROBED, course, draw_probe, probe_rows
from str_kernels.ranks import share_work, sharing

if TYPE_CHECKING:
    from str_kernels.training.result import Result
    from str_kernels.training.settings import TrainSettings

LOGGED = (
    "loss",
    "cross_entropy",
    "safety_penalty",
    "safety_drift",
    "token_accuracy",
    "live_share",
    "grad_norm",
)
MEASURED = ("eval_cross_entropy", "eval_safety_penalty", "eval_safety_drift", "eval_loss")


class Lines:
    """Write the progress of a run as lines to stderr."""

    def stage(self, text: str) -> None:
        """Name the stage that begins."""
        say(f"{text} …")

    def step(self, done: int, total: int) -> None:
        """Write nothing: the logs are enough."""

    def log(self, values: dict[str, float]) -> None:
        """Write the averages as one line."""
        names = [name for name in (*LOGGED, *PROBED, *MEASURED) if name in values]
        shown = "  ".join(f"{name} {values[name]:.4f}" for name in names)
        say(f"step {values['step']:>5}  {shown}")

    def notice(self, text: str) -> None:
        """Write the sentence on a line."""
        say(f"note: {text}")


class Bar(Lines):
    """Write the same lines above a progress bar."""

    def __init__(self, progress: Any) -> None:
        self._progress = progress
        self._task = progress.add_task("starting", total=None, probe="")
        self._refusals: list[float] = []

    def stage(self, text: str) -> None:
        """Name the stage that begins, beside the bar."""
        self._progress.update(self._task, description=text)

    def step(self, done: int, total: int) -> None:
        """Move the bar."""
        self._progress.update(self._task, completed=done, total=total)

    def log(self, values: dict[str, float]) -> None:
        """Write the averages, and draw the course of the probe beside the bar."""
        super().log(values)
        if PROBED[0] in values:
            self._refusals.append(values[PROBED[0]])
            self._progress.update(self._task, probe=course(self._refusals))


@contextmanager
def terminal_progress() -> Iterator[Lines]:
    """Yield a bar on a terminal, lines elsewhere."""
    if not sys.stderr.isatty():
        yield Lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Remaining

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        Remaining(),
        TextColumn("{task.fields[probe]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        yield Bar(progress)


def run_training(given: dict[str, Any], *, resume: bool, as_json: bool) -> None:
    """Check, train, and show what was measured.

    Raises:
        ValueError: the command has faults; they are found before its first slow step.
        FloatingPointError: the loss is not finite.
    """
    with terminal_progress() as progress, share_work():
        progress.stage("checking")
        quiet_libraries()
        from str_kernels.training.checks import prepare, refuse_other_engines
        from str_kernels.training.run import train
        from str_kernels.training.settings import TrainSettings

        refuse_other_engines()
        settings = TrainSettings(**given)
        ranks = sharing()
        result = train(prepare(settings, resume=resume), progress)
        if result.safety_probe is not None and ranks.first:
            draw_probe(result.safety_probe, settings)
    if as_json:
        print_json({"schema": "str_kernels.train_result/1", **result.as_dict()})
    else:
        print_table(f"{settings.method}: {settings.model}", ["measured", ""], _rows(result))
    _say_next(settings, result)


def _rows(result: Result) -> list[list[str]]:
    rows = [
        ["steps", f"{result.steps} of {result.total_steps}"],
        ["seconds a step (median)", f"{result.step_seconds:.3f}"],
        ["tokens a second", f"{result.tokens_per_second:,.0f}"],
        ["peak memory of the process", f"{result.peak_process_mib:,.0f} MiB"],
    ]
    if result.peak_device_mib is not None:
        rows.append(["peak memory of the device", f"{result.peak_device_mib:,.0f} MiB"])
    if result.cross_entropy is not None:
        rows.append(["cross-entropy (last log)", f"{result.cross_entropy:.4f}"])
    if result.eval_cross_entropy is not None:
        rows.append(["cross-entropy (held out)", f"{result.eval_cross_entropy:.4f}"])
    if result.safety_penalty is not None:
        rows.append(["safety penalty (last log)", f"{result.safety_penalty:.4f}"])
    if result.safety_probe is not None:
        rows += probe_rows(result.safety_probe)
    return rows


def _say_next(settings: TrainSettings, result: Result) -> None:
    if result.interrupted and result.stopped_at is None:
        say(f"stopped and saved in {settings.out}; the same command with --resume continues")
        raise typer.Exit(code=1)
    if result.stopped_at is not None:
        say(
            f"stopped at step {result.stopped_at}: the adapter is that of step "
            f"{result.safety_probe['kept_step']}; --resume with a lower --probe-stop, or without, "
            "goes on from there"
        )
    say(f"saved {settings.out}")
    say(
        f"next: str-kernels evaluate {settings.model} --adapter {settings.out} "
        "--refusals REFUSALS.jsonl --task TASK.jsonl"
    )
