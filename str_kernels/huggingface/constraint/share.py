"""A share of the sequences that is constrained, so that the reference pass runs on these alone.

Stage: the rows of a batch → those that are drawn, `Drawn`; the arguments of a forward → those of
the drawn rows. The weights of these are divided by the share, and the others have none: the
expectation is that of constraining all. Rows whose positions have no weight are not drawn either.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from random import Random
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed

# Arguments of a forward that have one entry for each row of the batch. The rows of another tensor,
# such as that of images, are not known.
_BY_ROW = (
    "input_ids",
    "attention_mask",
    "position_ids",
    "token_type_ids",
    "inputs_embeds",
    "decoder_input_ids",
    "decoder_attention_mask",
    "labels",
    "shift_labels",
)
_PLAIN = (type(None), bool, int, float, str)


class Drawn(NamedTuple):
    """The drawn ``rows`` of a batch of ``size`` rows, and the ``share`` that they are drawn with.

    ``passed``: the rows that the reference pass is given, the drawn ones among them.
    """

    rows: list[int]
    size: int
    share: float
    passed: list[int]

    def factors(self, device: torch.device) -> Tensor:
        """``[size]`` fp32, of the weights of each row."""
        factors = torch.zeros(self.size)
        factors[self.rows] = 1.0 / self.share
        return factors.to(device, non_blocking=True)


class Sharing:
    """Draws rows by seed, step and the forwards since the step began, whatever the process did.

    Without a trainer's callback, which calls `begin`, the forwards count since the patch was made;
    ``Patch.state_dict`` keeps both numbers.
    """

    def __init__(self, share: float = 1.0, seed: int = 0) -> None:
        """Draw this share.

        Raises:
            ValueError: no share of all.
        """
        number = isinstance(share, int | float) and not isinstance(share, bool)
        if not number or not 0 < share <= 1:
            raise ValueError(f"share={share!r}: must be above 0 and at most 1.")
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise ValueError(f"share_seed={seed!r}: must be an integer.")
        self.share, self.seed = float(share), seed
        self._step = self._forwards = 0

    def begin(self, step: int) -> None:
        """Begin an optimizer step."""
        self._step, self._forwards = step, 0

    def draw(self, size: int) -> Drawn | None:
        """Draw rows of a batch, as many as the share says, a fraction by chance; None for all."""
        if self.share == 1.0:
            return None
        random = Random(f"{self.seed} {self._step} {self._forwards}")
        self._forwards += 1
        count = math.floor(self.share * size + random.random())
        rows = sorted(random.sample(range(size), count))
        return Drawn(rows, size, self.share, _passed(rows, size))

    def state_dict(self) -> list[int]:
        """Step and forwards."""
        return [self._step, self._forwards]

    def load_state_dict(self, state: list[int]) -> None:
        """Go on from there."""
        self._step, self._forwards = state


def weighted_rows(weights: Tensor) -> Drawn | None:
    """The rows of ``weights [B, T]`` that have one above 0; None for all.

    The host waits for the device here.
    """
    rows = (weights != 0).any(-1).nonzero()[:, 0].tolist()
    size = len(weights)
    return None if len(rows) == size else Drawn(rows, size, 1.0, _passed(rows, size))


def _passed(rows: list[int], size: int) -> list[int]:
    # processes that shard a model wait for each other in the reference pass, drawn rows or not
    together = distributed.is_available() and distributed.is_initialized()
    return rows or list(range(min(size, together)))


def arguments_of_rows(arguments: Mapping[str, Any], drawn: Drawn) -> dict[str, Any] | None:
    """Cut the arguments of a forward to the passed rows; None if some may be of other rows."""
    kept = {}
    for name, value in arguments.items():
        kept[name] = value
        if isinstance(value, _PLAIN) or (isinstance(value, Tensor) and value.dim() == 0):
            continue
        by_row = isinstance(value, Tensor) and name in _BY_ROW and len(value) == drawn.size
        if not by_row or (name == "position_ids" and value.dim() != 2):
            return None
        kept[name] = value[drawn.passed]
    return kept


def spread_rows(values: Tensor, drawn: Drawn) -> Tensor:
    """Put ``[passed · T, K]`` of the passed rows among those of all rows; the others are NaN."""
    length = len(values) // len(drawn.passed)
    table = values.new_full((drawn.size, length, values.shape[-1]), math.nan)
    table[drawn.passed] = values.reshape(len(drawn.passed), length, -1)
    return table.flatten(0, 1)
