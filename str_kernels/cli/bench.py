"""`str-kernels bench`: the loss head's time, memory and error beside every peer, here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from str_kernels.cli import console
from str_kernels.cli.options import AsJson
from str_kernels.ranks import require_one

SHAPE, QUICK_SHAPE = "1024,65536,512", "256,8192,64"
DTYPES = ("float32", "bfloat16", "float16")


def bench(
    *,
    model: Annotated[
        str | None,
        typer.Option(help="Measure the head of this model: Hub id, local folder, or GGUF file."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="With --model: the text that it reads, conversations as .jsonl (the answers are "
            "measured) or prose. Default: the manual that comes with Python."
        ),
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option(
            metavar="N,V,D",
            help="Without --model: positions, vocabulary and hidden size of synthetic states, "
            f"which are as uncertain as a trained model's. Default: {SHAPE}.",
        ),
    ] = None,
    rows: Annotated[int, typer.Option(help="With --model: how many positions.", min=2)] = 1024,
    dtype: Annotated[str, typer.Option(help=f"One of {', '.join(DTYPES)}.")] = "float32",
    contenders: Annotated[
        str | None, typer.Option(help="Names, comma-separated. Default: all.")
    ] = None,
    trainable: Annotated[
        bool, typer.Option("--trainable", help="Compute the gradient of the head too.")
    ] = False,
    device: Annotated[
        str, typer.Option(help="auto, cpu, cuda, …; auto is the GPU where there is one.")
    ] = "auto",
    out: Annotated[
        Path, typer.Option(help="Folder for JSON Lines, Markdown and PNG; its results are kept.")
    ] = Path("bench"),
    again: Annotated[
        bool, typer.Option("--again", help="Measure again what the folder contains.")
    ] = False,
    as_json: AsJson = False,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Run a small problem, to see what runs here; ranks nothing."),
    ] = False,
) -> None:
    """Compare the loss head with its peers: milliseconds, peak memory, errors against fp64.

    A footnote tells the times in bare products of hidden states and head, which are timed in turns
    with each contender. An interrupted run continues where it stopped.
    """
    require_one("bench")
    default_shape = QUICK_SHAPE if quick else SHAPE
    sizes = _checked(model, data, shape, dtype=dtype, default_shape=default_shape)
    with console.stage("preparing"):
        import torch

        from str_kernels.bench.contenders import chosen_contenders
        from str_kernels.bench.head import KEYS, compare, publish
        from str_kernels.bench.inputs import from_model, synthetic
        from str_kernels.bench.report import Results

        chosen = chosen_contenders(contenders)
        results = Results(out / ("quick.jsonl" if quick else "bench.jsonl"), KEYS, again=again)
        rows = min(rows, 256) if quick else rows
        console.quiet_libraries()
        case = synthetic(*sizes) if model is None else from_model(model, data, rows)
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        case = case.cast(getattr(torch, dtype)).to(device)
    with console.counting("measuring", len(chosen)) as advance:
        found = compare(
            results,
            case,
            chosen,
            trainable=trainable,
            repeats=1 if quick else 5,
            budget_s=10.0,
            advance=lambda name: advance(),
        )
    written = [] if quick else publish(results)
    if as_json:
        console.print_json({**results.as_dict(), "rows": found})
    else:
        _show(found, quick=quick)
    console.say(f"saved {', '.join(map(str, [results.path, *written]))}")
    console.say("next: str-kernels train MODEL DATA.jsonl --out ADAPTER")


def _show(found: list[dict[str, Any]], *, quick: bool) -> None:
    from str_kernels.bench.head import inputs_line, title_of
    from str_kernels.bench.report import COSTS, ERRORS, LEGEND, cells, in_products, unmeasured

    columns = ERRORS if quick else COSTS + ERRORS
    console.print_table(title_of(found), *cells(found, columns=columns))
    for line in unmeasured(found):
        console.say(f"not measured: {line}")
    console.say(f"rows: {inputs_line(found)}")
    if quick:
        console.say("a quick run ranks nothing: it tells what runs here, and its errors (fp64)")
    else:
        console.say(in_products(found))
        console.say(LEGEND)


def _checked(
    model: str | None, data: Path | None, shape: str | None, *, dtype: str, default_shape: str
) -> tuple[int, int, int]:
    """Check the options before anything is loaded; return N, V and D."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}: must be one of {', '.join(DTYPES)}.")
    if model is not None and shape is not None:
        raise ValueError(f"shape={shape!r}: a model has its own shape; give --model or --shape.")
    if model is None and data is not None:
        raise ValueError(f"data={str(data)!r}: needs a model to read it; give --model too.")
    shape = shape or default_shape
    parts = shape.split(",")
    if len(parts) != 3 or not all(part.strip().isdecimal() and int(part) > 1 for part in parts):
        raise ValueError(f"shape={shape!r}: must be three numbers above 1, N,V,D: {SHAPE}.")
    n, v, d = map(int, parts)
    return n, v, d
