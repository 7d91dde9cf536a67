"""Writes the tables of ``docs/long-contexts.md`` from plans: ``python docs/long_contexts.py``.

Names of models write their tables alone.
"""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path

from str_kernels.cli.console import quiet_libraries, say
from str_kernels.planning.counts import Counter
from str_kernels.planning.levers import Levers
from str_kernels.planning.longest import Longest
from str_kernels.planning.request import GIB, Request
from str_kernels.planning.subject import subject_of

PAGE = Path(__file__).with_name("long-contexts.md")
MODELS = Path(__file__).with_name("models")
CARDS = (8, 16, 24, 48, 80)
LEFT = 1  # GiB that the driver, the allocator's gaps and the libraries take
CONTEXT = 32768
KEPT = Levers(gradient_checkpointing=True, fused_head=True)
EVERY = Levers(True, "cpu", 2048, fused_head=True)
SETS = (Levers(gradient_checkpointing=True), KEPT, EVERY, replace(EVERY, tile_all=True))
WINDOWS = replace(EVERY, tile_all=True, window_attention=True)


def tables(path: Path) -> str:
    """Return a model's table: by card, the longest context with each set of levers."""
    asked = Request(str(path), CONTEXT, dtype="nf4")
    subject = subject_of(path, rank=asked.rank, dtype=asked.dtype)
    counter = Counter(subject, asked)
    most = subject.positions
    sets = (*SETS, WINDOWS) if subject.slides else SETS
    searches = [Longest(lambda n, x=x: counter.count(n, x).total, most) for x in sets]
    heads = ["card", *(levers.words for levers in sets)]
    lines = [heads, ["---"] + ["---:"] * len(sets)]
    for card in CARDS:
        lines.append(
            [f"{card} GB", *(_cell(x.within((card - LEFT) * GIB), most) for x in searches)]
        )
    bodies = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    weights = counter.fixed / GIB
    return (
        f"### {path.stem}\n\nWeights, adapter and optimizer take {weights:.1f} GiB; the model has "
        f"positions for {subject.positions:,} tokens.\n\n{bodies}\n"
    )


def _cell(found: int, most: int) -> str:
    return f"all {found:,}" if found == most else f"{found:,}" if found else "–"


def main(names: list[str]) -> None:
    """Write the tables of these models again; of all, if none is named."""
    for path in sorted(MODELS.glob("*.json")):
        if names and path.stem not in names:
            continue
        say(f"planning {path.stem} …")
        table, mark = tables(path), f"<!-- {path.stem} -->"
        pattern = re.compile(f"{re.escape(mark)}.*?{re.escape(mark)}", re.DOTALL)
        text = PAGE.read_text(encoding="utf-8")
        PAGE.write_text(pattern.sub(f"{mark}\n{table}{mark}", text), encoding="utf-8")


if __name__ == "__main__":
    quiet_libraries()
    main(sys.argv[1:])
