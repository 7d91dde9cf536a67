"""One loss over a head whose rows lie on several processes, and its answers put together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from str_kernels import VocabularyIndex, VocabularyShard, linear_cross_entropy
from str_kernels.backends.torch import TorchBackend
from tests.oracle import Case

COLLECTIVES = (
    *("all_reduce", "all_gather", "all_gather_object", "broadcast", "reduce_scatter", "all_to_all"),
    *("all_gather_into_tensor", "reduce_scatter_tensor", "reduce", "gather", "scatter", "barrier"),
)
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


def of_dtensor(case: Case, placement: str = "rows") -> dict[str, Tensor]:
    """The loss of a head that is a ``DTensor``, with a bias that is split alike."""
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    where = {"rows": Shard(0), "columns": Shard(1), "whole": Replicate()}[placement]
    names = [n for n in ("hidden_states", "weight", "bias") if getattr(case, n) is not None]
    leaves = {n: getattr(case, n).detach().clone() for n in names}
    for name in names[1:]:
        leaves[name] = distribute_tensor(leaves[name], mesh, [where])
    for leaf in leaves.values():
        leaf.requires_grad_()
    loss = linear_cross_entropy(
        leaves["hidden_states"], leaves["weight"], case.labels, bias=leaves.get("bias"),
        reference=case.reference, position_weights=case.position_weights, **case.settings,
    )  # fmt: skip
    loss.backward()
    for name in names[1:]:
        assert leaves[name].grad.placements == (where,)
    found = {n: leaves[n].grad for n in names}
    found = {n: g.full_tensor() if n != "hidden_states" else g for n, g in found.items()}
    return {"loss": loss.detach(), **found}


class Apart(TorchBackend):
    """On the second process alone it chooses otherwise; ``how`` names the choice."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how if distributed.get_rank() == 1 else None
        self.screened: list[str] = []

    def filters(self, dtype, device, positions):
        return self.how != "few positions"

    def auto_screen(self, dtype, device, rows):
        return "exact" if self.how == "another screen" else "bf16"

    def row_block(self, head, rows, *, routed):
        return 5 if self.how == "smaller blocks" else 9

    def screen(self, block, screen):
        self.screened.append(screen)
        found = super().screen(block, screen)
        if self.how == "a coarse screen" and screen != "exact":
            found.log_mass[: len(block.labels) // 2] += 3.0  # nats, in some rows of every block
        return found


def apart(case: Case, ends: list[int], how: str) -> tuple[dict[str, Tensor], list[str]]:
    """The loss where one process alone would choose otherwise, and how its blocks were screened."""
    part, shard = own(case, ends)
    index = VocabularyIndex.build(part.weight)
    if how == "no index" and distributed.get_rank() == 1:
        index = None
    backend = Apart(how)
    return part.run(shard=shard, index=index, backend=backend), backend.screened


def unlike(case: Case, ends: list[int], what: str) -> None:
    """One process has something else than the others."""
    part, shard = own(case, ends)
    settings = dict(part.settings)
    if distributed.get_rank() == 1:
        if what == "labels":
            # the processes share the memory of what they are given
            part = replace(part, labels=part.labels.clone())
            part.labels[0] = 1 if part.labels[0] == 0 else 0
        elif what == "positions":
            part = replace(part, hidden_states=part.hidden_states[1:], labels=part.labels[1:])
        elif what == "settings":
            settings["softcap"] = 5.0
        else:
            shard = replace(shard, first=shard.first - 1)
    replace(part, settings=settings).run(shard=shard)


def counted(case: Case, ends: list[int], **overrides: Any) -> list[list[tuple[str, int]]]:
    """What one loss hands to torch.distributed, forward and backward: name and bytes of each."""
    part, shard = own(case, ends)
    found: list[tuple[str, int]] = []
    originals = {name: getattr(distributed, name) for name in COLLECTIVES}

    def counting(name: str) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            tensor = args[1] if name == "all_gather" else args[0]
            found.append((name, tensor.numel() * tensor.itemsize))
            return originals[name](*args, **kwargs)

        return call

    for name in COLLECTIVES:
        setattr(distributed, name, counting(name))
    try:
        hidden = part.hidden_states.clone().requires_grad_()
        weight = part.weight.clone().requires_grad_()
        loss = linear_cross_entropy(
            hidden, weight, part.labels, reference=part.reference, shard=shard,
            **part.settings, **overrides,
        )  # fmt: skip
        forward = list(found)
        loss.backward()
    finally:
        for name, original in originals.items():
            setattr(distributed, name, original)
    return [forward, found[len(forward) :]]
