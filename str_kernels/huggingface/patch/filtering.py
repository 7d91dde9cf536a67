"""What the filter of a patched head needs: a vocabulary index, and a check of its accuracy.

Stage: the `Fold` of a loss → a `VocabularyIndex`; every so many losses, an accuracy check.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal

import torch
from torch import Tensor, nn

from str_kernels.accuracy import AccuracyReport, check_accuracy
from str_kernels.huggingface.deferred.fold import Fold
from str_kernels.huggingface.patch.index_cache import cache_folder, cached_index
from str_kernels.huggingface.patch.notices import Notices
from str_kernels.options import LossOptions
from str_kernels.vocabulary import VocabularyIndex

# Above this share of live tiles (a flat softmax, an untrained model) the refinement costs more than
# the screen saves.
LARGEST_LIVE_SHARE = 0.4
# A smaller vocabulary has too few tiles for the screen to leave many out.
SMALLEST_VOCABULARY = 8192
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
    to prevent it.

    Args:
        index: one that is given, ``"auto"``, or None for none.
    """

    def __init__(self, index: Index) -> None:
        """Build nothing yet."""
        self._automatic = isinstance(index, str)
        self._index: VocabularyIndex | None = None if self._automatic else index
        self._key: tuple | None = None
        self._fresh = False

    def find(self, fold: Fold, options: LossOptions) -> VocabularyIndex | None:
        """The index for this call of the head; None where it would not pay, or not stay right."""
        if not self._automatic:
            return self._index
        weight = fold.weight
        if options.filter_eps == 0.0 or not _is_frozen_parameter(weight):
            return None
        if len(weight) < SMALLEST_VOCABULARY:
            return None
        key = (weight.data_ptr(), weight._version, tuple(weight.shape))
        if key != self._key:
            if not (torch.is_grad_enabled() and fold.hidden_states.requires_grad):
                return None  # evaluation alone builds nothing
            states = _some_states(fold)
            self._index = cached_index(weight, states, cache_folder(), _watcher.get())
            self._key, self._fresh = key, True
        return self._index

    def judge(self, live_share: Tensor) -> None:
        """Drop a new index if in its first loss too many tiles mattered: ``live_share [...]``."""
        if not self._fresh:
            return
        self._fresh = False
        share = live_share.nanmean().item()  # the only synchronisation, once an index
        if share > LARGEST_LIVE_SHARE:
            self._index = None
            _log.info(
                "%.0f %% of the head's tiles matter: its loss is computed exactly", 100 * share
            )


def _is_frozen_parameter(weight: Tensor) -> bool:
    """Whether the rows stay what they are: the head's own, not derived anew at each step."""
    source = weight if weight._base is None else weight._base
    return isinstance(source, nn.Parameter) and not weight.requires_grad


def _some_states(fold: Fold) -> Tensor:
    states = fold.hidden_states.detach().reshape(-1, fold.hidden_states.shape[-1])
    where = torch.linspace(0, len(states) - 1, min(_STATES, len(states))).long()
    states = states[where.to(states.device)]
    return states[states.isfinite().all(-1)]


class AccuracyGuard:
    """Checks the filter every so many losses, and falls back where it errs more than a bf16 head.

    Args:
        every: how many training losses lie between two checks; None: never checks.
        notices: where a fallback is announced.

    Attributes:
        last_report: of the latest check, or None.
    """

    def __init__(self, every: int | None, notices: Notices) -> None:
        """Check the period."""
        whole = isinstance(every, int) and not isinstance(every, bool)
        if every is not None and not (whole and every > 0):
            raise ValueError(f"check_accuracy_every={every!r}: must be a positive integer or None.")
        self._every, self._losses, self._notices = every, 0, notices
        self.last_report: AccuracyReport | None = None

    def after_loss(
        self, operands: tuple[Tensor, Tensor, Tensor], options: LossOptions, **inputs: Any
    ) -> dict[str, Any]:
        """Count one training loss; returns the options to change from now on, most often none.

        The first fallback is an exact screen, the second the exact pass. The arguments are those of
        ``check_accuracy``.
        """
        self._losses += 1
        if self._every is None or (self._losses - 1) % self._every:
            return {}
        report = check_accuracy(*operands, options, **inputs)
        self.last_report = report or self.last_report
        if report is None or report.acceptable:
            return {}
        exact_screen = options.screen != "exact"
        self._notices.warn_inaccurate(report, exact_screen=exact_screen)
        return {"screen": "exact"} if exact_screen else {"screen": "auto", "filter_eps": 0.0}
