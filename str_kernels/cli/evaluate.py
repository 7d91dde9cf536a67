"""`str-kernels evaluate`: what a model still refuses and what it can do, with intervals."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from str_kernels.cli import console
from str_kernels.cli.evaluation_view import BUILT_IN, Command, next_command, record, show
from str_kernels.cli.options import AsJson, BatchSize, Device, Dtype
from str_kernels.files import replacing, write_json
from str_kernels.ranks import share_work

if TYPE_CHECKING:
    from str_kernels.evaluation.evaluation import Evaluation


def evaluate(
    model: Annotated[str | None, typer.Argument(help="Hub id, local folder, or GGUF file.")] = None,
    *,
    adapter: Annotated[str | None, typer.Option(help="LoRA adapter to put on the model.")] = None,
    refusals: Annotated[
        Path | None,
        typer.Option(
            help=f"JSONL of requests that should be refused; {BUILT_IN}: the requests by which "
            "safety tokens are found, for a first look."
        ),
    ] = None,
    task: Annotated[
        Path | None, typer.Option(help="JSONL of requests with the right answer.")
    ] = None,
    benign: Annotated[
        Path | None, typer.Option(help="JSONL of harmless requests that look harmful.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Read only this many rows of each file.", min=1)
    ] = None,
    batch_size: BatchSize = 8,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.", min=1)] = 64,
    dtype: Dtype = None,
    device: Device = "auto",
    judge: Annotated[
        str | None,
        typer.Option(help="Model that decides what is a refusal, in place of the rules."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="File for the result; each answer is saved beside it, so that a rerun continues."
        ),
    ] = None,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(
            metavar="A.json B.json",
            help="Instead of a model: two results (--out) side by side, in one page that --out "
            "names; default: compare.html.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure refusals and task accuracy of greedy answers, with 95 % intervals and counts."""
    if compare is not None:
        _compare(*compare, Path("compare.html") if out is None else out, model)
        return
    if model is None:
        raise typer.BadParameter("give a MODEL, or --compare A.json B.json.")
    paths = {"refusals": refusals, "task": task, "benign": benign}
    given = {name: path for name, path in paths.items() if path is not None}
    if not given:
        raise typer.BadParameter("give at least one of --refusals, --task and --benign.")
    settings = {
        "limit": limit,
        "batch_size": batch_size,
        "max_new_tokens": max_new_tokens,
        "dtype": dtype,
        "device": device,
        "judge": judge,
    }
    command = Command(model, adapter, given, settings)
    if out is not None:
        console.check_output("out", out)
    with console.stage("reading"):
        console.quiet_libraries()
        rows = {name: _numbered(name, path, limit) for name, path in given.items()}
        notices = _check(model, given, rows)
    for notice in notices:
        console.say(f"note: {notice}")
    rows = {name: [row for _, row in numbered] for name, numbered in rows.items()}
    with share_work() as ranks:
        measured = _measure(command, rows, out)
    result = record(command, rows, measured)
    if out is not None and ranks.first:
        write_json(out, result)
        console.say(f"saved {out}")
    if as_json:
        console.print_json(result)
    else:
        show(command, measured)
    console.say(next_command(command))


def _compare(first: Path, second: Path, out: Path, model: str | None) -> None:
    """Write the page of two results."""
    from str_kernels.evaluation.comparison import Evaluated, page, pairs

    if model is not None:
        raise typer.BadParameter("--compare reads results; leave MODEL out.")
    console.check_output("out", out)
    results = Evaluated(first), Evaluated(second)
    with replacing(out) as partial:
        partial.write_text(page(*results), encoding="utf-8")
    differ = sum(pair.first.verdict != pair.second.verdict for pair in pairs(*results))
    console.say(f"saved {out}: {len(pairs(*results))} requests, {differ} with other verdicts")
    console.say(f"next: open {out} in a browser")


def _numbered(name: str, path: Path, limit: int | None) -> list[tuple[int, dict[str, Any]]]:
    from str_kernels.inputs.data import read_numbered

    if (name, str(path)) == ("refusals", BUILT_IN):
        from str_kernels.safety.templates import REFUSED_REQUESTS

        return list(enumerate(({"prompt": one} for one in REFUSED_REQUESTS), start=1))[:limit]
    return read_numbered(path, response_required=name == "task")[:limit]


def _check(model: str, paths: dict[str, Path], rows: dict[str, list]) -> list[str]:
    """Check what the model's chat template does with the rows, before its weights are read."""
    from str_kernels.inputs.data import check_prompts
    from str_kernels.inputs.loading import load_tokenizer

    tokenizer = load_tokenizer(model)
    return [
        notice
        for name, path in paths.items()
        for notice in check_prompts(path, rows[name], tokenizer, compared=name == "task")
    ]


def _measure(command: Command, rows: dict[str, list], out: Path | None) -> Evaluation:
    from str_kernels.evaluation.answers import AnswerFile, answers_beside, file_state
    from str_kernels.evaluation.evaluation import evaluate as measure
    from str_kernels.evaluation.judge_model import JudgeModel
    from str_kernels.inputs.loading import load_model_and_tokenizer

    settings = command.settings
    deciding = {
        "model": [command.model, file_state(command.model)],
        "adapter": [command.adapter, file_state(command.adapter)],
        "dtype": settings["dtype"],
        "max_new_tokens": settings["max_new_tokens"],
    }
    known = None
    if out is not None:
        known = AnswerFile(answers_beside(out), deciding)
    device = settings["device"]
    with console.stage("loading the model"):
        loaded = load_model_and_tokenizer(
            command.model, dtype=settings["dtype"], adapter=command.adapter, device=device
        )
    judge = None
    if settings["judge"] is not None:
        with console.stage("loading the judge"):
            judge = JudgeModel(*load_model_and_tokenizer(settings["judge"], device=device))
    try:
        with console.counting("answers", sum(map(len, rows.values()))) as advance:
            return measure(
                *loaded,
                **rows,
                max_new_tokens=settings["max_new_tokens"],
                batch_size=settings["batch_size"],
                judge=judge,
                known=known,
                on_answer=advance,
            )
    finally:
        if known is not None:
            known.close()
