"""The vocabulary index that the filter of a patched head needs.

Stage: the `Fold` of a loss → a `VocabularyIndex`, or None for the exact pass.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, distributed, nn

from str_kernels import waits
from str_kernels.files import cache_folder
from str_kernels.huggingface.deferred.fold import Fold
from str_kernels.huggingface.deferred.freshness import sampled_values
from str_kernels.huggingface.patch.index_cache import cached_index
from str_kernels.huggingface.patch.learned import (
    decode_order,
    encode_order,
    order_digest,
    weight_digest,
)
from str_kernels.huggingface.patch.processes import ALONE, Together
from str_kernels.notices import say_once
from str_kernels.options import LossOptions
from str_kernels.vocabulary import VocabularyIndex, tile_means
from str_kernels.waits import SameTensor, version_key

# Above this share of live tiles (a flat softmax, an untrained model) the refinement costs more than
# the screen saves.
LARGEST_LIVE_SHARE = 0.4
# A smaller vocabulary has too few tiles for the screen to leave many out.
SMALLEST_VOCABULARY = 8192
# Twice as often as an index compares itself, whose error is then about an index that was given.
_COMPARED_EVERY = 50
_STATES = 2048  # enough hidden states for 32 directions
_log = logging.getLogger("str_kernels")
Index = VocabularyIndex | Literal["auto"] | None
_watcher: ContextVar[Callable[[int, int], None] | None] = ContextVar("watcher", default=None)


@contextmanager
def watching_index(report: Callable[[int, int], None]) -> Iterator[None]:
    """Inside this block ``report(done, total)`` is told how far a clustering of the rows is.

    It is called first with ``done = 0`` and last with ``done = total``, and not at all when the
    index comes from the user's cache.
    """
    before = _watcher.set(report)
    try:
        yield
    finally:
        _watcher.reset(before)


class IndexSource:
    """Gives the vocabulary index for a call of the head.

    ``"auto"`` clusters a frozen head's vocabulary on the first training batch, and again if the
    head changes. The result is kept in the user's cache folder; `index_cache` says where, and how
    to prevent it. ``state_dict`` keeps the choice for a resumed run, whose own first batch would
    lead to another one.

    Args:
        index: one that is given, ``"auto"``, or None for none.
    """

    def __init__(self, index: Index) -> None:
        """Build nothing yet."""
        self._automatic = isinstance(index, str)
        self._index: VocabularyIndex | None = None if self._automatic else index
        self._head: _Head | None = None  # the weight that the choice was made for
        self._kept: dict[str, Any] | None = None  # a choice of an earlier run, to be taken over
        self._fresh = False
        self._compared = SameTensor(_COMPARED_EVERY)
        self._stale = False  # found late to have been written into

    def find(
        self, fold: Fold, options: LossOptions, processes: Together = ALONE
    ) -> VocabularyIndex | None:
        """The index for this call of the head; None where it would not pay, or not stay right."""
        if not self._automatic:
            return self._index
        weight = fold.weight
        if options.filter_eps == 0.0 or not _is_frozen_parameter(weight):
            return None
        if _rows_of_each(fold) < SMALLEST_VOCABULARY:
            return None
        if self._kept is not None:
            self._take_over(weight)
        if not self._is_of(weight):
            if not (torch.is_grad_enabled() and fold.hidden_states.requires_grad):
                return None  # evaluation alone builds nothing
            if self._head is not None:
                say_once(
                    "str_kernels: the frozen head's weight has changed, so its vocabulary index is "
                    "built again",
                    logging.WARNING,
                )
            builders = processes if fold.shard is None else ALONE  # each has rows of its own
            self._index = _built(weight, _some_states(fold), builders)
            self._head, self._fresh, self._stale = _Head.of(weight), True, False
            self._compared.due(weight)  # counts from here
        return self._index

    def _is_of(self, weight: Tensor) -> bool:
        """Whether the choice was made for this weight, as it is now."""
        if self._head is None or not self._has_same_values(weight):
            return False
        key = _key_of(weight)
        if key == self._head.key:
            return True
        # written into or moved, perhaps by the same values: averaged weights were swapped out again
        if self._index is not None:
            means = tile_means(weight.detach(), self._index.order)
            if not torch.equal(means, self._index.mean_rows):
                return False
        self._head = replace(self._head, key=key)
        return True

    def _has_same_values(self, weight: Tensor) -> bool:
        """Whether sampled values are those of the weight that the choice was made for.

        A GPU compares them seldom, and what it finds without a wait a later call learns.
        """
        if self._stale or not self._compared.due(weight):
            return not self._stale
        if waits.allowed(weight.device) or _key_of(weight) != self._head.key:
            return self._head.has_values_of(weight)
        waits.judge_later(self._head.differs_from(weight), self._distrust)
        return True

    def _distrust(self) -> None:
        self._stale = True

    def judge(
        self, live_share: Tensor, processes: Together = ALONE, *, filtered: bool = True
    ) -> None:
        """Drop a new index if in its first loss too many tiles mattered: ``live_share [...]``.

        The average is that of all ``processes``, so that all drop it or none. A loss that was not
        ``filtered``, such as that of few positions, says nothing of an index.
        """
        if not self._fresh or not (filtered or processes.groups):
            return
        sums = torch.stack([live_share.nansum(), live_share.isfinite().sum()]).float()
        # the only synchronisation, once an index
        total, count = processes.total(sums * float(filtered)).tolist()
        if not count:
            return
        self._fresh, share = False, total / count
        if share > LARGEST_LIVE_SHARE:
            self._index = None
            _log.info(
                "%.0f %% of the head's tiles matter: its loss is computed exactly", 100 * share
            )

    def state_dict(self) -> dict[str, Any]:
        """The index in use, or that none is, and for which head; JSON values."""
        if self._kept is not None:  # no forward has met it yet
            return self._kept
        if not self._automatic:
            given = None if self._index is None else order_digest(self._index.order)
            return {"automatic": False, "given": given}
        index, head = self._index, None if self._head is None else self._head.digest
        order = None if index is None else encode_order(index.order)
        columns = None if index is None or index.columns is None else index.columns.tolist()
        hot = 0 if index is None or index.hot is None else len(index.hot)
        kept = {"order": order, "columns": columns, "hot": hot}
        return {"automatic": True, "head": head, **kept, "fresh": self._fresh}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the choice of ``state_dict`` before the next forward.

        An index that is set otherwise now than then is a choice of the user's, which is logged.
        """
        if self._automatic and state["automatic"]:
            self._index = self._head = None
            self._fresh = state["fresh"]
            self._kept = None if state["head"] is None else dict(state)
        elif state != self.state_dict():
            _log.warning(
                "index is not what it was when the checkpoint was saved: the resumed run is not "
                "the uninterrupted one to the last bit"
            )

    def _take_over(self, weight: Tensor) -> None:
        """Use the choice of an earlier run, if it was made for this weight."""
        kept, self._kept = self._kept, None
        head = _Head.of(weight)
        if kept["head"] != head.digest:
            _log.warning(
                "the vocabulary index of the checkpoint was made for another weight of the head; "
                "one is built anew"
            )
            return
        self._index = None
        if kept["order"] is not None:
            order = decode_order(kept["order"], len(weight)).to(weight.device)
            columns = kept.get("columns")  # a checkpoint of 0.1 has none
            columns = None if columns is None else torch.tensor(columns, device=weight.device)
            hot = kept.get("hot", 0)
            self._index = VocabularyIndex.of_order(weight.detach(), order, columns, hot)
        self._head, self._fresh, self._stale = head, kept["fresh"], False


