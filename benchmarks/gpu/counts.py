"""Count what one call asks of a GPU, without one: launches, waits of the host, copies to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

from benchmarks.interpreter import mend
from str_kernels import waits
from str_kernels.backends.triton import TritonBackend
from str_kernels.bench.inputs import Case, synthetic
from str_kernels.bench.launches import Launches, counted_launches
from str_kernels.bench.report import Results, Row, markdown
from str_kernels.cli.console import say
from str_kernels.functional import linear_cross_entropy

BLOCK, VOCAB, DIM, TOKENS = 32, 300, 32, 8
PATHS: dict[str, dict[str, Any]] = {
    "every logit exact": {"filter_eps": 0.0},
    "screened, 16 bits": {"screen": "exact"},
    "screened, int8": {"screen": "int8"},
}
KINDS = (None, "mse", "logprob", "kl")
KEYS = ("path", "constraint", "trainable")
_INTRODUCTION = """# What one call asks of a GPU

Counted and not timed, forward and backward, the second call. Calls of one and of two blocks of rows
tell what each block costs and what a call has once: launches of our kernels and of torch's
operations (views and allocations are left out; some operations have more than one launch). Then
come what makes the host wait, and copies to the device. The kernels run in Triton's interpreter on
a small head, on the path that a GPU takes; its 8-bit rows are made in one slice. One wait is
allowed, where every logit is exact and the call has more than one block: `read_sent` learns how
many rows need the vocabulary, while the device computes the first block. The four casts of a block
of exact logits (`_to_copy`) are a CPU's: cuBLAS multiplies bf16 into fp32 without them.
Operations, bytes and padding are in [counted.md](counted.md);
`tests/triton/interpreted/test_launches.py` bounds these counts."""
_COMMON = 6  # operations of torch that are named


class Call(NamedTuple):
    """What is counted."""

    path: str
    constraint: str | None
    trainable: bool = False


class _SmallBlocks(TritonBackend):
    """Takes so few rows at once that the interpreter is fast."""

    def row_block(self, head: Any, rows: int, *, routed: bool) -> int:
        return min(rows, BLOCK)


def counts(out: Path) -> Path:
    """Count every path; write ``counts.jsonl`` and ``counts.md``."""
    mend()
    found = Results(out / "counts.jsonl", KEYS, again=True)
    calls = [Call(path, kind) for path in PATHS for kind in KINDS]
    as_on_a_gpu = mock.patch.object(waits, "allowed", return_value=False)
    with as_on_a_gpu:
        for call in [*calls, *(Call(path, None, trainable=True) for path in PATHS)]:
            say(f"{call.path}, {call.constraint or 'no constraint'}")
            found.add(call._asdict() | counted(call))
    path = out / "counts.md"
    path.write_text(text(found.rows), encoding="utf-8")
    return path


def counted(call: Call) -> Row:
    """Return the counts of a block, of what is outside blocks, and the commonest operations."""
    one, two = (_asked(call, blocks) for blocks in (1, 2))
    block = two - one
    return {
        "block": block.totals(),
        "outside": (one - block).totals(),
        "kernels": dict(block.kernels.most_common()),
        "waits": dict(two.waits.most_common()),
        "torch": dict(one.torch.most_common(_COMMON)),
    }


def _asked(call: Call, blocks: int) -> Launches:
    """Count the second forward and backward; the first one fills what is kept."""
    case = synthetic(BLOCK * blocks, VOCAB, DIM).cast(torch.bfloat16)
    settings = dict(PATHS[call.path])
    if "filter_eps" not in settings:
        settings["index"] = case.index
    if call.constraint is not None:
        settings["safety"], settings["reference"] = case.constraint(TOKENS, call.constraint)
    _call(case, settings, trainable=call.trainable)
    with counted_launches() as found:
        _call(case, settings, trainable=call.trainable)
    return found


def _call(case: Case, settings: dict[str, Any], *, trainable: bool) -> None:
    hidden = case.hidden_states.detach().requires_grad_()
    weight = case.weight.detach().requires_grad_(trainable)
    loss = linear_cross_entropy(hidden, weight, case.labels, backend=_SmallBlocks(), **settings)
    torch.autograd.grad(loss, [hidden, weight] if trainable else [hidden])


def text(rows: list[Row]) -> str:
    """Write the table."""
    lines = []
    for row in rows:
        name = f"{row['path']}{', trained head' if row['trainable'] else ''}"
        block, outside = row["block"], row["outside"]
        waits = ", ".join(f"{name} {count}" for name, count in row["waits"].items())
        lines.append(
            [name, row["constraint"] or "none"]
            + [f"{block[key]}" for key in ("kernels", "torch")]
            + [f"{outside[key]}" for key in ("kernels", "torch")]
            + [waits or "none", f"{block['copies'] + outside['copies']}"]
        )
    headings = ["call", "constraint", "block: ours", "torch's", "outside: ours", "torch's"]
    headings += ["waits of the host, two blocks", "copies to the device"]
    kernels = "\n".join(
        f"- {row['path']}: {', '.join(f'{k} {n}' for k, n in row['kernels'].items())}"
        for row in rows
        if row["constraint"] is None and not row["trainable"]
    )
    return f"{_INTRODUCTION}\n\n{markdown(headings, lines)}\nOur kernels in a block:\n\n{kernels}\n"
