"""Measure one GPU in nine minutes, or rehearse it on a CPU; make the tables of what was found.

Example: python -m benchmarks.gpu run --out gpu; python -m benchmarks.gpu report gpu
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from benchmarks.common import RESULTS
from benchmarks.gpu import plan
from benchmarks.gpu.record import FILE
from str_kernels.cli.console import say


def main() -> None:
    """Run the steps, or write the report."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    made.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = made.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="measure; what is done already is skipped")
    run.add_argument("--out", type=Path, required=True, help="folder of the results")
    run.add_argument("--only", type=_names, help="steps, comma-separated; default: all")
    limit = sum(plan.BUDGETS.values())
    run.add_argument("--limit", type=float, default=limit, help=f"seconds; default: {limit}")
    run.add_argument("--small", action="store_true", help="rehearse on a CPU, interpreted")
    run.add_argument("--install", action="store_true", help="ask pip for missing peers first")
    run.add_argument("--again", action="store_true", help="run steps that are done, too")
    report = commands.add_parser("report", help="write tables and plots")
    report.add_argument("folder", type=Path, help="what run wrote")
    report.add_argument("--out", type=Path, help="default: benchmarks/results/GPU's name")
    count = commands.add_parser("counts", help="count launches and waits, without a GPU")
    count.add_argument("--out", type=Path, default=RESULTS, help="folder")
    args = made.parse_args()
    if args.command == "counts":
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
        from benchmarks.gpu.counts import counts

        say(f"saved {counts(args.out)}")
        return
    if args.command == "run":
        from benchmarks.gpu.supervise import supervise

        ended = supervise(args)
        wrong = [step for step, state in ended.items() if state != "done"]
        say(f"saved {args.out / FILE}; not done: {', '.join(wrong) or 'none'}")
        return
    if not (args.folder / FILE).is_file():
        made.error(f"folder={str(args.folder)!r}: holds no {FILE}")
    from benchmarks.gpu.report import publish

    for path in publish(args.folder, args.out, RESULTS):
        say(f"saved {path}")


def _names(text: str) -> list[str]:
    names = text.split(",")
    unknown = set(names) - plan.BUDGETS.keys()
    if unknown:
        raise argparse.ArgumentTypeError(
            f"{', '.join(sorted(unknown))}: must be of {', '.join(plan.BUDGETS)}"
        )
    return names


if __name__ == "__main__":
    main()
