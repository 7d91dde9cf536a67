"""`plan`: what a training step takes, which levers make it fit, and how long a context may be.

Stage: a configuration, a context, a memory → `Plan`: a `Row` for each set of levers.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from str_kernels.planning.counts import Count, Counter
from str_kernels.planning.levers import TILE_TOKENS, Levers, ladder
from str_kernels.planning.longest import Longest
from str_kernels.planning.request import GIB, Request
from str_kernels.planning.subject import subject_of

SCHEMA = "str_kernels.plan/1"
DEFAULT_CONTEXT = 8192
_CONTEXTS, _SHARES = (4096, 32768, 131072), (1.0, 0.25)
_REFUSALS = ("tile_tokens", "gradient_checkpointing", "window_attention")


@dataclass(frozen=True)
class Row:
    """A set of levers: its count, and the longest context that fits (None: no memory is given).

    ``refused`` says why the model does not allow the set; the rest is then None.
    """

    levers: Levers
    count: Count | None
    fits: bool | None
    longest: int | None
    refused: str | None = None


class ReferencePass(NamedTuple):
    """The reference pass's part of a step's operations, if ``share`` of the sequences have one."""

    context: int
    share: float
    part: float


@dataclass(frozen=True)
class Plan:
    """The result of `plan`.

    Attributes:
        request: what was planned.
        dtype: the format of the body's weights.
        fixed: bytes of weights, adapter and optimizer, which no lever changes.
        positions: the longest context of the model; None: its configuration names none.
        rows: by set of levers, the cheapest in time first.
        reference: what the reference pass costs, with the fused head and checkpoints.
        outside: what the count does not know, a sentence each.
    """

    request: Request
    dtype: str
    fixed: int
    positions: int | None
    rows: list[Row]
    reference: list[ReferencePass]
    outside: list[str]

    @property
    def cheapest(self) -> Row | None:
        """The first set that fits; without a memory there is none."""
        return next((row for row in self.rows if row.fits), None)

    def as_dict(self) -> dict[str, Any]:
        """Convert to JSON types."""
        rows = [
            {
                "levers": asdict(row.levers),
                "bytes": row.count and row.count.total,
                "owners": row.count and row.count.owners,
                "moment": row.count and row.count.moment,
                "host_bytes": row.count and row.count.host,
                "fits": row.fits,
                "longest_context": row.longest,
                "refused": row.refused,
            }
            for row in self.rows
        ]
        cheapest = self.cheapest and asdict(self.cheapest.levers)
        return {
            "schema": SCHEMA,
            "request": asdict(self.request),
            "dtype": self.dtype,
            "fixed_bytes": self.fixed,
            "positions": self.positions,
            "rows": rows,
            "reference_pass": [x._asdict() for x in self.reference],
            "cheapest": cheapest,
            "outside": self.outside,
        }


def plan(
    model: str | os.PathLike,
    *,
    context: int | None = None,
    levers: Levers | None = None,
    tile_tokens: int = TILE_TOKENS,
    told: Callable[[str], None] = lambda what: None,
    **request: Any,
) -> Plan:
    """Count what a LoRA training step takes, from the configuration of a model alone.

    Args:
        model: a Hub id, a folder, or the JSON file of a configuration.
        context: tokens in a sequence; None: 8,192, or the model's positions if they are fewer.
        levers: plan with this set alone; None: with each of the usual sets.
        tile_tokens: tokens of a tile in the usual sets.
        told: called with what is counted next, such as a set of levers.
        **request: the other fields of `Request`, such as ``memory=24`` (GiB) and ``dtype="nf4"``.

    Raises:
        ValueError: a value outside its rule, an unknown configuration, a model that cannot be
            counted, a context beyond its positions, a memory that the weights alone exceed, or a
            lever of ``levers`` that the model does not allow.
    """
    asked = Request(os.fspath(model), context or DEFAULT_CONTEXT, **request)
    subject = subject_of(model, rank=asked.rank, dtype=asked.dtype)
    positions = subject.positions
    if positions is not None and asked.context > positions:
        if context is not None:
            raise ValueError(
                f"context={context}: {subject.name} has positions for {positions} tokens; give at "
                "most so many, or a configuration whose max_position_embeddings is larger."
            )
        asked = Request(asked.model, positions, **request)
    counter = Counter(subject, asked)
    if asked.room is not None and counter.fixed > asked.room:
        raise ValueError(
            f"memory={asked.memory:g}: weights, adapter and optimizer alone take "
            f"{counter.fixed / GIB:.2f} GiB as {subject.dtype}; give more, or dtype=nf4 or int8."
        )
    rows = []
    usual = ladder(asked.device, tile_tokens, windows=subject.slides)
    for chosen in [levers] if levers else usual:
        told(f"with {chosen.words}")
        rows.append(_row(counter, asked, chosen, must=levers is not None))
    told("the reference pass")
    reference = _reference(counter, asked)
    return Plan(asked, subject.dtype, counter.fixed, positions, rows, reference, _outside(asked))


def _row(counter: Counter, asked: Request, levers: Levers, *, must: bool) -> Row:
    try:
        count = counter.count(asked.context, levers)
    except ValueError as error:
        if must or not str(error).startswith(_REFUSALS):
            raise
        return Row(levers, None, None, None, str(error))
    if asked.room is None:
        return Row(levers, count, None, None)
    most = counter.subject.positions or max(asked.context, 1 << 20)
    found = Longest(lambda n: counter.count(n, levers).total, most).within(asked.room)
    fits = count.total <= asked.room
    return Row(levers, count, fits, max(found, asked.context) if fits else found)


def _reference(counter: Counter, asked: Request) -> list[ReferencePass]:
    """Nothing where there is no constraint, or the model has no checkpoints."""
    if not asked.safety_tokens:
        return []
    most = counter.subject.positions or max(_CONTEXTS)
    contexts = sorted({asked.context, *(n for n in _CONTEXTS if n <= most)})
    levers, found = Levers(gradient_checkpointing=True, fused_head=True), []
    try:
        for n in contexts:
            operations = counter.operations(n, levers)
            found += [ReferencePass(n, share, operations.share(share)) for share in _SHARES]
    except ValueError as error:
        if not str(error).startswith(_REFUSALS):
            raise
    return found


def _outside(asked: Request) -> list[str]:
    found = [
        "The allocator's gaps and libraries' own workspaces are not counted"
        + (" (0.5 to 1.5 GiB with CUDA's context)." if asked.device == "cuda" else "."),
        "Sequences are whole: a padded batch may need a mask of N², and a packed one may not.",
        "The answer to one context is the model's own code; a model whose forward branches on "
        "values may take another way on real text.",
    ]
    if asked.device == "cuda":
        found.append(
            "Attention is torch's: flash without a mask, else the memory-efficient kernel; their "
            "scratch is by their source, and was not measured on each chip."
        )
    if asked.dtype in ("nf4", "int8"):
        found.append("Quantised layers are counted by bitsandbytes' formats, without its kernels.")
    if asked.processes > 1:
        found.append("Each process has the whole model; shards (FSDP, ZeRO) are not planned.")
    return found
