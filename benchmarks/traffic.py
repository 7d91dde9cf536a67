"""What a vocabulary that is split over processes sends, and what FSDP2 would send for that head.

    python -m benchmarks.traffic

prints the table of docs/distributed.md. `messages` is what the engine hands to torch.distributed,
which tests count; the rest is the arithmetic of a ring, in which a process sends ``2 (P - 1) / P``
of an all-reduce's message, and ``(P - 1) / P`` of what an all-gather or a reduce-scatter makes.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import NamedTuple

AGREEMENT = 12  # numbers, fp64, of each process
PROCESSES = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
MIB = 1 << 20


class Message(NamedTuple):
    """One collective of torch's: its name, and the bytes that every process hands over."""

    name: str
    bytes: int


@dataclass(frozen=True)
class Loss:
    """One loss of N positions, all of them constrained if there are safety tokens.

    ``blocks`` is how many blocks of rows the labelled ones are computed in, which the backend
    chooses by its memory.
    """

    positions: int = 8192
    labelled: int = 8192
    hidden_size: int = 4096
    vocab: int = 128_256
    tokens: int = 64
    filtered: bool = True
    smoothed: bool = False
    blocks: int = 1

    def messages(self) -> tuple[list[Message], list[Message]]:
        """What forward and backward exchange, with an all-reduce each but for the first."""
        rows = self.positions if self.tokens else self.labelled
        columns = 1 + self.tokens + (self.smoothed and self.filtered)
        forward = [Message("all_gather", 8 * AGREEMENT)]
        if self.smoothed and self.filtered:
            forward.append(Message("all_reduce", 4 * self.hidden_size))  # the mean row
        forward.append(Message("all_reduce", 4 * columns * rows))
        sizes = [4, 8, 4, 12] if self.filtered else [4, 8 if self.smoothed else 4]
        for block in range(self.blocks):
            count = self.labelled // self.blocks + (block < self.labelled % self.blocks)
            forward += [Message("all_reduce", size * count) for size in sizes]
        if self.filtered:
            forward.append(Message("all_reduce", 4 * self.blocks))  # screen again?
        return forward, [Message("all_reduce", 4 * self.positions * self.hidden_size)]


def sent(messages: list[Message], processes: int) -> float:
    """Bytes that a process sends in a ring."""
    shares = {"all_reduce": 2 * (processes - 1) / processes, "all_gather": processes - 1.0}
    return sum(shares[message.name] * message.bytes for message in messages)


def gathered(loss: Loss, processes: int, *, trained: bool) -> float:
    """Bytes that a process sends where FSDP2 gathers the bf16 head for its product and the loss.

    A trained one is gathered for backward too, and its gradient is scattered in fp32.
    """
    numbers = loss.vocab * loss.hidden_size * (processes - 1) / processes
    return numbers * (2 + (2 + 4) * trained)


def table(loss: Loss) -> str:
    """The table of docs/distributed.md."""
    exact = Loss(**{**vars(loss), "filtered": False})
    lines = [
        "| processes | head of a process | forward, filtered | forward, exact | backward | "
        "logits, gathered | FSDP2, frozen | FSDP2, trained |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for processes in PROCESSES:
        (forward, backward), (exactly, _) = loss.messages(), exact.messages()
        rows = -(-loss.vocab // processes)
        sizes = [
            2 * rows * loss.hidden_size,
            sent(forward, processes),
            sent(exactly, processes),
            sent(backward, processes),
            2 * loss.positions * loss.vocab * (processes - 1) / processes,
            gathered(loss, processes, trained=False),
            gathered(loss, processes, trained=True),
        ]
        cells = (f"{size / MIB:.1f}" if size < 100 * MIB else f"{size / MIB:.0f}" for size in sizes)
        lines.append(f"| {processes:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(table(Loss()) + "\n")
