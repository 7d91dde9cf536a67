"""How a plan is shown, and the steps that are measured beside it."""

from __future__ import annotations

from typing import Any

import typer

from str_kernels.bench.memory import free_bytes
from str_kernels.cli.console import print_table, say, stage
from str_kernels.planning.check import measured_bytes
from str_kernels.planning.counts import Counter
from str_kernels.planning.plan import Plan, Row
from str_kernels.planning.plots import consumers
from str_kernels.planning.request import GIB, Request
from str_kernels.planning.subject import subject_of

_WIDTH = 60  # characters of the longest bar
_MARKS = "█▓▒░▚▞▪▫◆◇●○"
_CHECKED = 512  # tokens of a checked step at most
_CPU_DTYPES = ("float32", "bfloat16", "float16")


def show(plan: Plan, checked: list[dict[str, Any]]) -> None:
    """Print the tables and the bars."""
    asked, rows = plan.request, [row for row in plan.rows if row.count is not None]
    title = f"{asked.model}: {asked.batch} × {asked.context:,} tokens, {plan.dtype}, GiB"
    columns = [
        "levers",
        "peak",
        *(["fits", "longest context"] if asked.room else []),
        "host",
        "peak is",
    ]
    print_table(title, columns, [_line(row, plan) for row in rows])
    names = consumers(plan)
    table = [[n, *(f"{row.count.owners.get(n, 0) / GIB:.2f}" for row in rows)] for n in names]
    print_table("by consumer", ["consumer", *(row.levers.words for row in rows)], table)
    _bars(plan, rows, names)
    for row in plan.rows:
        if row.refused is not None:
            typer.echo(f"{row.levers.words}: {row.refused}")
    if asked.room is not None:
        typer.echo(_verdict(plan))
    for context, parts in _by_context(plan).items():
        shares = ", ".join(f"{part:.1%} with --share {share:g}" for share, part in parts)
        typer.echo(f"operations of a step in the reference pass, {context:,} tokens: {shares}")
    if checked:
        table = [
            [
                c["levers"],
                f"{c['context']:,}",
                *(f"{c[k] / 2**20:,.1f}" for k in _SIZES),
                f"{c['ratio']:.3f}",
            ]
            for c in checked
        ]
        heads = ["levers", "tokens", "counted, MiB", "measured, MiB", "ratio"]
        print_table("two steps on this CPU", heads, table)
    for sentence in plan.outside:
        say(f"not known: {sentence}")


_SIZES = ("counted_bytes", "measured_bytes")


def _by_context(plan: Plan) -> dict[int, list[tuple[float, float]]]:
    found: dict[int, list[tuple[float, float]]] = {}
    for context, share, part in plan.reference:
        found.setdefault(context, []).append((share, part))
    return found


def _line(row: Row, plan: Plan) -> list[str]:
    longest = []
    if plan.request.room is not None:
        most = f"{row.longest:,}" + (" (all positions)" if row.longest == plan.positions else "")
        longest = ["yes" if row.fits else "no", most if row.longest else "none"]
    host = f"{row.count.host / GIB:.2f}"
    return [row.levers.words, f"{row.count.total / GIB:.2f}", *longest, host, row.count.moment]


def _bars(plan: Plan, rows: list[Row], names: list[str]) -> None:
    scale = _WIDTH / max(row.count.total for row in rows)
    marks = dict(zip(names, _MARKS, strict=False))
    for row in rows:
        typer.echo(f"{row.levers.words}, {row.count.total / GIB:.2f} GiB")
        end, bar = 0.0, ""
        for name in names:
            end += row.count.owners.get(name, 0) * scale
            bar += marks[name] * (round(end) - len(bar))
        typer.echo(f"  {bar}")
    typer.echo("  " + ", ".join(f"{marks[name]} {name}" for name in names))


def _verdict(plan: Plan) -> str:
    asked, best = plan.request, plan.cheapest
    if best is not None:
        return (
            f"{asked.context:,} tokens fit {asked.memory:g} GiB with: {best.levers.words} "
            f"({best.count.total / GIB:.2f} GiB), the cheapest set in time that does."
        )
    row = max((row for row in plan.rows if row.longest), key=lambda row: row.longest, default=None)
    if row is None:
        return f"nothing fits {asked.memory:g} GiB: plan with dtype nf4, or with a smaller batch."
    return (
        f"{asked.context:,} tokens do not fit {asked.memory:g} GiB with any set of levers; the "
        f"longest context that does is {row.longest:,}, with: {row.levers.words}."
    )


def next_command(plan: Plan) -> str:
    """Name the command that comes next, with the levers that were found."""
    best = plan.cheapest or plan.rows[-1]
    options = f" --max-length {plan.request.context}"
    for name in ("gradient_checkpointing", "tile_all", "window_attention"):
        if getattr(best.levers, name):
            options += f" --{name.replace('_', '-')}"
    for name in ("offload", "tile_tokens"):
        if (value := getattr(best.levers, name)) is not None:
            options += f" --{name.replace('_', '-')} {value}"
    return f"next: str-kernels train {plan.request.model} DATA.jsonl --out ADAPTER{options}"


def checked(plan: Plan) -> list[dict[str, Any]]:
    """Count and measure each set of levers on this CPU, at a context of at most 512 tokens.

    Raises:
        ValueError: a body that this machine's step cannot have.
    """
    import torch

    asked = plan.request
    if plan.dtype not in _CPU_DTYPES:
        raise ValueError(
            f"dtype={plan.dtype!r}: --check runs a model with random weights on the CPU; check "
            f"with one of {', '.join(_CPU_DTYPES)}."
        )
    context = min(asked.context, _CHECKED)
    given = {"batch": asked.batch, "rank": asked.rank, "safety_tokens": asked.safety_tokens}
    subject = subject_of(asked.model, rank=asked.rank, dtype=plan.dtype)
    counter = Counter(
        subject, Request(asked.model, context, dtype=plan.dtype, device="cpu", **given)
    )
    found = []
    for row in plan.rows:
        if row.refused is not None or row.levers.offload == "cpu":
            continue
        counted, free = counter.count(context, row.levers).total, free_bytes()
        if free is not None and counted > free:
            raise ValueError(
                f"--check: {row.levers.words} at {context:,} tokens take {counted / GIB:.1f} GiB "
                f"and {free / GIB:.1f} are free here; check a smaller model of the same kind."
            )
        with stage(f"measuring {row.levers.words} at {context:,} tokens"):
            measured = measured_bytes(
                asked.model,
                context,
                row.levers,
                dtype=getattr(torch, plan.dtype),
                device=torch.device("cpu"),
                **given,
            )
        values = (row.levers.words, context, counted, measured, counted / measured)
        found.append(dict(zip(("levers", "context", *_SIZES, "ratio"), values, strict=True)))
    return found
