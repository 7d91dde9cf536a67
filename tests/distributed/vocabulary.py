"""One loss over a head whose rows lie on several processes, and its answers put together."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, distributed

from str_kernels import VocabularyShard
from tests.oracle import Case

OWN = ("weight", "bias")  # what each process has of a gradient is a part


def cut(vocab: int, world: int) -> list[int]:
    """Where the parts begin and end as ``DTensor`` cuts, by the ceiling of V / processes."""
    size = -(-vocab // world)
    return [min(vocab, rank * size) for rank in range(world + 1)]


def own(case: Case, ends: list[int]) -> tuple[Case, VocabularyShard]:
    """This process's part of a case."""
    rank = distributed.get_rank()
    rows = slice(ends[rank], ends[rank + 1])
    bias = None if case.bias is None else case.bias[rows]
    part = replace(case, weight=case.weight[rows].contiguous(), bias=bias)
    return part, VocabularyShard(None, rows.start, ends[-1])


def losses(runs: list[tuple[Case, Tensor | None, dict[str, Any]]], ends: list[int]) -> list:
    """Run each case with its upstream gradient and overrides, some of which name one rank's own."""
    found = []
    for case, upstream, overrides in runs:
        part, shard = own(case, ends)
        index = overrides.get("index")
        mine = {"index": index[distributed.get_rank()]} if isinstance(index, list) else {}
        found.append(part.run(upstream, shard=shard, **{**overrides, **mine}))
    return found


def whole(answers: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """What all processes found of one case; loss and row gradients are alike to the last bit."""
    first = dict(answers[0])
    for name, value in first.items():
        parts = [answer[name] for answer in answers]
        if name in OWN:
            first[name] = torch.cat(parts)
        else:
            for part in parts:
                torch.testing.assert_close(part, value, rtol=0, atol=0, equal_nan=True)
    return first
