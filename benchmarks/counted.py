"""Count what the Triton kernels do in a forward and backward, without a GPU: operations, bytes.

The router decides on the whole vocabulary here, by the torch backend's own stages, and the live
pairs' formulas (`benchmarks.work`) are what the kernels issue: `tests/triton/interpreted/
test_counted.py` counts the same in Triton's interpreter. Peers are formulas, not counts.

Example: python -m benchmarks.counted --model ./gemma --data answers.jsonl
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks import work
from benchmarks.common import cases, finish, parse, parser, results
from str_kernels.backends.selection import DEFAULT_EPS
from str_kernels.backends.torch import TorchBackend
from str_kernels.bench.inputs import Case
from str_kernels.bench.report import markdown
from str_kernels.cli.console import say
from str_kernels.engine.contract import Block, Head
from str_kernels.engine.forward import tiles_of
from str_kernels.options import TILE, LossOptions
from str_kernels.quantise import EIGHT_BITS, quantise_rows

KEYS = ("case", "dtype", "rows", "chip", "head", "screen")
# GEMMs of frozen and trainable heads by what each peer must multiply.
PEERS = {
    "materialised, chunked or Liger": ("2", "3", "logits, dH, dW"),
    "cut-cross-entropy": (
        "2.2 to 2.4",
        "2.4 to 2.8",
        "logits twice, then 0.2 to 0.4 of dH and of dW that its filter leaves",
    ),
}


def main() -> None:
    """Count every screen on every case, frozen and trainable."""
    made = parser(__doc__, rows=2048, dtype="bfloat16")
    made.add_argument("--chip", default="90", help="whose launch table: 90, gfx942, …")
    args = parse(made)
    if importlib.util.find_spec("triton") is None:
        made.error("needs triton's package for the launch table (pip install triton; Linux only)")
    found = results(args, "counted", KEYS)
    for case in cases(args):
        say(case.name)
        common = {"case": case.name, "dtype": case.dtype, "rows": len(case.labels)}
        common["chip"] = args.chip
        if not found.has(**common, head="trainable", screen="none"):
            for row in counted(case, args.chip):
                found.add(common | row)
    finish(args.out, "counted", text(found.rows))


def counted(case: Case, chip: str) -> Iterator[dict[str, Any]]:
    """Yield a row for each screen with a frozen head, the trainable head, and both exact paths."""
    launches = launches_for(chip, case.hidden_states.dtype)
    hot = tiles_of(case.weight, case.index, fresh=False).hot
    for screen in ("exact", *EIGHT_BITS):
        chosen = launches_for(chip, case.hidden_states.dtype, EIGHT_BITS.get(screen))
        counts = live_counts(case, screen)
        stages, eight_bits = [], screen in EIGHT_BITS
        for block, shape in zip(counts, _shapes(case), strict=True):
            # the blocks here are few enough to be screened as one, with W quantised once
            kept = bool(stages)
            stages += work.routed(shape, block, chosen, eight_bits=eight_bits, kept=kept, hot=hot)
        whole, every = _shape(case, len(case.labels)), torch.stack(counts).sum(0)
        live = every.sum().item() / whole.pairs
        refined = sum(work.padded(block[hot:], chosen["refine"]) for block in counts)
        facts = {"hot": hot, "hot_live": (every[:hot].sum() / every.sum()).item()}
        facts["refined"] = refined / whole.pairs
        yield _row("frozen", screen, stages, whole, live) | facts
        if screen == "exact":  # quantised rows of a weight that moves would go stale
            stages = [
                stage
                for block, shape in zip(counts, _shapes(case), strict=True)
                for stage in work.routed(shape, block, chosen)
            ]
            stages += work.routed_weight(whole, every, launches)
            yield _row("trainable", screen, stages, whole, live)
    stages = [stage for shape in _exact_shapes(case) for stage in exact_stages(shape, launches)]
    yield _row("frozen", "none", stages, whole, 1.0)
    stages += work.exact_weight(whole, launches)
    yield _row("trainable", "none", stages, whole, 1.0)


def launches_for(chip: str, dtype: torch.dtype, screen: torch.dtype | None = None) -> dict:
    """Return the launch table's sizes by stage; ``screen`` is its dtype if it has 8 bits."""
    from str_kernels.backends.triton.launch import launch_for

    arch = int(chip) if chip.isdecimal() else chip
    stages = ("columns", "softmax", "gradient", "refine", "expected", "weight")
    chosen = {stage: launch_for(arch, stage, dtype) for stage in stages}
    return chosen | {"screen": launch_for(arch, "screen", screen or dtype)}


