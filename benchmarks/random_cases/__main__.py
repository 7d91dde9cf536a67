"""Compare the loss with fp64 in random cases over all its options and every backend.

Values and gradients are compared number by number with a bound that is derived from dtype and
options (`benchmarks.random_cases.tolerance`). Each case follows from its seed alone, so that one
that failed can be run again: `--only SEED` prints what was drawn and what came of it. A case is
written down as soon as it is done; a run that was interrupted goes on, and `--jobs` share a file.

Example: python -m benchmarks.random_cases --cases 10000 --seed 0
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import RESULTS
from benchmarks.random_cases.check import check
from benchmarks.random_cases.draw import OPTIONS, draw_options
from str_kernels.bench.report import SCHEMA, circumstances, commit, write_rows
from str_kernels.cli.console import quiet_libraries, say

INTERPRETER = "TRITON_INTERPRET"


def main() -> None:
    """Run the cases that are not there yet, in parts, and write the summary."""
    args = _parse()
    quiet_libraries()
    torch.set_num_threads(1)
    if args.only:
        sys.exit(_show(args.only))
    cases = args.out / "random_cases.cases.jsonl"
    if args.part:
        _run_part(cases, seeds_of(args.part, _seeds(args)))
        return
    if args.again:
        cases.unlink(missing_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)
    parts = [f"{job}/{args.jobs}" for job in range(args.jobs)] + ["triton"]
    children = [_start(part) for part in parts]
    broken = [part for part, child in zip(parts, children, strict=True) if child.wait()]
    wanted = set(_seeds(args))
    rows = [row for row in read(cases) if row["seed"] in wanted]
    write_rows(args.out / "random_cases.jsonl", _head(args), summary(rows))
    failures = [row for row in rows if row["failed"]]
    say(f"{len(rows)} cases, {len(failures)} failures; {args.out / 'random_cases.jsonl'}")
    for row in failures[:20]:
        say(f"  --only {row['seed']}: {row.get('exception') or row['shares']}")
    if broken:
        say(f"  these parts ended early: {', '.join(broken)}; the same command goes on")
    sys.exit(1 if failures or broken else 0)


def _parse() -> argparse.Namespace:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.random_cases",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--cases", type=int, default=1000)
    made.add_argument("--seed", type=int, default=0, help="the first case's; the next is one more")
    made.add_argument("--only", type=int, nargs="+", metavar="SEED", help="show these cases")
    made.add_argument("--jobs", type=int, default=1, help="processes beside the interpreter's")
    made.add_argument("--out", type=Path, default=RESULTS, help="folder; what it holds is kept")
    made.add_argument("--again", action="store_true", help="run anew what is there")
    made.add_argument("--part", help=argparse.SUPPRESS)  # of this command's own processes
    args = made.parse_args()
    for name, least in (("cases", 1), ("jobs", 1), ("seed", 0)):
        if getattr(args, name) < least:
            made.error(f"--{name} {getattr(args, name)}: must be {least} or more")
    return args


def _seeds(args: argparse.Namespace) -> range:
    return range(args.seed, args.seed + args.cases)


def seeds_of(part: str, seeds: Iterable[int]) -> list[int]:
    """Return the seeds of a part: Triton's, which need the interpreter, or every n-th other."""
    triton = part == "triton"
    mine = [s for s in seeds if (draw_options(s)["backend"] == "triton") == triton]
    if triton:
        return mine
    first, step = map(int, part.split("/"))
    return mine[first::step]


def _start(part: str) -> subprocess.Popen:
    """Begin a process for one part, with the arguments of this one."""
    environment = os.environ
    if part == "triton":  # numpy warns about the logarithm of 0, which masked tokens have
        environment = {**environment, INTERPRETER: "1", "PYTHONWARNINGS": "ignore"}
    arguments = [word for word in sys.argv[1:] if word != "--again"]
    command = [sys.executable, "-m", "benchmarks.random_cases", *arguments, "--part", part]
    return subprocess.Popen(command, env=environment)


def _run_part(path: Path, seeds: list[int]) -> None:
    """Run those that are not there; one write appends a whole line, whoever else does."""
    if INTERPRETER in os.environ:
        from benchmarks import interpreter

        interpreter.mend()
    done = {row["seed"] for row in read(path)}
    for count, seed in enumerate(seed for seed in seeds if seed not in done):
        line = json.dumps(check(seed)) + "\n"
        with path.open("ab", buffering=0) as file:
            file.write(line.encode())
        if count % 100 == 99:
            say(f"{count + 1} cases of {len(seeds)}")


def read(path: Path) -> list[dict[str, Any]]:
    """Read the cases that are done; a line that was cut short is run again."""
    rows = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        rows[row["seed"]] = row
    return list(rows.values())


def _show(seeds: list[int]) -> int:
    """Print these cases; those of Triton in the interpreter."""
    if any(draw_options(seed)["backend"] == "triton" for seed in seeds):
        os.environ[INTERPRETER] = "1"  # before the first import of triton
        from benchmarks import interpreter

        interpreter.mend()
    rows = [check(seed) for seed in seeds]
    for row in rows:
        sys.stdout.write(json.dumps(row, indent=2) + "\n")
    return int(any(row["failed"] for row in rows))


def _head(args: argparse.Namespace) -> dict[str, Any]:
    command = f"python -m benchmarks.random_cases --cases {args.cases} --seed {args.seed}"
    about = {"commit": commit(), "command": command}
    return {"schema": SCHEMA, "circumstances": circumstances(), **about}


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Make a line for each value of each option, one for all cases, and one for each failure."""
    groups = [{"option": "all", "value": None}]
    groups += [
        {"option": name, "value": value}
        for name in OPTIONS
        for value in dict.fromkeys(OPTIONS[name])
    ]
    lines = [group | _worst(_in(group, rows)) for group in groups]
    return lines + [{"failure": row["seed"], **row} for row in rows if row["failed"]]


def _in(group: dict[str, Any], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    name, value = group["option"], group["value"]
    if name == "all":
        return rows
    # 0 is not False here, nor is 1 True
    return [row for row in rows if repr(row["options"][name]) == repr(value)]


def _worst(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Count cases and failures; name the largest relative error and share of a bound, by result."""
    found: dict[str, Any] = {"cases": len(rows), "failures": sum(row["failed"] for row in rows)}
    for kind in ("errors", "shares"):
        worst: dict[str, list] = {}
        for row in rows:
            for name, value in row[kind].items():
                if value is not None and value >= worst.get(name, [-1.0])[0]:
                    worst[name] = [float(f"{value:.3g}"), row["seed"]]
        found[f"worst_{kind}"] = worst
    return found


if __name__ == "__main__":
    main()