@dataclass(frozen=True)
class _Head:
    """What a weight ``[V, D]`` was: its version and form, some of its values, and its digest.

    Where it lies says nothing: FSDP gathers it to another place for each step.
    """

    key: tuple
    values: Tensor
    digest: str

    @classmethod
    def of(cls, weight: Tensor) -> _Head:
        return cls(_key_of(weight), sampled_values(weight), weight_digest(weight))

    def has_values_of(self, weight: Tensor) -> bool:
        """Whether the sampled values are this weight's; a write through ``.data`` changes them."""
        values, known = sampled_values(weight), self.values
        return values.device == known.device and torch.equal(values, known)

    def differs_from(self, weight: Tensor) -> Tensor:
        """Compare the sampled values on the device: one bool, for which the host does not wait."""
        return (sampled_values(weight) != self.values).any()


def _rows_of_each(fold: Fold) -> int:
    """How many rows a process has of the head; those that share it find the same number."""
    if fold.shard is None:
        return fold.words
    return fold.words // distributed.get_world_size(fold.shard.group)


def _key_of(weight: Tensor) -> tuple:
    return version_key(weight)[1:]  # without where it lies


def _built(weight: Tensor, states: Tensor, processes: Together) -> VocabularyIndex:
    """The leader's index, made from its states, in every process."""
    if not processes.groups:
        return cached_index(weight, states, cache_folder(), _watcher.get())
    device = weight.device
    order = torch.empty(len(weight), dtype=torch.int64, device=device)
    columns = torch.empty(weight.shape[1], dtype=torch.float32, device=device)
    hot = torch.empty(1, dtype=torch.int64, device=device)
    if processes.leads:
        index = cached_index(weight, states, cache_folder(), _watcher.get())
        order.copy_(index.order)
        columns.copy_(index.columns)
        hot.fill_(0 if index.hot is None else len(index.hot))
    order, columns, hot = map(processes.shared, (order, columns, hot))
    return VocabularyIndex.of_order(weight.detach(), order, columns, int(hot))


def _is_frozen_parameter(weight: Tensor) -> bool:
    """Whether the rows stay what they are: the head's own, not derived anew at each step."""
    source = weight if weight._base is None else weight._base
    return isinstance(source, nn.Parameter) and not weight.requires_grad


def _some_states(fold: Fold) -> Tensor:
    states = fold.hidden_states.detach().reshape(-1, fold.hidden_states.shape[-1])
    where = torch.linspace(0, len(states) - 1, min(_STATES, len(states))).long()
    states = states[where.to(states.device)]
    return states[states.isfinite().all(-1)]
