"""Measure time and peak memory by N and by V on synthetic states, and fit exponents.

Example: python -m benchmarks.scaling --dtype bfloat16
"""

from __future__ import annotations

import math
import statistics
from pathlib import Path

import torch

from benchmarks.axes import logarithmic, ticks_at
from benchmarks.common import finish, parse, parser, results
from str_kernels.bench import style
from str_kernels.bench.contenders import chosen_contenders
from str_kernels.bench.inputs import synthetic
from str_kernels.bench.measure import measure
from str_kernels.bench.report import cells, markdown, unmeasured
from str_kernels.cli.console import say

NS, VS = (512, 2048, 8192, 32768), (32768, 65536, 131072, 262144)
QUICK_NS, QUICK_VS = (64, 128, 256), (2048, 4096, 8192)
KEYS = ("axis", "contender", "dtype", "N", "V", "D")


def main() -> None:
    """Sweep N at the whole vocabulary, then V at ``--rows`` positions."""
    made = parser(__doc__, rows=2048, dtype="bfloat16")
    made.add_argument("--contenders", default="ours,ours-exact,transformers")
    args = parse(made)
    contenders = chosen_contenders(args.contenders)
    found = results(args, "scaling", KEYS)
    ns, vs = (QUICK_NS, QUICK_VS) if args.quick else (NS, VS)
    points = [("N", n, args.vocab) for n in ns] + [("V", args.rows, v) for v in vs]
    for axis, n, v in points:
        where = {"axis": axis, "dtype": args.dtype, "N": n, "V": v, "D": args.dim}
        todo = [c for c in contenders if not found.has(contender=c.name, **where)]
        if not todo:
            continue
        say(f"N {n:,}, V {v:,}")
        case = synthetic(n, v, args.dim, device=args.device).cast(getattr(torch, args.dtype))
        for contender in todo:
            row = measure(contender, case, repeats=args.repeats, budget_s=args.budget)
            found.add(row | {"axis": axis})
    rows = [row for row in found.rows if row["dtype"] == args.dtype]
    draw(rows, f"D {args.dim}, {args.dtype}", args.out / f"scaling-{args.dtype}.png")
    table = [r | {"problem": f"N {r['N']:,}, V {r['V']:,}, {r['contender']}"} for r in found.rows]
    absent = "".join(f"- {r['problem']}: {line}\n" for r in table for line in unmeasured([r]))
    finish(args.out, "scaling", f"{markdown(*cells(table, 'problem'))}\n{absent}")


def exponent(xs: list[float], ys: list[float]) -> float:
    """Return the slope of the least-squares line through the logarithms."""
    return statistics.linear_regression([*map(math.log, xs)], [*map(math.log, ys)]).slope


_MEANINGS = {"N": "rows, N", "V": "vocabulary, V"}


def draw(rows: list[dict], title: str, path: Path) -> None:
    """Draw seconds and MiB by N and by V."""
    figure, axes = style.new_figure(4, width=4.0)
    for pair, axis_name in ((axes[:2], "N"), (axes[2:], "V")):
        for contender in dict.fromkeys(row["contender"] for row in rows):
            line = [
                r
                for r in rows
                if r["axis"] == axis_name and r["contender"] == contender and "gemms" in r
            ]
            line.sort(key=lambda r: r[axis_name])
            xs = [r[axis_name] for r in line]
            seconds = [statistics.median(r["seconds"]) for r in line]
            mebibytes = [r["peak_bytes"] / 2**20 for r in line]
            for axis, ys, label in zip(
                pair, (seconds, mebibytes), ("seconds", "peak extra memory, MiB"), strict=True
            ):
                look = {"color": style.colour(contender), "label": style.named(contender)}
                axis.plot(xs, ys, marker="o", **look)
                if len(xs) > 1:
                    power = f"$\\propto {axis_name}^{{{exponent(xs, ys):.2f}}}$"
                    axis.annotate(
                        power, (xs[-1], ys[-1]), xytext=(5, 0), textcoords="offset points",
                        color=look["color"], fontsize=9, va="center",
                    )  # fmt: skip
                axis.set_xlabel(_MEANINGS[axis_name])
                axis.margins(x=0.25)
                style.label(axis, "y", label, "lower")
                logarithmic(axis, "y")
                ticks_at(axis, [r[axis_name] for r in rows if r["axis"] == axis_name])
    figure.suptitle(title, fontsize=11)
    style.legend(figure, axes[:1])
    style.save(figure, path)


if __name__ == "__main__":
    main()
