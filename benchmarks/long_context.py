"""Memory of a whole training step by context, with each set of levers, beside what `plan` counts.

Each run has a process of its own: two steps of a model with random weights and a LoRA adapter.

Example: python -m benchmarks.long_context --model ./config.json --contexts 1024 4096
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from matplotlib.ticker import MaxNLocator

from benchmarks.common import RESULTS, finish
from str_kernels.bench.report import Results, markdown
from str_kernels.bench.style import new_figure, save
from str_kernels.cli.console import quiet_libraries, say
from str_kernels.planning.check import measured_bytes
from str_kernels.planning.counts import Counter
from str_kernels.planning.levers import Levers, ladder
from str_kernels.planning.request import Request
from str_kernels.planning.subject import subject_of

KEYS = ("model", "context", "levers")
MIB = 1 << 20


def main() -> None:
    """Count and measure what is missing; write table and plots."""
    args = _parsed()
    quiet_libraries()
    if args.one is not None:
        sys.stdout.write(
            json.dumps(_measured(args, args.contexts[0], Levers(**json.loads(args.one)))) + "\n"
        )
        return
    results = Results(args.out / "long_context.jsonl", KEYS, again=args.again)
    if args.model is not None:
        _run(args, results)
    rows = [row for row in results.rows if "counted_bytes" in row]
    for name in sorted({row["model"] for row in rows}):
        mine = [row for row in rows if row["model"] == name]
        if len({row["context"] for row in mine}) < 2:
            continue  # a band needs two
        _draw(mine, args.out / f"long_context-{name}.png")
    finish(args.out, "long_context", _table(rows))


def _parsed() -> argparse.Namespace:
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--model", help="folder, Hub id or JSON file; none: write the table again")
    made.add_argument("--name", help="of the model in the table")
    made.add_argument("--contexts", type=int, nargs="+", default=[4096, 8192, 16384, 32768])
    made.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    made.add_argument("--rank", type=int, default=16)
    made.add_argument("--safety-tokens", type=int, default=64)
    made.add_argument("--tile-tokens", type=int, default=512)
    made.add_argument("--sets", type=int, nargs="+", help="numbers of sets of levers; all")
    made.add_argument("--limit", type=float, default=8.0, help="GiB; longer runs are counted only")
    made.add_argument("--out", type=Path, default=RESULTS)
    made.add_argument("--again", action="store_true", help="measure anew what is there")
    made.add_argument("--here", action="store_true", help="one process; resident is not known")
    made.add_argument("--busy", action="store_true", help="other work runs here: leave times out")
    made.add_argument("--one", help=argparse.SUPPRESS)
    return made.parse_args()


def _run(args: argparse.Namespace, results: Results) -> None:
    given = {"rank": args.rank, "dtype": args.dtype, "safety_tokens": args.safety_tokens}
    name = args.name or Path(args.model).stem
    subject = subject_of(args.model, rank=args.rank, dtype=args.dtype)
    counter = Counter(subject, Request(args.model, 4096, device="cpu", **given))
    sets = ladder("cpu", args.tile_tokens, windows=subject.slides)
    chosen = sets if args.sets is None else [sets[i] for i in args.sets]
    for context in args.contexts:
        for levers in chosen:
            where = {"model": name, "context": context, "levers": levers.words}
            if results.has(**where):
                continue
            say(f"{name}, {context:,} tokens, {levers.words}")
            count = counter.count(context, levers)
            row = {**where, "dtype": args.dtype, "counted_bytes": count.total}
            row |= {"moment": count.moment, "owners": count.owners}
            if count.total < args.limit * 2**30:
                run = _measured if args.here else _in_a_process
                row |= run(args, context, levers)
            results.add(row)


def _in_a_process(args: argparse.Namespace, context: int, levers: Levers) -> dict:
    """Measure in a process of its own; a freed block goes back to the system at once."""
    command = [sys.executable, "-m", "benchmarks.long_context", "--one", json.dumps(asdict(levers))]
    for name in ("model", "dtype", "rank", "safety_tokens"):
        command += ["--" + name.replace("_", "-"), str(getattr(args, name))]
    command += ["--contexts", str(context), *(["--busy"] if args.busy else [])]
    environment = os.environ | {
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "0",
        "STR_KERNELS_INDEX_CACHE": "off",
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return {"error": lines[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def _measured(args: argparse.Namespace, context: int, levers: Levers) -> dict:
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    measured = measured_bytes(
        args.model,
        context,
        levers,
        rank=args.rank,
        dtype=getattr(torch, args.dtype),
        batch=1,
        safety_tokens=args.safety_tokens,
        device=torch.device("cpu"),
    )
    seconds = time.perf_counter() - start  # of building the model, too
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {
        "measured_bytes": measured,
        "resident_bytes": None if args.here else resident * 1024,
        "tokens_per_second": None if args.busy else 2 * context / seconds,
    }


def _table(rows: list[dict]) -> str:
    """The table of all runs that were measured, the worst first."""
    ran = [row for row in rows if "measured_bytes" in row]
    ran.sort(key=lambda row: -abs(_ratio(row) - 1))
    lines = [
        [
            row["model"],
            f"{row['context']:,}",
            row["levers"],
            f"{row['counted_bytes'] / MIB:,.0f}",
            f"{row['measured_bytes'] / MIB:,.0f}",
            f"{_ratio(row):.3f}",
            f"{row['resident_bytes'] / MIB:,.0f}" if row["resident_bytes"] else "–",
            f"{row['tokens_per_second']:.0f}" if row["tokens_per_second"] else "–",
        ]
        for row in ran
    ]
    heads = ["model", "tokens", "levers", "counted, MiB", "measured, MiB", "ratio"]
    table = markdown([*heads, "resident, MiB", "tokens/s"], lines)
    return (
        "Two training steps of a model with random weights on a CPU (LoRA, the constraint with its "
        "reference pass, the index built in the first loss): the most bytes alive at once as "
        "`plan` counts them from the configuration, beside those at the allocator, the worst ratio "
        "first. Resident: the growth of the process, with its libraries' own scratch and the "
        "events of the profiler that measures. Tokens a second include building the model, and "
        "are left out where other work ran beside.\n\n"
        f"{table}\n"
    )


def _ratio(row: dict) -> float:
    return row["counted_bytes"] / row["measured_bytes"]


def _draw(rows: list[dict], path: Path) -> None:
    """Draw counted memory by context, each consumer a band, and what was measured as dots."""
    sets = list(dict.fromkeys(row["levers"] for row in rows))
    figure, axes = new_figure(len(sets), width=4.2)
    names = list(dict.fromkeys(name for row in rows for name in row["owners"]))
    for axis, levers in zip(axes, sets, strict=True):
        mine = sorted((r for r in rows if r["levers"] == levers), key=lambda r: r["context"])
        contexts = [row["context"] for row in mine]
        bands = [[row["owners"].get(name, 0) / MIB for row in mine] for name in names]
        axis.stackplot(contexts, bands, labels=names, alpha=0.7)
        dots = [(r["context"], r["measured_bytes"] / MIB) for r in mine if "measured_bytes" in r]
        if dots:
            axis.plot(*zip(*dots, strict=True), "ko", label="measured")
        axis.set_title(levers, fontsize=9)
        axis.xaxis.set_major_locator(MaxNLocator(5))
        axis.xaxis.set_major_formatter(lambda tokens, _: f"{tokens / 1000:g}k")
        axis.set_xlabel("tokens")
    axes[0].set_ylabel("MiB at the most")
    axes[0].legend(fontsize=7, frameon=False, loc="upper left")
    save(figure, path)


if __name__ == "__main__":
    main()
