"""What a call of the Triton backend asks of a device: its launches, waits and copies.

Two calls of one and of two blocks of rows tell what a block costs and what does not grow.
"""

from __future__ import annotations

import pytest
import torch

from str_kernels import VocabularyIndex, linear_cross_entropy
from str_kernels.backends.triton import TritonBackend
from str_kernels.bench.launches import Launches, counted_launches
from tests.backends.test_routed import clustered_case

ROWS = 32  # of a block


class SmallBlocks(TritonBackend):
    """Takes so few rows at a time that the interpreter is fast."""

    def row_block(self, head, rows, *, routed):
        """Return the rows of a block."""
        return min(rows, ROWS)


def asked(blocks: int, screen: str | None, **options) -> Launches:
    """Count the second forward and backward of a frozen head; the first fills the caches."""
    case = clustered_case(ROWS * blocks, 300, 32, ignored=0.0, **options).to(torch.bfloat16)
    index = VocabularyIndex.build(case.weight, case.hidden_states) if screen else None
    case.hidden_states.requires_grad_()

    def call():
        loss = linear_cross_entropy(
            case.hidden_states,
            case.weight,
            case.labels,
            bias=case.bias,
            reference=case.reference,
            position_weights=case.position_weights,
            index=index,
            screen=screen or "auto",
            backend=SmallBlocks(),
            **case.settings,
        )
        torch.autograd.grad(loss.sum(), case.hidden_states)

    call()
    with counted_launches() as found:
        call()
    return found


# Bounds of: launches of ours and of torch's in a block, launches of torch's outside blocks, waits.
BOUNDS = {
    None: (9, 100, 60, 3),
    "exact": (6, 108, 68, 4),
    "int8": (8, 136, 70, 6),
}


@pytest.mark.parametrize("screen", BOUNDS, ids=str)
def test_launches_of_a_block(screen):
    """Neither a block nor a call has more launches or waits than the bounds."""
    one, two = asked(1, screen), asked(2, screen)
    block = two - one
    ours, torchs, outside, waits = BOUNDS[screen]
    assert block.totals()["kernels"] <= ours, block
    assert block.totals()["torch"] <= torchs, block
    assert (one - block).totals()["torch"] <= outside, one - block
    assert two.totals()["waits"] <= waits, two


CONSTRAINED = [
    {"kind": "mse", "uneven": True},
    {"kind": "logprob", "static": True},
    {"kind": "kl", "weighted": True},
]


@pytest.mark.parametrize("screen", BOUNDS, ids=str)
@pytest.mark.parametrize("options", [{}, *CONSTRAINED], ids=str)
def test_nothing_is_copied_to_the_device(screen, options):
    """Constants of the loss and of the constraint are there from the first call on."""
    found = asked(1, screen, **({"k": 5} if options else {}), **options)
    assert found.totals()["copies"] == 0, found
