"""`str-kernels cache`: the references of a data set, computed once for many runs."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from str_kernels.cli import console
from str_kernels.cli.options import AsJson, DataFile, ModelName, options_of
from str_kernels.options import DEFAULT_KIND
from str_kernels.ranks import share_work
from str_kernels.training.settings import LONG, TrainSettings

if TYPE_CHECKING:
    from str_kernels.training.checks import Prepared


@options_of(
    TrainSettings, "kind", "anchors", "eval", "max_length", "long", "batch", "dtype", "device"
)
def cache(
    model: ModelName,
    data: DataFile,
    *,
    tokens: Annotated[str, typer.Option(help="Safety tokens file.")],
    out: Annotated[Path, typer.Option(help="The file to write, .safetensors.")],
    adapter: Annotated[
        str | None, typer.Option(help="Adapter that belongs to the aligned model; merged into it.")
    ] = None,
    as_json: AsJson = False,
    **run: Any,
) -> None:
    """Compute the references of a data set once, for every run that trains on it.

    Give the options of that run. Rows are found by their tokens, so that a run may shuffle the
    data or leave some out.
    """
    console.check_output("out", out)
    with console.stage("checking"):
        console.quiet_libraries()
        from str_kernels.training.caching import batch_count, cache_references, prepare_cache
        from str_kernels.training.model import load
        from str_kernels.training.notices import data_notices

        settings = TrainSettings(model, data, str(out), tokens=tokens, **run)
        prepared = prepare_cache(settings, adapter=adapter)
    for notice in data_notices(prepared):
        console.say(f"note: {notice}")
    with console.stage("loading the model"):
        loaded = load(settings, adapter=adapter)
    safety = settings.constraint(prepared.tokens.token_ids)
    counting = console.counting("batches of references", batch_count(prepared))
    with share_work(), counting as advance:
        stored = cache_references(loaded, prepared, safety, out, advance)
    _show(_facts(prepared, out, stored), as_json)
    console.say(f"saved {out}")
    _say_next(prepared, adapter)


def _facts(prepared: Prepared, out: Path, stored: int) -> dict[str, Any]:
    from str_kernels.huggingface.constraint.references import reference_unit

    safety = prepared.settings.constraint(prepared.tokens.token_ids)
    files = [file.facts() for file in prepared.files]
    counted = ("rows", "tokens", "cut_responses", "skipped_rows", "truncated_prompts")
    totals = {name: sum(file[name] for file in files) for name in counted}
    return {
        "path": str(out),
        **totals,
        "sequences": stored,
        "safety_tokens": len(prepared.tokens),
        "unit": reference_unit(safety),
        "bytes": out.stat().st_size,
    }


def _show(facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        console.print_json({"schema": "str_kernels.cache/1", **facts})
        return
    rows = [[name.replace("_", " "), str(value)] for name, value in facts.items() if name != "path"]
    console.print_table(f"references in {facts['path']}", ["", ""], rows)


def _say_next(prepared: Prepared, adapter: str | None) -> None:
    settings = prepared.settings
    if adapter is not None:  # training starts from a plain model
        console.say(f"next: patch_model(model, tokens.constraint(…), reference={settings.out!r})")
        return
    words = ["train", settings.model, settings.data, "--tokens", settings.tokens]
    words += [word for file in settings.anchors for word in ("--anchors", file)]
    words += [] if settings.eval is None else ["--eval", settings.eval]
    words += ["--reference", settings.out, "--max-length", str(settings.max_length)]
    words += [] if settings.long == LONG[0] else ["--long", settings.long]
    words += [] if settings.kind == DEFAULT_KIND else ["--kind", settings.kind]
    words += [] if settings.dtype == "auto" else ["--dtype", settings.dtype]
    words += [] if settings.device == "auto" else ["--device", settings.device]
    console.say(f"next: str-kernels {shlex.join(words)} --out ADAPTER")
