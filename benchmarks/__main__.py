"""Run every measurement, one after another; rows that are there are not measured again.

Example: python -m benchmarks --model ./gemma --data answers.jsonl
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys

from str_kernels.cli.console import say


def main() -> None:
    """Run all; stop at the first that fails."""
    made = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    made.add_argument("--model", help="local folder or Hub id; without one no end_to_end")
    made.add_argument("--data", action="append", default=[], help=".jsonl or prose; repeatable")
    made.add_argument("--quick", action="store_true", help="small problems, measured once")
    made.add_argument("--again", action="store_true", help="measure anew what is there")
    args = made.parse_args()
    model = ["--model", args.model] if args.model else []
    real = model + [word for data in args.data for word in ("--data", data)]
    other = ["--other", args.data[0]] if len(args.data) > 1 else []
    runs = [
        ["head", *real],
        ["head", *real, "--dtype", "bfloat16"],
        ["head", *real, "--trainable"],
        ["accuracy", *real, *other],
        ["str_overhead", *real],
        ["scaling"],
        ["equivalence"],
    ]
    if importlib.util.find_spec("triton") is not None:
        runs += [["counted", *real]]
    if args.model:
        runs += [["head"], ["head", "--dtype", "bfloat16"], ["end_to_end", *model]]
    for name, *arguments in runs:
        command = [sys.executable, "-m", f"benchmarks.{name}", *arguments]
        command += ["--quick"] * args.quick + ["--again"] * args.again
        say(" ".join(command[1:]))
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
