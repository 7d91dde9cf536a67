"""Count how much of the vocabulary the router keeps, by the backend's own stages."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

from str_kernels.backends.selection import DEFAULT_EPS
from str_kernels.backends.torch import TorchBackend
from str_kernels.bench.inputs import Case
from str_kernels.engine.contract import Block, Head
from str_kernels.engine.forward import tiles_of
from str_kernels.options import LossOptions, Screen
from str_kernels.vocabulary import VocabularyIndex


class Live(NamedTuple):
    """``pairs`` of ``of`` (row, tile) pairs are computed exactly.

    ``dead_mass``: the others' probability as screened, mean over the rows.
    """

    pairs: int
    of: int
    dead_mass: float

    @property
    def share(self) -> float:
        """The share of live pairs, 0 to 1."""
        return self.pairs / self.of


def live_pairs(
    case: Case,
    *,
    eps: float = DEFAULT_EPS,
    screen: Screen = "auto",
    index: VocabularyIndex | Literal["own"] | None = "own",
) -> Live:
    """Screen and route every row without refining; ``"own"`` is the case's own index."""
    backend, options = TorchBackend(), LossOptions()
    head = Head(case.hidden_states, case.weight, None)
    if screen == "auto":
        hidden = head.hidden_states
        screen = backend.auto_screen(hidden.dtype, hidden.device, len(hidden))
    tiles = tiles_of(case.weight, case.index if index == "own" else index, fresh=False)
    rows = torch.arange(len(case.labels), device=case.labels.device)
    pairs, dead = 0, 0.0
    for part in rows.split(backend.row_block(head, len(rows), routed=True)):
        block = Block(
            head._replace(hidden_states=head.hidden_states[part]), case.labels[part], tiles, options
        )
        masses = backend.screen(block, screen)
        work = backend.route(block, masses, eps)
        pairs += int(work.counts.sum())
        dead += work.dead.sum().item()
    return Live(pairs, len(rows) * len(tiles.mean_rows), dead / len(rows))
