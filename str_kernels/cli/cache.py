"""`str-kernels cache`: the aligned model's opinion of a data set, computed once for many runs."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from str_kernels.cli.console import (
    check_output,
    counting,
    print_json,
    print_table,
    quiet_libraries,
    say,
    stage,
)
from str_kernels.options import DEFAULT_KIND

if TYPE_CHECKING:
    from str_kernels.training.checks import Prepared


def cache(
    model: Annotated[str, typer.Argument(help="Hub id, local folder, or GGUF file.")],
    data: Annotated[
        str, typer.Argument(help='JSONL: {"prompt", "response"} or {"messages"} on each line.')
    ],
    tokens: Annotated[str, typer.Option(help="Safety tokens file.")],
    out: Annotated[Path, typer.Option(help="The file to write, .safetensors.")],
    kind: Annotated[str, typer.Option(help="Of the run: mse, logprob or kl.")] = DEFAULT_KIND,
    anchors: Annotated[
        list[str] | None, typer.Option(help="Of the run: its files of rows to hold.")
    ] = None,
    max_length: Annotated[
        int, typer.Option(help="Of the run: longest sequence, in tokens.")
    ] = 2048,
    batch: Annotated[int, typer.Option(help="Sequences side by side.")] = 8,
    dtype: Annotated[
        str, typer.Option(help="auto (the checkpoint's), float32, bfloat16 or float16.")
    ] = "auto",
    adapter: Annotated[
        str | None, typer.Option(help="Adapter that belongs to the aligned model; merged into it.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Compute the references of a data set once, for every run that trains on it.

    Rows are found by their tokens: shuffle the data or leave some out as you like.
    """
    check_output("out", out)
    with stage("checking"):
        quiet_libraries()
        from str_kernels.training.caching import batch_count, cache_references, prepare_cache
        from str_kernels.training.model import load
        from str_kernels.training.settings import TrainSettings

        held = {"tokens": tokens, "kind": kind, "anchors": tuple(anchors or ())}
        run = {**held, "max_length": max_length}
        settings = TrainSettings(model, data, str(out), batch=batch, dtype=dtype, **run)
        prepared = prepare_cache(settings, adapter=adapter)
    with stage("loading the model"):
        loaded = load(settings, adapter=adapter)
    safety = prepared.tokens.constraint(settings.strength, kind=kind)
    with counting("batches of references", batch_count(prepared)) as advance:
        stored = cache_references(loaded, prepared, safety, out, advance)
    _show(_facts(prepared, out, stored), as_json)
    say(f"saved {out}")
    _say_next(prepared, adapter)


def _facts(prepared: Prepared, out: Path, stored: int) -> dict[str, Any]:
    from str_kernels.huggingface.constraint.references import reference_unit

    safety = prepared.tokens.constraint(1.0, kind=prepared.settings.kind)
    files = [file.facts() for file in prepared.files]
    rows, tokens, cut = (
        sum(file[n] for file in files) for n in ("rows", "tokens", "cut_responses")
    )
    return {
        "path": str(out),
        "rows": rows,
        "sequences": stored,
        "tokens": tokens,
        "cut_responses": cut,
        "safety_tokens": len(prepared.tokens),
        "unit": reference_unit(safety),
        "bytes": out.stat().st_size,
    }


def _show(facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json({"schema": "str_kernels.cache/1", **facts})
        return
    rows = [[name.replace("_", " "), str(value)] for name, value in facts.items() if name != "path"]
    print_table(f"references in {facts['path']}", ["", ""], rows)


def _say_next(prepared: Prepared, adapter: str | None) -> None:
    settings = prepared.settings
    if adapter is not None:  # training starts from a plain model
        say(f"next: patch_model(model, tokens.constraint(…), reference={settings.out!r})")
        return
    words = ["train", settings.model, settings.data, "--tokens", settings.tokens]
    words += [word for file in settings.anchors for word in ("--anchors", file)]
    words += ["--reference", settings.out, "--max-length", str(settings.max_length)]
    words += [] if settings.kind == DEFAULT_KIND else ["--kind", settings.kind]
    words += [] if settings.dtype == "auto" else ["--dtype", settings.dtype]
    say(f"next: str-kernels {shlex.join(words)} --out ADAPTER")
