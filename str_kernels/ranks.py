"""The processes of one command, as torchrun starts them: who speaks and writes, and who does what.

Stage: what torchrun tells in the environment → `Ranks`, by which a loop over batches is shared.

A result does not depend on how many processes there are: the batches are those of one process,
each is computed by one of them, and all take the results in the same order.
"""

from __future__ import annotations

import datetime
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import islice
from typing import Any, NamedTuple, TypeVar

_CONNECTS = datetime.timedelta(seconds=10)
Item, Result = TypeVar("Item"), TypeVar("Result")


def launched() -> int:
    """How many processes torchrun, or another launcher of its kind, has started; 1: none did."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1


def is_first() -> bool:
    """Whether this process is the first, or the only one: it alone warns and writes files."""
    torch = sys.modules.get("torch")  # without it there is no group yet
    if torch is not None and _grouped(torch):
        return torch.distributed.get_rank() == 0
    return launched() == 1 or os.environ["RANK"] == "0"


class Ranks(NamedTuple):
    """The processes that share the work of a command.

    Attributes:
        rank: the number of this one.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes files."""
        return self.rank == 0

    def gathered(self, value: Result) -> list[Result]:
        """The values of all processes, which wait for each other."""
        if self.size == 1:
            return [value]
        import torch

        found: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(found, value)
        return found

    def wait(self) -> None:
        """Go on when all are here: what the first has written is there."""
        self.gathered(None)

    def in_order(self, items: Iterable[Item], work: Callable[[Item], Result]) -> Iterator[Result]:
        """``work(item)`` of every item, in their order; each process does its share of them."""
        left = iter(items)
        while some := list(islice(left, self.size)):
            done = work(some[self.rank]) if self.rank < len(some) else None
            yield from self.gathered(done)[: len(some)]


_ALONE = Ranks()
_sharing: ContextVar[Ranks] = ContextVar("sharing", default=_ALONE)


def sharing() -> Ranks:
    """The processes that share this work; outside of ``share_work`` this one alone."""
    return _sharing.get()


@contextmanager
def share_work() -> Iterator[Ranks]:
    """In this block loops over batches are shared by the processes that torchrun has started."""
    ranks = _joined()
    before = _sharing.set(ranks)
    try:
        yield ranks
    finally:
        _sharing.reset(before)


def leave() -> None:
    """Leave the group of processes, at the end of a command that went well."""
    torch = sys.modules.get("torch")
    if _made and _grouped(torch):
        torch.distributed.destroy_process_group()
    _made.clear()


_made: list[bool] = []  # whether the group is ours


def _grouped(torch: Any) -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _joined() -> Ranks:
    """This process in its group, which is made if there is none yet."""
    if launched() == 1:
        return _ALONE
    import torch

    if not torch.distributed.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        torch.distributed.init_process_group(None if torch.cuda.is_available() else "gloo")
        _made.append(True)
    return Ranks(torch.distributed.get_rank(), torch.distributed.get_world_size())


def require_one(command: str) -> None:
    """Refuse to run what several processes would do several times.

    Raises:
        ValueError: there are several.
    """
    if launched() > 1:
        raise ValueError(
            f"WORLD_SIZE={launched()}: {command} runs in one process; start it without torchrun."
        )


def fails_first() -> bool:
    """Whether no other process has failed before this one; they agree by the launcher's store."""
    if launched() == 1:
        return True
    import torch

    host, port = os.environ.get("MASTER_ADDR", ""), int(os.environ.get("MASTER_PORT", 0))
    name = f"str_kernels/failures/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
    try:
        store = torch.distributed.TCPStore(
            host, port, is_master=False, timeout=_CONNECTS, wait_for_workers=False
        )
        return store.add(name, 1) == 1
    except (RuntimeError, ValueError):  # no store there, or its process has ended
        return True
