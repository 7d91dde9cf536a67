"""Make the table of architectures from the rows that were saved."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from str_kernels.bench.report import read_rows

SCHEMA = "str_kernels.architectures/1"
FILE = "architectures.jsonl"
RESULTS = Path(__file__).parents[1] / "results"
NAMES = {"causal": "AutoModelForCausalLM", "image-text": "AutoModelForImageTextToText"}


def markdown(folder: Path = RESULTS) -> str:
    """Write counts, what is not fused with its reason, then the names of what is."""
    head, found = read_rows(folder / FILE, SCHEMA)
    lines = [
        "# Architectures, patched against unpatched",
        "",
        "A tiny random model of each, fp32 on a CPU: loss, every gradient, logits, greedy tokens, "
        "state dict, in evaluation and in training mode "
        f"({', '.join(f'{name} {v}' for name, v in head['packages'].items())}). "
        "Made by `python -m benchmarks.architectures`.",
        "",
    ]
    for task, name in NAMES.items():
        rows = [row for row in found if row["task"] == task]
        if rows:
            lines += [f"## {name}: {_counts(rows)}", "", *_table(rows), ""]
    return "\n".join(lines)


def _counts(rows: list[dict]) -> str:
    counted = Counter(row["outcome"] for row in rows)
    return f"{len(rows)} entries, " + ", ".join(f"{n} {what}" for what, n in counted.most_common())


def _table(rows: list[dict]) -> list[str]:
    fused = [row for row in rows if row["outcome"] == "fused"]
    worst = Counter()
    for row in fused:
        for name, error in row["errors"].items():
            worst[name] = max(worst[name], error)
    scaled = [row for row in fused if row["scaled"]]
    seen = sum(bool(row["fault_seen"]) for row in scaled)
    generated = [row["generates"] for row in fused if row["generates"] is not None]
    return [
        "Largest relative differences: "
        + ", ".join(f"{name} {error:.0e}" for name, error in worst.items())
        + f". Greedy tokens equal: {sum(generated)} of {len(generated)} that generate from token "
        f"ids. A dropped scale or cap is noticed in {seen} of {len(scaled)} that have one.",
        "",
        "| not fused | class | outcome | reason |",
        "|---|---|---|---|",
        *(
            f"| {r['model_type']} | {r['kind']} | {r['outcome']} | {r['reason']} |"
            for r in rows
            if r["outcome"] != "fused"
        ),
        "",
        "Fused: " + ", ".join(row["model_type"] for row in fused) + ".",
    ]
