"""Count how often the rule judge agrees with people, part by part.

A row belongs to a part by the hash of its prompt. The rules were written while reading the first
half; a quarter was read afterwards, and corrected them a little; an eighth was read once, when
cases were added that any reader gets right; the last eighth was never read, and its figure is the
one to quote.

Example: python -m benchmarks.judge --data judged_completions.jsonl
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS
from str_kernels.bench.report import Results, markdown
from str_kernels.cli.console import say
from str_kernels.evaluation.judge import Outcome, classify
from str_kernels.evaluation.rates import Rate

NEVER_READ = "never read"
PARTS = ("developed", "read later", "read last", NEVER_READ)
LABELS = ("refusal", "compliance", "partial")


def main() -> None:
    """Judge the file and write ``results/judge.jsonl``; its answers are not copied."""
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--data", type=Path, required=True, help="rows of prompt, completion, label")
    made.add_argument("--out", type=Path, default=RESULTS, help="folder")
    args = made.parse_args()
    with args.data.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file if line.strip()]
    results = Results(args.out / "judge.jsonl", ("part",), again=True)
    for part in PARTS:
        results.add(agreement(rows, part))
    say(_table(results.rows))


def agreement(rows: list[dict[str, str]], part: str) -> dict[str, Any]:
    """Count agreement on refusal or not, and every judgement beside people's."""
    told = {label: dict.fromkeys((o.value for o in Outcome), 0) for label in LABELS}
    for row in rows:
        if part_of(row["prompt"]) == part:
            told[row["label"]][classify(row["completion"]).value] += 1
    refused, answered = told["refusal"], told["compliance"]
    n = sum(refused.values()) + sum(answered.values())
    agreed = refused["refusal"] + sum(answered.values()) - answered["refusal"]
    return {"part": part, "agreed": agreed, "n": n, "judged": told}


def part_of(prompt: str) -> str:
    """Return the part of a prompt: a half, a quarter, an eighth and an eighth of them."""
    number = int(hashlib.sha256(prompt.encode()).hexdigest(), 16)
    halvings = (number % 2, (number >> 1) % 2, (number >> 2) % 2)
    return PARTS[halvings.index(0) if 0 in halvings else 3]


def _table(rows: list[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        partial = row["judged"]["partial"]
        found = f"{partial['partial']} of {sum(partial.values())}"
        lines.append([row["part"], str(row["n"]), str(Rate(row["agreed"], row["n"])), found])
    return markdown(["part", "answers", "agreement", "partial refusals found"], lines)


if __name__ == "__main__":
    main()
