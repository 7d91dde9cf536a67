"""Measure the head beside every peer: time in GEMMs, peak memory, errors against fp64.

Example: python -m benchmarks.head --model ./gemma --data answers.jsonl --dtype bfloat16
"""

from __future__ import annotations

from benchmarks.common import cases, parse, parser, results
from str_kernels.bench.contenders import chosen_contenders
from str_kernels.bench.head import KEYS, compare, publish
from str_kernels.cli.console import say


def main() -> None:
    """Measure, and publish everything that the results hold."""
    made = parser(__doc__, rows=2048)
    made.add_argument("--contenders", help="names, comma-separated; default: all")
    made.add_argument("--trainable", action="store_true", help="the head's own gradient too")
    args = parse(made)
    chosen = chosen_contenders(args.contenders)
    found = results(args, "head", KEYS)
    for case in cases(args):
        say(f"{case.name}, {args.dtype}")
        compare(
            found,
            case,
            chosen,
            trainable=args.trainable,
            repeats=args.repeats,
            budget_s=args.budget,
            advance=lambda name: say(f"  {name}"),
        )
    for path in publish(found):
        say(f"saved {path}")


if __name__ == "__main__":
    main()
