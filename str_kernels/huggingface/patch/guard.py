"""Checks the accuracy of the filter of a patched head, every so many losses.

Stage: operands and options of a loss → options to change from now on, most often none.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from torch import Tensor

from str_kernels.accuracy import AccuracyReport, check_accuracy
from str_kernels.huggingface.patch.notices import Notices
from str_kernels.huggingface.patch.processes import ALONE, Together
from str_kernels.options import LossOptions


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

    @property
    def due(self) -> bool:
        """Whether the next training loss will be checked."""
        return self._every is not None and self._losses % self._every == 0

    def after_loss(
        self,
        operands: tuple[Tensor, Tensor, Tensor],
        options: LossOptions,
        processes: Together = ALONE,
        **inputs: Any,
    ) -> dict[str, Any]:
        """Count one training loss; returns the options to change from now on, most often none.

        The first fallback is an exact screen, the second the exact pass; what one of ``processes``
        has to change, all change. The other arguments are those of ``check_accuracy``.
        """
        due = self.due
        self._losses += 1
        if not due:
            return {}
        report = check_accuracy(*operands, options, **inputs)
        self.last_report = report or self.last_report
        bad = report is not None and not report.acceptable
        if not processes.any(bad, operands[0].device):
            return {}
        exact_screen = options.screen != "exact"
        self._notices.warn_inaccurate(report or "in another process", exact_screen=exact_screen)
        return {"screen": "exact"} if exact_screen else {"screen": "auto", "filter_eps": 0.0}

    def state_dict(self) -> dict[str, Any]:
        """How many losses there were, and the latest report; JSON values."""
        report = None if self.last_report is None else asdict(self.last_report)
        return {"losses": self._losses, "last_report": report}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on counting where ``state_dict`` was made."""
        report = state["last_report"]
        self._losses = state["losses"]
        self.last_report = None if report is None else AccuracyReport(**report)
