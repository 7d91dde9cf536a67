"""Predict times on GPUs from counted work; nothing here is measured.

A stage takes at least as long as its operations at the published dense peak and as its bytes at the
published memory bandwidth, whichever is longer; stages follow one another. Real kernels reach a
part of either, so only the comparison between rows may hold. Reads what `benchmarks.counted` wrote.

Example: python -m benchmarks.roofline
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

from benchmarks.common import RESULTS, finish
from str_kernels.bench.report import SCHEMA, markdown, read_rows


class Chip(NamedTuple):
    """A chip's dense peaks in TFLOP/s (TOP/s), memory in TB/s; None: it has no such instruction.

    ``fp32`` is that of torch's products with tf32 off, as it is by default.
    """

    half: float
    int8: float
    fp8: float | None
    fp32: float
    memory: float
    source: str


CHIPS = {
    "A100": Chip(312, 624, None, 19.5, 2.039, "NVIDIA A100 data sheet, 80 GB SXM"),
    "H100": Chip(989.4, 1979, 1979, 66.9, 3.35, "NVIDIA H100 architecture paper, SXM5"),
    "B200": Chip(2250, 4500, 4500, 75, 7.7, "NVIDIA HGX B200 data sheet, an eighth of it"),
    "RTX 4090": Chip(165.2, 660.6, 330.3, 82.6, 1.008, "NVIDIA Ada architecture paper"),
    "RTX 5090": Chip(209.5, 838, 419, 104.8, 1.792, "NVIDIA RTX Blackwell architecture paper"),
    # its fp8 is another format than the kernels' e4m3
    "MI300X": Chip(1307.4, 2614.9, None, 163.4, 5.3, "AMD Instinct MI300X data sheet"),
}


def main() -> None:
    """Predict for every counted row in 16 bits, and write the tables."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.roofline", description=__doc__)
    made.formatter_class = argparse.RawDescriptionHelpFormatter
    made.add_argument("--counted", type=Path, default=RESULTS / "counted.jsonl")
    made.add_argument("--out", type=Path, default=RESULTS, help="folder")
    args = made.parse_args()
    if not args.counted.is_file():
        made.error(f"--counted {args.counted}: no such file; run python -m benchmarks.counted")
    _, counted = read_rows(args.counted, SCHEMA)
    rows = [predict(row, name) for row in counted if row["dtype"] != "float32" for name in CHIPS]
    args.out.mkdir(parents=True, exist_ok=True)
    finish(args.out, "roofline", text([row for row in rows if row is not None]))


def predict(row: dict, name: str) -> dict | None:
    """Predict a counted row on a chip; None if it has no instruction for the screen.

    ``ms``: atomics stay in L2. ``ms_spilled``: every added byte goes to memory and back.
    ``product_ms``: the bare product, at peak. ``cache_tb_s`` of a stage: what L2 must deliver if
    its products are to run at peak; makers do not publish what L2 can.
    """
    chip = CHIPS[name]
    rates = {"operands": chip.half, "fp32": chip.fp32}
    rates["8 bits"] = chip.fp8 if row["screen"] == "fp8" else chip.int8
    if rates["8 bits"] is None:
        return None
    stages = {}
    for stage in row["stages"]:
        computing = stage["operations"] / rates[stage["unit"]] / 1e9
        moving = stage["memory"] / chip.memory / 1e9
        spilled = (stage["memory"] + 2 * stage["added"]) / chip.memory / 1e9
        stages[stage["stage"]] = {
            "computing_ms": computing,
            "moving_ms": moving,
            "spilled_ms": spilled,
            "cache_tb_s": stage["loaded"] / computing / 1e9 if computing else None,
        }
    rows, vocab, dim, _ = row["shape"]
    return {
        **{key: row[key] for key in ("case", "dtype", "rows", "head", "screen", "shape")},
        "on": name,
        "ms": sum(max(s["computing_ms"], s["moving_ms"]) for s in stages.values()),
        "ms_spilled": sum(max(s["computing_ms"], s["spilled_ms"]) for s in stages.values()),
        "product_ms": 2 * rows * vocab * dim / chip.half / 1e9,
        "stages": stages,
    }


