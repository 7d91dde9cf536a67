"""Compare every contender on every case; an interrupted comparison can be resumed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from str_kernels.bench import plots
from str_kernels.bench.contenders import Contender
from str_kernels.bench.inputs import Case
from str_kernels.bench.measure import live_share, measure
from str_kernels.bench.report import LEGEND, Results, Row, cells, in_products, markdown, unmeasured
from str_kernels.bench.truth import truth_of

KEYS = ("contender", "case", "dtype", "N", "V", "D", "trainable")


def compare(
    results: Results,
    case: Case,
    contenders: Iterable[Contender],
    *,
    trainable: bool = False,
    advance: Callable[[str], None] = lambda name: None,
    **timing: Any,
) -> list[Row]:
    """Measure what ``results`` has no row of; return this case's rows, the inputs' own first.

    ``advance`` is called with the name of each contender when it is done; ``timing`` goes to
    ``clock.paired``.
    """
    where = {**case.facts, "trainable": trainable}
    truth = None
    for contender in contenders:
        if not results.has(contender=contender.name, **where):
            if truth is None:
                truth = truth_of(case)
                facts = {"contender": "inputs", **where, **truth.statistics()}
                facts["live"], facts["dead_mass"] = live_share(case, case.index)
                facts["live_token_order"], facts["dead_mass_token_order"] = live_share(case, None)
                results.add(facts)
            results.add(measure(contender, case, truth=truth, trainable=trainable, **timing))
        advance(contender.name)
    return [row for row in results.rows if all(row.get(k) == v for k, v in where.items())]


def inputs_line(rows: list[Row]) -> str:
    """Say how certain the measured rows are, and what routing makes of them."""
    facts = next(row for row in rows if row["contender"] == "inputs")
    return (
        f"entropy {facts['entropy']:.2f} nats (10 to 90 %: {facts['entropy_q10']:.2f} to "
        f"{facts['entropy_q90']:.2f}), p(label) {facts['p_label_q10']:.3f} / "
        f"{facts['p_label_q50']:.3f} / {facts['p_label_q90']:.3f} at 10 / 50 / 90 %, "
        f"{facts['confident']:.0%} of the rows confident; live pairs {facts['live']:.1%} with an "
        f"index, {facts['live_token_order']:.1%} without"
    )


def title_of(rows: list[Row]) -> str:
    """Say what was measured."""
    row = rows[0]
    head = "trainable" if row["trainable"] else "frozen"
    shape = f"N {row['N']:,}, V {row['V']:,}, D {row['D']:,}"
    return f"{row['case']}: {shape}, {row['dtype']}, {head} head"


def stem_of(rows: list[Row]) -> str:
    """Return a file name for the plot."""
    row = rows[0]
    words = f"{row['case']} {row['dtype']} {'trainable' if row['trainable'] else ''}"
    return "-".join("".join(c if c.isalnum() else " " for c in words.lower()).split())


def publish(results: Results) -> list[Path]:
    """Plot every case of the results, and write all their tables into one Markdown file."""
    out, name = results.path.parent, results.path.stem
    groups: dict[tuple, list[Row]] = {}
    for row in results.rows:
        groups.setdefault(tuple(row[key] for key in KEYS[1:]), []).append(row)
    text, written = [], []
    for rows in groups.values():
        plot = out / f"{name}-{stem_of(rows)}.png"
        if plot in written:  # the same inputs in another shape
            plot = plot.with_stem("-".join([plot.stem, *(f"{k}{rows[0][k]}" for k in "NVD")]))
        plots.head_bars(rows, title_of(rows), plot)
        table = markdown(*cells(rows))
        absent = "".join(f"- {line}\n" for line in unmeasured(rows))
        notes = f"Rows: {inputs_line(rows)}.\n\n{table}\n{in_products(rows)}.\n\n{absent}"
        text.append(f"### {title_of(rows)}\n\n{notes}")
        written.append(plot)
    path = out / f"{name}.md"
    path.write_text("\n".join([*text, f"{LEGEND}.\n"]), encoding="utf-8")
    return [path, *written]
