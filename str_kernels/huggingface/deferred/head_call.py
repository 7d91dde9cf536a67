"""What the tensors that come from one call of a head have in common."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor, nn

from str_kernels.huggingface.deferred.fold import Fold, Record
from str_kernels.huggingface.deferred.freshness import Freshness


class LossOwner(Protocol):
    """The labelled forward that the logits belong to.

    Attributes:
        running: whether that forward has not returned yet.
    """

    running: bool

    def cross_entropy(
        self,
        fold: Fold,
        target: Tensor,
        *,
        ignore_index: int,
        reduction: str,
        label_smoothing: float,
    ) -> Tensor:
        """The fused loss in place of ``F.cross_entropy``."""
        ...

    def logits_read(self, by: str, size: int) -> None:
        """Real logits of ``size`` bytes were needed; ``by`` names the function that asked."""
        ...


@dataclass
class HeadCall:
    """What the tensors derived from one call of the head have in common.

    ``hooks``: those of a framework on the gradients of the logits, which want to know when backward
    begins. ``gone``: whether a weight that was lent for the forward was given back.
    """

    owner: LossOwner | None
    head: nn.Module | None = None
    hooks: list[Callable] = field(default_factory=list)
    members: list[weakref.ref] = field(default_factory=list)
    records: list[weakref.ref[Record]] = field(default_factory=list)  # a record knows its call
    fresh: list[Freshness] = field(default_factory=list)
    gone: bool = False
    fused: bool = False
    watched: bool = False
    written: bool = False

    @property
    def inside(self) -> bool:
        """Whether the forward that the logits belong to is still running."""
        return self.owner is not None and self.owner.running

    def let_go(self) -> None:
        """Give a weight back that was lent for the forward, unless real logits were made of it."""
        members = [reference() for reference in self.members]
        records = [reference() for reference in self.records]
        lent = [x for x in records if x is not None and x.fold.lent is not None]
        if not lent or any(x is not None and x.is_materialised for x in members):
            return
        self.gone = True
        self.fresh.clear()
        for record in lent:
            record.let_go()

    def materialise_all(self) -> None:
        """Compute the values of every tensor that is still alive."""
        for reference in self.members:
            member = reference()
            if member is not None:
                member.materialise()
