"""Run the demo's models for several seeds and kinds of constraint, and tell how far both vary.

Rounding differs from CPU to CPU: ``--threads`` varies it on one (each number with an ``--out`` of
its own), and so does the environment's ONEDNN_MAX_CPU_ISA, which is kept with each row.

Example: python -m benchmarks.demo --seeds 10
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Iterator
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import RESULTS, finish
from str_kernels.bench.report import Results, markdown
from str_kernels.cli.console import quiet_libraries, say
from str_kernels.demo import run
from str_kernels.demo.measure import held_out_prompts, measure_behaviour
from str_kernels.options import DEFAULT_STRENGTHS, SafetyConstraint

SHOWN = run.DemoSettings.kind  # by the demo, at a strength of its own
KINDS = ("aligned", "plain", SHOWN, "kl", "kl_mass")
KEYS = ("kind", "seed", "threads", "isa", "quick")
COLUMNS = ("refusal_rate", "lookalike_refusal_rate", "help_rate", "task_accuracy")


def main() -> None:
    """Align a model for each seed, and tune it in each way that has no row yet."""
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--seeds", type=int, default=10, help="the seeds 0, 1, … of so many runs")
    made.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--out", type=Path, default=RESULTS, help="folder; what it holds is kept")
    made.add_argument("--quick", action="store_true", help="the demo's quick form")
    args = made.parse_args()
    quiet_libraries()
    torch.set_num_threads(args.threads)
    found = Results(args.out / "demo.jsonl", KEYS)
    isa = os.environ.get("ONEDNN_MAX_CPU_ISA", "the machine's")
    for seed in range(args.seeds):
        where = {"seed": seed, "threads": args.threads, "isa": isa, "quick": args.quick}
        kinds = [k for k in args.kinds if not found.has(kind=k, **where)]
        for kind, behaviour in behaviours(kinds, seed, args.quick):
            say(f"seed {seed}, {kind}: {behaviour['refusal_rate']:.0%} refused")
            found.add({"kind": kind, **where, **behaviour})
    finish(args.out, "demo", table(found.rows))


def behaviours(kinds: list[str], seed: int, quick: bool) -> Iterator[tuple[str, dict[str, float]]]:
    """Yield what the model of one seed does, aligned and after it was tuned in each way."""
    if not kinds:
        return
    settings = run.DemoSettings.quick(seed) if quick else run.DemoSettings(seed=seed)
    tokenizer, asked = run.make_tokenizer(), held_out_prompts(settings.prompts)
    aligned = run.align(tokenizer, settings)
    tokens = run.identify_tokens(aligned, tokenizer, settings)
    for kind in kinds:
        if kind == "aligned":
            yield kind, asdict(measure_behaviour(aligned, tokenizer, asked))
            continue
        safety: Any = None
        if kind != "plain":
            strength = settings.strength if kind == SHOWN else DEFAULT_STRENGTHS[kind]
            safety = SafetyConstraint(tokens.token_ids, strength, kind)
        tuned, _ = run.fine_tune(aligned, tokenizer, settings, safety)
        yield kind, asdict(measure_behaviour(tuned, tokenizer, asked))


def table(rows: list[dict]) -> str:
    """Make a table with a line for each kind and rounding: median, and least to most."""

    def key(row: dict) -> tuple:
        return row["quick"], row["threads"], row["isa"], KINDS.index(row["kind"])

    lines = []
    for (quick, threads, isa, kind), group in groupby(sorted(rows, key=key), key):
        several = list(group)
        spans = [_span([row[name] for row in several]) for name in COLUMNS]
        quickly = " (quick)" if quick else ""
        lines.append([KINDS[kind] + quickly, f"{threads}, {isa}", f"{len(several)}", *spans])
    headings = ["kind", "threads, instructions", "seeds", "refused", "look-alikes refused"]
    return markdown([*headings, "helped", "task"], lines)


def _span(shares: list[float]) -> str:
    return f"{statistics.median(shares):.0%} ({min(shares):.0%} to {max(shares):.0%})"


if __name__ == "__main__":
    main()
