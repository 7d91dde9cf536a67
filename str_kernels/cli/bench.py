"""`str-kernels bench`: the loss head's time, memory and error beside every peer, here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from str_kernels.cli.console import counting, print_json, print_table, quiet_libraries, say, stage

if TYPE_CHECKING:
    from str_kernels.bench.inputs import Case

SHAPE, QUICK_SHAPE = "1024,65536,512", "256,8192,64"
DTYPES = ("float32", "bfloat16", "float16")


def bench(
    model: Annotated[
        str | None,
        typer.Option(help="Measure this model's head: Hub id, local folder, or GGUF file."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="With --model: its input. Conversations as .jsonl (the answers are measured), "
            "else prose. Default: the manual that comes with Python."
        ),
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option(
            metavar="N,V,D",
            help="Without a model: positions, vocabulary and hidden size of synthetic states that "
            f"are as uncertain as a trained model's. Default: {SHAPE}.",
        ),
    ] = None,
    rows: Annotated[int, typer.Option(help="With --model: positions.", min=2)] = 1024,
    dtype: Annotated[str, typer.Option(help=f"One of {', '.join(DTYPES)}.")] = "float32",
    contenders: Annotated[
        str | None, typer.Option(help="Names, comma-separated. Default: all there are.")
    ] = None,
    trainable: Annotated[
        bool, typer.Option("--trainable", help="The head's own gradient too.")
    ] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, …")] = "cpu",
    out: Annotated[
        Path, typer.Option(help="Folder for JSON Lines, Markdown and PNG; what it holds is kept.")
    ] = Path("bench"),
    again: Annotated[
        bool, typer.Option("--again", help="Measure anew what the folder holds.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="A small problem, measured once: does it run?")
    ] = False,
) -> None:
    """Measure the loss head beside its peers: time in GEMMs, peak memory, errors against fp64.

    1 GEMM is the bare product of hidden states and head, timed in turns with each contender. An
    interrupted run goes on where it stopped.
    """
    sizes = _checked(model, data, shape, dtype, quick)
    with stage("preparing"):
        from str_kernels.bench.contenders import chosen_contenders
        from str_kernels.bench.head import (
            KEYS,
            compare,
            inputs_line,
            publish,
            table_of,
            title_of,
        )
        from str_kernels.bench.report import LEGEND, Results, unmeasured

        chosen = chosen_contenders(contenders)
        results = Results(out / "bench.jsonl", KEYS, again=again)
        case = _case(model, data, sizes, min(rows, 256) if quick else rows, dtype, device)
    with counting("measuring", len(chosen)) as advance:
        found = compare(
            results,
            case,
            chosen,
            trainable=trainable,
            repeats=1 if quick else 5,
            budget_s=10.0,
            advance=lambda name: advance(),
        )
    written = publish(results)
    if as_json:
        print_json({**results.as_dict(), "rows": found})
    else:
        print_table(title_of(found), *table_of(found))
        for line in unmeasured(found):
            say(f"not measured: {line}")
        say(f"rows: {inputs_line(found)}")
        say(LEGEND)
    say(f"saved {', '.join(map(str, [results.path, *written]))}")
    say("next: str-kernels train MODEL DATA.jsonl --out ADAPTER")


def _checked(
    model: str | None, data: Path | None, shape: str | None, dtype: str, quick: bool
) -> tuple[int, int, int]:
    """N, V and D; all that is wrong with the command is said before anything is loaded."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}: must be one of {', '.join(DTYPES)}.")
    if model is not None and shape is not None:
        raise ValueError(f"shape={shape!r}: a model has its own; give --model or --shape.")
    if model is None and data is not None:
        raise ValueError(f"data={str(data)!r}: needs a model to read it; give --model too.")
    shape = shape or (QUICK_SHAPE if quick else SHAPE)
    parts = shape.split(",")
    if len(parts) != 3 or not all(part.strip().isdecimal() and int(part) > 1 for part in parts):
        raise ValueError(f"shape={shape!r}: must be three numbers above 1, N,V,D: {SHAPE}.")
    n, v, d = map(int, parts)
    return n, v, d


def _case(
    model: str | None,
    data: Path | None,
    sizes: tuple[int, int, int],
    rows: int,
    dtype: str,
    device: str,
) -> Case:
    import torch

    from str_kernels.bench.inputs import from_model, synthetic

    quiet_libraries()
    case = synthetic(*sizes) if model is None else from_model(model, data, rows)
    return case.cast(getattr(torch, dtype)).to(device)
