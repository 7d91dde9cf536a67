"""The longest context whose counted step fits a number of bytes.

Stage: a count by context, which never falls → the largest multiple of ``STEP`` that fits.
"""

from __future__ import annotations

from collections.abc import Callable

STEP = 256  # a longest context is a multiple of it
_NEAR = 0.01  # share of the context within which the answer may stop short


def longest(bytes_at: Callable[[int], int], room: int, most: int) -> int:
    """Find the longest context up to ``most``; 0 if not even ``STEP`` tokens fit.

    Each context that is answered was counted: the line between two counts only says where to look.
    """
    if bytes_at(most) <= room:
        return most
    low, high = STEP, most
    if most <= STEP or bytes_at(low) > room:
        return 0
    halve = False
    while high - low > max(STEP, _NEAR * low):
        share = (room - bytes_at(low)) / (bytes_at(high) - bytes_at(low))
        guess = low + (high - low) * (0.5 if halve else share)
        context = min(max(int(guess) // STEP * STEP, low + STEP), high - 1)
        if bytes_at(context) <= room:
            low, halve = context, context - low < (high - low) / 8
        else:
            high, halve = context, True
    return low
