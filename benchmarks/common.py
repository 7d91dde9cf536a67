"""Arguments, inputs and results are handled here alike for every measurement."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch

from str_kernels.bench.inputs import Case, from_model, synthetic
from str_kernels.bench.report import Results
from str_kernels.cli.console import quiet_libraries, say

RESULTS = Path(__file__).parent / "results"
QUICK_SHAPE = (256, 8192, 64)


def parser(doc: str, *, rows: int, dtype: str = "float32") -> argparse.ArgumentParser:
    """Make a parser with the common options."""
    made = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--model", help="local folder or Hub id; else synthetic states")
    made.add_argument("--data", action="append", help=".jsonl or prose, with --model; repeatable")
    made.add_argument("--rows", type=int, default=rows, help="positions, N")
    made.add_argument("--vocab", type=int, default=262144, help="V of synthetic states")
    made.add_argument("--dim", type=int, default=640, help="D of synthetic states")
    made.add_argument("--dtype", default=dtype, choices=("float32", "bfloat16", "float16"))
    made.add_argument("--device", default="cpu")
    made.add_argument("--repeats", type=int, default=5, help="paired runs at most")
    made.add_argument("--budget", type=float, default=20.0, help="seconds of them at most")
    made.add_argument("--out", type=Path, default=RESULTS, help="folder; what it holds is kept")
    made.add_argument("--again", action="store_true", help="measure anew what is there")
    made.add_argument("--quick", action="store_true", help="a small problem, measured once")
    return made


def parse(made: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the command line; ``--quick`` shrinks the problem."""
    args = made.parse_args()
    if args.model is None and args.data:
        made.error("--data needs a --model to read it")
    if args.quick:
        args.rows, args.vocab, args.dim = QUICK_SHAPE
        args.repeats = 1
        args.out = args.out / "quick" if args.out == RESULTS else args.out
    quiet_libraries()
    return args


def cases(args: argparse.Namespace) -> Iterator[Case]:
    """Yield the inputs that were asked for, one at a time."""
    dtype = getattr(torch, args.dtype)
    if args.model is None:
        yield synthetic(args.rows, args.vocab, args.dim, device=args.device).cast(dtype)
        return
    for data in args.data or [None]:
        yield from_model(args.model, data, args.rows).cast(dtype).to(args.device)


def results(args: argparse.Namespace, name: str, keys: tuple[str, ...]) -> Results:
    """Open the results that a run continues."""
    return Results(args.out / f"{name}.jsonl", keys, again=args.again)


def finish(out: Path, name: str, markdown: str) -> None:
    """Write the table, and tell where everything is."""
    (out / f"{name}.md").write_text(markdown, encoding="utf-8")
    say(markdown)
    say(f"saved {out / name}.*")