def live_counts(case: Case, screen: str) -> list[Tensor]:
    """Count live rows of each tile ``[T]``, for each block of rows that the Triton backend takes.

    Operands are rounded as the screen rounds them and then multiplied in fp32, as the kernels'
    accumulators do; torch's own half-precision product would round the logits too.
    """
    backend, index = TorchBackend(), case.index
    hidden, weight = case.hidden_states.float(), case.weight.float()
    tiles, found = tiles_of(case.weight, index, fresh=False), []
    for rows in _blocks(case):
        counts = torch.zeros(len(tiles.mean_rows), dtype=torch.int64)
        states, head_rows = hidden[rows], weight
        if screen in EIGHT_BITS:
            states = _rounded(states, EIGHT_BITS[screen], 1 / index.columns)
            head_rows = _rounded(weight, EIGHT_BITS[screen], index.columns)
        for part, block in zip(rows.split(1024), states.split(1024), strict=True):
            head = Head(block, head_rows, None)
            given = Block(head, case.labels[part], tiles, LossOptions())
            masses = backend.screen(given, "exact")
            counts += backend.route(given, masses, DEFAULT_EPS).counts.cpu()
        found.append(counts)
    return found


def exact_stages(shape: work.Shape, launches: dict) -> list[work.Work]:
    """Return the stages of the exact path with the backend's own budget."""
    from str_kernels.backends.triton.backend import DEFAULT_BYTE_BUDGET

    return work.exact(shape, launches, DEFAULT_BYTE_BUDGET // 2)


def _rounded(rows: Tensor, dtype: torch.dtype, columns: Tensor) -> Tensor:
    parts = (quantise_rows(part, dtype, columns) for part in rows.split(4096))
    return torch.cat([quantised.float() * scale[:, None] for quantised, scale in parts])


def _blocks(case: Case, *, routed: bool = True) -> tuple[Tensor, ...]:
    from str_kernels.backends.triton import TritonBackend

    head = Head(case.hidden_states, case.weight, None)
    size = TritonBackend().row_block(head, len(case.labels), routed=routed)
    return torch.arange(len(case.labels)).split(size)


def _shape(case: Case, rows: int) -> work.Shape:
    return work.Shape(rows, *case.weight.shape, case.weight.element_size())


def _shapes(case: Case) -> list[work.Shape]:
    return [_shape(case, len(rows)) for rows in _blocks(case)]


def _exact_shapes(case: Case) -> list[work.Shape]:
    return [_shape(case, len(rows)) for rows in _blocks(case, routed=False)]


def _row(
    head: str, screen: str, stages: list[work.Work], shape: work.Shape, live: float
) -> dict[str, Any]:
    stages = work.total(stages)
    return {
        "head": head,
        "screen": screen,
        "shape": list(shape),
        "live": live,
        "gemms": work.gemms(stages, shape),
        "stages": [{**stage._asdict(), "gemms": work.gemms([stage], shape)} for stage in stages],
    }


def text(rows: list[dict]) -> str:
    """Write a table for each case, then the peers' formulas."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in KEYS[:4]), []).append(row)
    parts = [
        "Counted, not timed: a GEMM is `2·N·V·D` operations on the operands' type, one on 8 bits "
        "is half. *refine* has 2 · live and the padding of its chunks; *dead* is torch's "
        f"product with the tiles' mean rows, 1/{TILE}. *hot* are the products of all rows with "
        "the index's hot tiles, which hold *in hot* of the live pairs; *refined* are the other "
        "ones with their padding, of all pairs. Bytes are as issued: most loads are served by L2, "
        "*memory* is the least that is not.\n"
    ]
    for (case, dtype, count, chip), mine in groups.items():
        vocab, dim = mine[0]["shape"][1:3]
        title = f"### {case}, {dtype}: N {count}, V {vocab}, D {dim}; sizes of chip {chip}"
        parts.append(f"{title}\n\n{markdown(*_table(mine))}")
    lines = [[name, *cells] for name, cells in PEERS.items()]
    peers = markdown(["peer, by formula", "frozen", "trainable", "made of"], lines)
    return "\n".join([*parts, peers])


def _table(rows: list[dict]) -> tuple[list[str], list[list[str]]]:
    headings = ["head", "screen", "GEMMs", "live", "in hot", "refined"]
    headings += ["screen's", "hot's", "refine's", "weight's", "dead's"]
    headings += ["GiB loaded", "stored", "added", "memory"]
    return headings, [_line(row) for row in rows]


def _line(row: dict) -> list[str]:
    def gemms(*words: str) -> str:
        some = [stage["gemms"] for stage in row["stages"] if stage["stage"] in words]
        return f"{sum(some):.3f}" if some else ""

    def gibibytes(kind: str) -> str:
        return f"{sum(stage[kind] for stage in row['stages']) / 2**30:.3g}"

    return [
        row["head"],
        row["screen"],
        f"**{row['gemms']:.3f}**",
        f"{row['live']:.1%}",
        *(f"{row[name]:.1%}" if row.get("hot") else "" for name in ("hot_live", "refined")),
        gemms("screen", "softmax"),
        gemms("hot tiles"),
        gemms("refine", "expected"),
        gemms("logits again", "weight"),
        gemms("dead tiles", "weight, dead tiles"),
        *(gibibytes(kind) for kind in ("loaded", "stored", "added", "memory")),
    ]


if __name__ == "__main__":
    main()
