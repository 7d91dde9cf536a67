"""Every architecture of transformers, tiny, patched against unpatched: what fuses and what not.

Example: python -m benchmarks.architectures
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from importlib.metadata import version
from pathlib import Path

from str_kernels.cli.console import quiet_libraries, say
from tests.huggingface.sweep import examine
from tests.huggingface.tiny_configs import TASKS

SCHEMA = "str_kernels.architectures/1"
RESULTS = Path(__file__).parent / "results"
NAMES = {"causal": "AutoModelForCausalLM", "image-text": "AutoModelForImageTextToText"}


def main() -> None:
    """Examine, write JSON after each, then the table."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.architectures", description=__doc__)
    made.add_argument("--task", choices=TASKS, action="append", help="default: all")
    made.add_argument("--only", nargs="+", help="model types; shown, not saved")
    made.add_argument("--out", type=Path, default=RESULTS)
    args = made.parse_args()
    quiet_libraries()
    rows: list[dict] = []
    for task in args.task or TASKS:
        for model_type in args.only or TASKS[task][1]:
            row = examine(model_type, task).as_row()
            rows.append(row)
            say(f"{task} {model_type}: {row['outcome']} {row['reason']}")
            if args.only:
                say(json.dumps(row))
    if args.only:
        return
    packages = {name: version(name) for name in ("torch", "transformers")}
    save({"schema": SCHEMA, "packages": packages, "rows": rows}, args.out)


def save(results: dict, folder: Path) -> None:
    """JSON, a line for each architecture, and the table."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = ",\n".join(json.dumps(row) for row in results["rows"])
    head = json.dumps({**results, "rows": []})
    (folder / "architectures.json").write_text(f"{head[:-2]}\n{rows}\n]}}\n", "utf-8")
    (folder / "architectures.md").write_text(markdown(results), "utf-8")
    say(markdown(results))


def markdown(saved: dict) -> str:
    """Counts, everything that is not fused with its reason, then the fused ones by name."""
    lines = [
        "# Architectures, patched against unpatched",
        "",
        "A tiny random model of each, fp32 on a CPU: loss, every gradient, logits, greedy tokens, "
        "state dict, in evaluation and in training mode "
        f"({', '.join(f'{name} {v}' for name, v in saved['packages'].items())}). "
        "Made by `python -m benchmarks.architectures`.",
        "",
    ]
    for task, name in NAMES.items():
        rows = [row for row in saved["rows"] if row["task"] == task]
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


if __name__ == "__main__":
    main()
