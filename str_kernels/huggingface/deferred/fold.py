"""`Fold`: what the logits of a head would be, as a record instead of a computation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from str_kernels.engine.contract import Head
from str_kernels.engine.shards import VocabularyShard

GONE = (
    "These logits were never computed, and a framework has freed the head's weight since the "
    "forward: read them in a forward without labels, or let FSDP keep the head whole "
    "(reshard_after_forward=False)."
)


@dataclass(frozen=True)
class Fold:
    """Logits ``z = softcap · tanh(logit_scale · (H Wᵀ + b) / softcap)``, not computed.

    ``hidden_states [..., D]``, ``weight [V, D]``, ``bias [V]`` or None; ``rows [..., 1]`` int64:
    the number of each row in the flattened ``batch_shape``, the leading shape that the head was
    called with. ``log_softmax``: normalised over the vocabulary, last of all. ``words_second``:
    seen as ``[B, V, T]``, the order in which torch's losses want more than one dimension.
    ``shard``: which rows of the head weight and bias are, where each process has a part of it.
    ``lent``: the weight of the head itself, if a framework has it elsewhere between two calls, or
    None.
    """

    hidden_states: Tensor
    weight: Tensor
    bias: Tensor | None
    rows: Tensor
    batch_shape: torch.Size
    dtype: torch.dtype
    logit_scale: float = 1.0
    softcap: float | None = None
    log_softmax: bool = False
    words_second: bool = False
    shard: VocabularyShard | None = None
    lent: Tensor | None = None

    @property
    def words(self) -> int:
        """V, the rows of the whole head."""
        return self.weight.shape[0] if self.shard is None else self.shard.total

    @property
    def shape(self) -> torch.Size:
        """The shape of the logits."""
        lead, words = self.hidden_states.shape[:-1], self.words
        if self.words_second:
            return torch.Size((lead[0], words, lead[1]))
        return torch.Size((*lead, words))

    @property
    def operands(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Hidden states, weight and bias."""
        return self.hidden_states, self.weight, self.bias

    @property
    def device(self) -> torch.device:
        """Where the logits would be."""
        return self.hidden_states.device

    def with_rows(self, operation: Callable[[Tensor], Tensor]) -> Fold:
        """An operation on the leading dimensions, done to the rows and to their numbers alike."""
        return replace(self, hidden_states=operation(self.hidden_states), rows=operation(self.rows))

    def without_weight(self) -> Fold:
        """The same logits without the values of the weight, whose memory is free then."""
        return replace(self, weight=self.weight.detach().to("meta"), lent=None)

    def lend_by(self, later: Fold) -> Fold:
        """The same logits, whose weight a later call of the same head has if it has none."""
        return replace(self, weight=later.lent) if self.weight.is_meta else self

    def compute(self, hidden_states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The logits of the fold's arithmetic, with these operands in place of its own."""
        logits = F.linear(hidden_states, weight, bias) * self.logit_scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits.log_softmax(-1) if self.log_softmax else logits


@dataclass
class Record:
    """A fold and how its values are computed; both forget the weight together."""

    fold: Fold
    replay: Callable[[], Tensor]

    def let_go(self) -> None:
        """Keep the fold without its weight, and refuse to compute the values."""
        self.fold, self.replay = self.fold.without_weight(), _refuse


def _refuse() -> Tensor:
    raise RuntimeError(GONE)


def fold_linear(head: Head, shard: VocabularyShard | None = None, *, lent: bool = False) -> Fold:
    """The fold of ``F.linear``: nothing has been done to the logits yet."""
    hidden_states = head.hidden_states
    lead, device = hidden_states.shape[:-1], hidden_states.device
    autocast = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if autocast else hidden_states.dtype
    rows = torch.arange(lead.numel(), device=device).reshape(*lead, 1)
    lent_weight = head.weight if lent else None
    return Fold(*head, rows, lead, dtype, shard=shard, lent=lent_weight)
