"""Examine every architecture of transformers, and write the rows and the table.

Example: python -m benchmarks.architectures
"""

from __future__ import annotations

import argparse
import json
from importlib.metadata import version
from pathlib import Path

from benchmarks.architectures.sweep import examine
from benchmarks.architectures.table import FILE, RESULTS, SCHEMA, markdown
from benchmarks.architectures.tiny_configs import TASKS
from str_kernels.bench.report import write_rows
from str_kernels.cli.console import quiet_libraries, say


def main() -> None:
    """Examine all, or only those that are named."""
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
    write_rows(args.out / FILE, {"schema": SCHEMA, "packages": packages}, rows)
    text = markdown(args.out)
    (args.out / "architectures.md").write_text(text, "utf-8")
    say(text)


if __name__ == "__main__":
    main()
