"""Draw every picture anew from the committed results; nothing is measured.

Example: python -m benchmarks.pictures
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from benchmarks import accuracy_plot, end_to_end, equivalence, scaling, str_overhead
from benchmarks.common import RESULTS
from benchmarks.safety import appendix, plots, report
from benchmarks.safety.findings import read
from benchmarks.safety.methods import ANSWERS, HARSH, HARSHEST, ORDINARY, TOPICS, plan_order
from str_kernels.bench import style
from str_kernels.bench.head import publish
from str_kernels.bench.report import SCHEMA, Row, read_rows

SETTINGS = {
    ORDINARY.name: "SST-2,\nrate 0.0005",
    HARSH.name: "SST-2,\nrate 0.002",
    HARSHEST.name: "SST-2,\nrate 0.003",
    TOPICS.name: "AG News,\nrate 0.002",
    ANSWERS.name: "instructions,\nrate 0.002",
}
MACHINES = {
    ("head", "float32", 640): "2 cores of an AMD EPYC, fp32",
    ("head", "bfloat16", 640): "2 cores of an AMD EPYC, bf16",
    ("h200/head", "bfloat16", 640): "NVIDIA H200, bf16",
    ("h200/head", "bfloat16", 4096): "NVIDIA H200, bf16",
}


def main() -> None:
    """Draw into ``benchmarks/results``, or elsewhere."""
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument("--out", type=Path, default=RESULTS)
    out = made.parse_args().out
    heads(out)
    measurements(out)
    safety(out)


def heads(out: Path) -> None:
    """Draw the heads, and write their tables."""
    for name in ("head", "h200/head"):
        publish(_Read(out / f"{name}.jsonl", _rows(name)))
    machines(out / "machines.png")


class _Read:
    """Results that were read from elsewhere, whatever machine and versions they are of."""

    def __init__(self, path: Path, rows: list[Row]) -> None:
        self.path, self.rows = path, rows


def measurements(out: Path) -> None:
    """Draw what the scripts of ``benchmarks`` draw at their end."""
    for (case, dtype), rows in _grouped("accuracy", "case", "dtype").items():
        name = "-".join(case.replace(",", "").replace("'", "").split()).lower()
        drawn = [row for row in rows if "hidden_error" in row]
        accuracy_plot.draw(drawn, case, out / f"accuracy-{name}-{dtype}.png")
    for (dtype, dim), rows in _grouped("scaling", "dtype", "D").items():
        scaling.draw(rows, f"D {dim}, {dtype}", out / f"scaling-{dtype}.png")
    for (model, dtype), rows in _grouped("end_to_end", "model", "dtype").items():
        end_to_end.draw(rows, out / f"end_to_end-{model}-{dtype}.png")
    for (text,), rows in _grouped("equivalence", "text").items():
        equivalence.draw(rows, equivalence.KINDS, out / f"equivalence-{text}.png")
    overhead = [row | {"problem": str_overhead.problem(row)} for row in _rows("str_overhead")]
    str_overhead.draw(overhead, out / "str_overhead.png")


def safety(out: Path) -> None:
    """Draw the safety experiment's pictures."""
    findings, folder = read(RESULTS / "safety", plan_order()), out / "safety"
    for setting in findings.settings():
        appendix.pictures(findings, setting, folder)
    report.compared(findings, folder)
    plots.headline(findings, SETTINGS, folder / "refusals.png")
    rates = (ORDINARY.name, HARSH.name, HARSHEST.name)
    plots.by_learning_rate(findings, rates, folder / "refusals-by-learning-rate.png")
    plots.in_a_row(findings, folder / "in-a-row.png")


def machines(path: Path) -> None:
    """Draw the time of every head that was timed, a panel a machine."""
    figure, axes = style.new_figure(2, width=5.2, height=3.1, rows=2)
    for axis, ((name, dtype, dim), title) in zip(axes, MACHINES.items(), strict=True):
        rows = [
            r for r in _rows(name)
            if (r["dtype"], r["D"]) == (dtype, dim) and "gemms" in r and not r["trainable"]
        ]  # fmt: skip
        timed = [(statistics.median(row["seconds"]), row) for row in rows]
        timed.sort(key=lambda pair: -pair[0])
        names = [style.named(row["contender"]) for _, row in timed]
        colours = [style.colour(row["contender"]) for _, row in timed]
        axis.barh(names, [1e3 * seconds for seconds, _ in timed], color=colours)
        for at, (seconds, _) in enumerate(timed):
            axis.annotate(
                f"{1e3 * seconds:,.0f}", (1e3 * seconds, at), xytext=(3, 0),
                textcoords="offset points", va="center", fontsize=8,
            )  # fmt: skip
        axis.tick_params(axis="y", labelsize=8)
        axis.grid(visible=False, axis="y")
        axis.margins(x=0.22)
        row = timed[0][1]
        axis.set_title(f"{title}: N {row['N']:,}, V {row['V']:,}, D {row['D']:,}", fontsize=8)
        style.label(axis, "x", "forward and backward, ms", "lower")
    style.save(figure, path)


def _rows(name: str) -> list[Row]:
    return read_rows(RESULTS / f"{name}.jsonl", SCHEMA)[1]


def _grouped(name: str, *keys: str) -> dict[tuple, list[Row]]:
    groups: dict[tuple, list[Row]] = {}
    for row in _rows(name):
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups


if __name__ == "__main__":
    main()
