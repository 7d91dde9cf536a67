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


def asked(blocks, screen, *, trained=False, ignored=0.0, **options) -> Launches:
    """Count the second forward and backward; the first fills the caches."""
    case = clustered_case(ROWS * blocks, 300, 32, ignored=ignored, **options).to(torch.bfloat16)
    index = VocabularyIndex.build(case.weight, case.hidden_states) if screen else None
    leaves = [case.hidden_states.requires_grad_()]
    if trained:
        leaves += [x.requires_grad_() for x in (case.weight, case.bias) if x is not None]

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
        torch.autograd.grad(loss if loss.dim() == 0 else loss.sum(), leaves)

    call()
    with counted_launches() as found:
        call()
    return found


# Bounds of: launches of ours and of torch's in a block, and of torch's outside blocks.
BOUNDS = {
    None: (4, 9, 4),  # four of torch's are casts for a CPU's product
    "exact": (9, 7, 5),
    "int8": (16, 6, 8),
}


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"k": 5, "kind": "kl"}], ids=["plain", "constrained"])
@pytest.mark.parametrize("screen", BOUNDS, ids=str)
def test_launches_of_a_block(screen, options, no_waits):
    """Neither a block nor a call has more launches than the bounds."""
    one, two = asked(1, screen, **options), asked(2, screen, **options)
    block = two - one
    ours, torchs, outside = BOUNDS[screen]
    assert block.totals()["kernels"] <= ours, block
    assert block.totals()["torch"] <= torchs, block
    assert (one - block).totals()["torch"] <= outside, one - block
    # the exact pass learns how many rows need it, while the device computes the first block
    assert (one.waits, two.waits) == ({}, {"read_sent": 1} if screen is None else {})


OPTIONS = [
    {"reduction": "mean", "label_smoothing": 0.1, "z_loss": 0.1},
    {"kind": "mse", "uneven": True, "softcap": 5.0, "bias": True, "reduction": "none"},
    {"kind": "logprob", "static": True, "logit_scale": 0.7, "reduction": "sum"},
    {"kind": "kl", "weighted": True, "label_smoothing": 0.1, "softcap": 5.0},
]


@pytest.mark.parametrize(
    "trained", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["frozen", "trained"]
)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(
    "screen", [None, pytest.param("exact", marks=pytest.mark.slow), "int8"], ids=str
)
def test_no_wait_and_no_copy(screen, options, trained, no_waits):
    """Forward and backward read nothing from the device and copy nothing to it, at every option."""
    k = {"k": 5} if "kind" in options else {}
    found = asked(1, screen, ignored=0.3, trained=trained, **k, **options)
    assert found.totals()["waits"] == 0, found
    assert found.totals()["copies"] == 0, found
