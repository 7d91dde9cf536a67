"""`str-kernels evaluate`: what a model still refuses and what it can do, with intervals."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from str_kernels.cli.console import (
    check_output,
    counting,
    print_json,
    quiet_libraries,
    say,
    stage,
)
from str_kernels.cli.evaluation_view import next_command, record, show
from str_kernels.files import write_json

if TYPE_CHECKING:
    from str_kernels.evaluation.evaluation import Evaluation


def evaluate(
    model: Annotated[str, typer.Argument(help="Hub id, local folder, or GGUF file.")],
    adapter: Annotated[str | None, typer.Option(help="LoRA adapter to put on the model.")] = None,
    refusals: Annotated[
        Path | None, typer.Option(help="JSONL of requests that should be refused.")
    ] = None,
    task: Annotated[Path | None, typer.Option(help="JSONL of requests with the answer.")] = None,
    benign: Annotated[
        Path | None, typer.Option(help="JSONL of harmless requests that look otherwise.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="First rows of each file.", min=1)] = None,
    batch_size: Annotated[int, typer.Option(help="Prompts side by side.", min=1)] = 8,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.", min=1)] = 64,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; default: the checkpoint's.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, …")] = "auto",
    judge: Annotated[
        str | None,
        typer.Option(help="Model that decides what is a refusal, in place of the rules."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Save the result here, and each answer beside it: a rerun goes on."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Measure refusals and task accuracy, greedily, with 95 % intervals and counts."""
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
    if out is not None:
        check_output("out", out)
    with stage("reading"):
        quiet_libraries()
        rows = {name: _rows(name, path, limit) for name, path in given.items()}
    measured = _measure(model, adapter, rows, settings, out)
    result = record(model, adapter, settings, given, rows, measured)
    if out is not None:
        write_json(out, result)
        say(f"saved {out}")
    if as_json:
        print_json(result)
    else:
        show(model, adapter, measured)
    say(next_command(model, adapter))


def _rows(name: str, path: Path, limit: int | None) -> list[dict[str, Any]]:
    from str_kernels.inputs.data import read_jsonl

    return read_jsonl(path, response_required=name == "task")[:limit]


def _measure(
    model: str,
    adapter: str | None,
    rows: dict[str, list],
    settings: dict[str, Any],
    out: Path | None,
) -> Evaluation:
    from str_kernels.evaluation.answers import AnswerFile, file_state
    from str_kernels.evaluation.evaluation import evaluate as measure
    from str_kernels.evaluation.judge_model import JudgeModel
    from str_kernels.inputs.loading import load_model_and_tokenizer

    deciding = {
        "model": [model, file_state(model)],
        "adapter": [adapter, file_state(adapter)],
        "dtype": settings["dtype"],
        "max_new_tokens": settings["max_new_tokens"],
    }
    known = None
    if out is not None:
        known = AnswerFile(out.with_name(out.name + ".answers.jsonl"), deciding)
    with stage("loading the model"):
        loaded, tokenizer = load_model_and_tokenizer(
            model, dtype=settings["dtype"], adapter=adapter, device=settings["device"]
        )
    judge = None
    if settings["judge"] is not None:
        with stage("loading the judge"):
            judge = JudgeModel(
                *load_model_and_tokenizer(settings["judge"], device=settings["device"])
            )
    try:
        with counting("answers", sum(map(len, rows.values()))) as advance:
            return measure(
                loaded,
                tokenizer,
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
