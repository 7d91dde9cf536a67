"""The warnings of a patched model, each once."""

from __future__ import annotations

import logging
import warnings

from str_kernels.ranks import is_first

_log = logging.getLogger("str_kernels")


class Notices:
    """Warns on behalf of one patch, never twice of the same thing; in one process alone."""

    def __init__(self) -> None:
        self._given: set[str] = set()

    def warn_unverified(self, why: str) -> None:
        """The patch could not be verified."""
        self._warn(f"The patch was not tried on this model: {why}.")

    def warn_materialised(self, by: str, size: int) -> None:
        """The logits were built in full; once for every function that asked."""
        self._warn(
            f"The logits of a patched model were built in full: {by} asked for them. The values "
            f"are right; the memory is spent, here {size / 2**20:.1f} MiB.",
            once_for=by,
        )

    def warn_unconstrained(self, why: str) -> None:
        """A loss is computed without the constraint."""
        self._warn(f"The safety constraint takes no part in a loss: {why}.")

    def warn_inaccurate(self, report: object, *, exact_screen: bool) -> None:
        """The filter's error passed the bf16 head's."""
        instead = "the screen runs in full precision" if exact_screen else "every logit is exact"
        self._warn(
            f"The filtered loss was less accurate than a bf16 head ({report}); from now on "
            f"{instead}. An index made from other text or another weight does this."
        )

    def warn_moved(self, penalty: float, distance: float, *, cached: bool) -> None:
        """The model differs from its reference before it has been trained."""
        why = (
            "the cache file was made from another model or state of it, or the model has dropout"
            if cached
            else "load an adapter that carries the alignment with is_trainable=False, or merge it "
            "(merge_and_unload), and train another; dropout, and a training that goes on, do this "
            "too"
        )
        self._warn(
            f"The first safety penalty is {penalty:.3g} a token, not 0; safety logits are "
            f"{distance:.3g} (rms) from their reference: {why}."
        )

    def warn_transformed(self) -> None:
        """A transform of torch.func, or forward-mode AD, is in force."""
        self._warn(
            "torch.func and forward-mode AD cannot transform the fused loss: under them the model "
            "computes its own loss, with its logits in full."
        )

    def warn_bypassed(self) -> None:
        """Somebody else's forward computes the loss."""
        self._warn(
            "The model's forward was replaced after the patch, and computes its loss past it: the "
            "fused loss takes no part (TRL's trainers bring a fused head of their own)."
        )

    def _warn(self, message: str, once_for: str | None = None) -> None:
        key = once_for or message
        if key not in self._given:
            self._given.add(key)
            if is_first():
                warnings.warn(message, stacklevel=4)
            else:
                _log.info(message)
