"""The longest context whose counted step fits a number of bytes.

Stage: a count by context, which never falls → the largest multiple of ``STEP`` that fits. Counts
are slow and nearly parabolas, so a parabola through those that there are says where to look.
"""

from __future__ import annotations

from collections.abc import Callable

STEP = 256  # a longest context is a multiple of it
_GUESSES = 6  # then the interval is halved


class Longest:
    """Finds the longest context for any number of bytes; what was counted serves the next."""

    def __init__(self, bytes_at: Callable[[int], int], most: int) -> None:
        """Search contexts up to ``most``."""
        self._bytes_at, self._most = bytes_at, most
        self._counts: dict[int, int] = {}

    def within(self, room: int) -> int:
        """Find the longest context whose bytes are at most ``room``; 0: not even ``STEP`` fits."""
        if self._at(self._most) <= room:
            return self._most
        if self._most <= STEP or self._at(STEP) > room:
            return 0
        tries = 0
        while True:
            low = max(n for n, size in self._counts.items() if size <= room)
            high = min(n for n, size in self._counts.items() if size > room)
            if high - low <= STEP:
                return low
            guess = self._guess(low, high, room) if tries < _GUESSES else (low + high) // 2
            last = (high - 1) // STEP * STEP
            self._at(min(max(guess // STEP * STEP, low + STEP), last))
            tries += 1

    def _at(self, context: int) -> int:
        if context not in self._counts:
            self._counts[context] = self._bytes_at(context)
        return self._counts[context]

    def _guess(self, low: int, high: int, room: int) -> int:
        """Where the parabola through both ends and the nearest other count crosses ``room``."""
        a, b = self._counts[low], self._counts[high]
        others = [n for n in self._counts if n not in (low, high)]
        slope, bend = (b - a) / (high - low), 0.0
        if others:
            other = min(others, key=lambda n: min(abs(n - low), abs(n - high)))
            bend = ((self._counts[other] - a) / (other - low) - slope) / (other - high)
        first, last = low, high  # the parabola a + slope (n - low) + bend (n - low) (n - high)
        while last - first > 1:
            n = (first + last) // 2
            fits = a + (slope + bend * (n - high)) * (n - low) <= room
            first, last = (n, last) if fits else (first, n)
        return first
