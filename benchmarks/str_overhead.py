"""Measure what the constraint adds to the fused head, by K and kind, in turns with none.

The results also have rows of a removed kind (``floor``) and a removed reference (static).

Example: python -m benchmarks.str_overhead --model ./gemma --data answers.jsonl
"""

from __future__ import annotations

import itertools
from argparse import Namespace
from pathlib import Path

import torch

from benchmarks.axes import ticks_at
from benchmarks.common import cases, finish, parse, parser, results
from str_kernels.bench import style
from str_kernels.bench.clock import paired
from str_kernels.bench.inputs import Case
from str_kernels.bench.report import markdown
from str_kernels.cli.console import say
from str_kernels.functional import linear_cross_entropy

TOKENS = (16, 64, 256, 1024)
KINDS = ("mse", "logprob", "kl", "kl_mass")
GOAL = 0.03  # at K = 64 with a cached reference
KEYS = ("case", "dtype", "N", "V", "D", "K", "kind", "reference")


def main() -> None:
    """Measure every K and kind with a cached reference ``[N, K]``."""
    args = parse(parser(__doc__, rows=2048))
    found = results(args, "str_overhead", KEYS)
    for case in cases(args):
        for k, kind in itertools.product(TOKENS, KINDS):
            row = {**case.facts, "K": k, "kind": kind, "reference": "cached"}
            if k <= row["V"] and not found.has(**row):
                say(f"K {k}, {kind}")
                found.add(row | overhead(case, k, kind, args))
    for row in found.rows:
        row["problem"] = problem(row)
    draw(found.rows, args.out / "str_overhead.png")
    lines = [
        [
            r["problem"],
            f"{r['K']}",
            r["kind"],
            r["reference"],
            f"{r['added']:+.1%}",
            f"{r['spread']:.1%}",
        ]
        for r in found.rows
    ]
    headings = ["problem", "K", "kind", "reference", "added", "spread of the runs"]
    finish(args.out, "str_overhead", markdown(headings, lines))


def overhead(case: Case, k: int, kind: str, args: Namespace) -> dict[str, float | int]:
    """Return the median of paired runs, as a share of the head without a constraint."""
    safety, reference = case.constraint(k, kind)

    def step(**constraint) -> None:
        hidden = case.hidden_states.detach().requires_grad_()
        loss = linear_cross_entropy(
            hidden, case.weight, case.labels, index=case.index, **constraint
        )
        torch.autograd.grad(loss, hidden)

    timing = paired(
        lambda: step(safety=safety, reference=reference),
        step,
        device=case.hidden_states.device,
        repeats=args.repeats,
        budget_s=args.budget,
    )
    ratios = timing.ratios
    return {"added": timing.ratio - 1, "spread": max(ratios) - min(ratios), "runs": len(ratios)}


def problem(row: dict) -> str:
    """Name what was measured."""
    return f"{row['case']}: N {row['N']:,}, V {row['V']:,}, {row['dtype']}"


_DASHES = {"cached": "-", "static": "--"}


def draw(rows: list[dict], path: Path) -> None:
    """Draw the added share by K, in a panel for each case."""
    names = list(dict.fromkeys(row["problem"] for row in rows))
    figure, axes = style.new_figure(len(names), width=5.0)
    for axis, name in zip(axes, names, strict=True):
        mine = [row for row in rows if row["problem"] == name]
        for kind, reference in dict.fromkeys((r["kind"], r["reference"]) for r in mine):
            line = [r for r in mine if (r["kind"], r["reference"]) == (kind, reference)]
            xs, ys = [r["K"] for r in line], [100 * r["added"] for r in line]
            label = f"{kind}, {reference} reference"
            ranges = [50 * r["spread"] for r in line]
            look = {"color": style.colour(kind), "linestyle": _DASHES.get(reference, ":")}
            if kind == "kl":
                label += " (default)" if reference == "cached" else ""
            axis.errorbar(
                xs, ys, yerr=ranges, marker="o", ms=4, lw=1.2, elinewidth=0.6, label=label, **look
            )
        axis.axhline(100 * GOAL, color="black", linewidth=0.8, linestyle=":", label="goal at K 64")
        ticks_at(axis, [row["K"] for row in mine])
        axis.set_xlabel("safety tokens, K")
        style.label(axis, "y", "added to forward and backward, %", "lower")
        axis.set_title(name.replace(": ", "\n"), fontsize=10)
    style.legend(figure, axes)
    style.save(figure, path)


if __name__ == "__main__":
    main()
