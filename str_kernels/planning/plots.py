"""The bars of a plan as a picture."""

from __future__ import annotations

from pathlib import Path

from str_kernels.bench.style import new_figure, save
from str_kernels.planning.plan import Plan
from str_kernels.planning.request import GIB


def draw(plan: Plan, path: Path) -> None:
    """Draw a bar for each set of levers, its consumers in the same order everywhere."""
    rows = [row for row in plan.rows if row.count is not None][::-1]
    figure, (axis,) = new_figure(width=9.0, height=1.8 + 0.45 * len(rows))
    left = [0.0] * len(rows)
    for i, name in enumerate(consumers(plan)):
        sizes = [row.count.owners.get(name, 0) / GIB for row in rows]
        axis.barh([row.levers.words for row in rows], sizes, left=left, label=name, color=f"C{i}")
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    for place, total in enumerate(left):
        axis.annotate(f" {total:.1f}", (total, place), va="center", fontsize=9)
    asked = plan.request
    if asked.memory is not None:
        axis.axvline(asked.memory, color="black", linestyle="--", linewidth=1)
    axis.set_xlabel("GiB at the most, beside the memory that is there (dashed)")
    axis.set_title(f"{asked.model}: {asked.batch} × {asked.context:,} tokens, {plan.dtype}")
    axis.legend(fontsize=8, frameon=False, loc="lower right")
    axis.margins(x=0.1)
    save(figure, path)


def consumers(plan: Plan) -> list[str]:
    """Every consumer of a plan; what no lever changes comes first, then the largest."""
    counts = [row.count for row in plan.rows if row.count is not None]
    names = {name for count in counts for name in count.owners}
    most = {name: max(count.owners.get(name, 0) for count in counts) for name in names}
    least = {name: min(count.owners.get(name, 0) for count in counts) for name in names}
    return sorted(names, key=lambda name: (-least[name] if least[name] else 0, -most[name], name))
