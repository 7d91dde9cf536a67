"""A hang is a failure of its test alone, with the stack of every process."""

from __future__ import annotations

import pytest
import torch

from tests.distributed import pool


def waits_for_nobody() -> None:
    if torch.distributed.get_rank() == 0:
        torch.distributed.barrier()


def who() -> int:
    return torch.distributed.get_rank()


def half_an_error() -> None:
    if who() == 1:
        raise ValueError("of rank 1")
    torch.distributed.barrier()


@pytest.mark.slow
def test_a_hang(monkeypatch):
    mine = pool.Pool()
    monkeypatch.setattr(pool, "HANGS", 5)
    monkeypatch.setattr(pool, "_ALONE", 2)
    try:
        with pytest.raises(AssertionError, match=r"only \[1\] answered[^$]*in waits_for_nobody"):
            mine.run(waits_for_nobody)
        assert mine.run(who) == [0, 1]
        with pytest.raises(AssertionError, match=r"ValueError: of rank 1[^$]*in half_an_error"):
            mine.run(half_an_error)
        assert mine.run(who) == [0, 1]
    finally:
        mine.stop()