def least_rate(exact: dict, eight: dict) -> float:
    """Return how much faster than the 16-bit peak 8-bit products must run to pay."""
    others = eight["ms"] - _longest(eight, "screen")
    return eight["product_ms"] / (exact["ms"] - others)


def _longest(row: dict, stage: str) -> float:
    return max(row["stages"][stage]["computing_ms"], row["stages"][stage]["moving_ms"])


def text(rows: list[dict]) -> str:
    """Write a table for each case, then the peaks and where they come from."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["case"], row["dtype"], row["rows"]), []).append(row)
    parts = [
        "# Predictions, not measurements\n\nMilliseconds of forward and backward at published "
        "dense peaks: a lower bound for every row. *a to b*: the refinement's atomics stay in L2, "
        "or all go to memory and back. In brackets: the time in bare products.\n\n"
        "An 8-bit screen halves operations and bytes alike, quantising costs a pass over W: with "
        "many rows it pays wherever 8-bit products run faster than the rate that is named, in "
        "16-bit peaks. *L2*: TB/s that it must deliver to the 16-bit screen and to the int8 one at "
        "their peaks; makers publish none, and where L2 has less both are slower than here.\n"
    ]
    for (case, dtype, count), mine in groups.items():
        vocab, dim = mine[0]["shape"][1:3]
        headings, lines = _table(mine)
        title = f"## {case}, {dtype}: N {count}, V {vocab}, D {dim}"
        parts.append(f"{title}\n\n{markdown(headings, lines)}")
    headings = ["chip", "16 bits", "int8", "fp8", "fp32", "TB/s", "source"]
    lines = [
        [name, *("none" if x is None else f"{x:g}" for x in chip[:5]), chip.source]
        for name, chip in CHIPS.items()
    ]
    parts.append(f"## Peaks, TFLOP/s\n\n{markdown(headings, lines)}")
    return "\n".join(parts)


def _table(rows: list[dict]) -> tuple[list[str], list[list[str]]]:
    kinds = list(dict.fromkeys((row["head"], row["screen"]) for row in rows))
    headings = ["on", "bare product", *(_heading(*kind) for kind in kinds), "int8 screen", "L2"]
    lines = []
    for name in CHIPS:
        mine = {(row["head"], row["screen"]): row for row in rows if row["on"] == name}
        line = [name, f"{next(iter(mine.values()))['product_ms']:.3g}"]
        line += [_cell(mine.get(kind)) for kind in kinds]
        lines.append([*line, *_verdict(mine)])
    return headings, lines


def _heading(head: str, screen: str) -> str:
    names = {"none": "every logit", "exact": "16-bit screen"}
    return f"{head}, {names.get(screen, f'{screen} screen')}"


def _cell(row: dict | None) -> str:
    if row is None:
        return "none"
    low, high = f"{row['ms']:.3g}", f"{row['ms_spilled']:.3g}"
    time = low if low == high else f"{low} to {high}"
    return f"{time} ({row['ms'] / row['product_ms']:.2f})"


def _verdict(mine: dict[tuple[str, str], dict]) -> tuple[str, str]:
    if not {("frozen", "exact"), ("frozen", "int8")} <= mine.keys():
        return "", ""  # counting was interrupted
    exact, eight = mine["frozen", "exact"], mine["frozen", "int8"]
    gain, least = exact["ms"] / eight["ms"], least_rate(exact, eight)
    cache = (f"{row['stages']['screen']['cache_tb_s']:.1f}" for row in (exact, eight))
    return f"{gain:.2f} times as fast; pays from {least:.2f}", ", ".join(cache)


if __name__ == "__main__":
    main()
