"""The bytes of a call on a GPU, counted at the allocator of a CPU."""

from __future__ import annotations

import pytest
import torch

from str_kernels import VocabularyIndex, linear_cross_entropy
from str_kernels.bench.memory import peak_bytes
from tests.backends.test_routed import clustered_case
from tests.triton.interpreted.test_launches import ROWS, SmallBlocks

DIM, VOCAB = 512, 300


def peak(rows: int, screen: str | None, *, ignored: float, backward: bool) -> int:
    """Most bytes alive in a forward, or with the backward, beyond the operands in bf16."""
    case = clustered_case(rows, VOCAB, DIM, ignored=ignored).to(torch.bfloat16)
    index = VocabularyIndex.build(case.weight, case.hidden_states) if screen else None
    case.hidden_states.requires_grad_()

    def call():
        loss = linear_cross_entropy(
            case.hidden_states,
            case.weight,
            case.labels,
            index=index,
            screen=screen or "auto",
            backend=SmallBlocks(),
        )
        return torch.autograd.grad(loss, case.hidden_states) if backward else loss

    call()
    return peak_bytes(call, torch.device("cpu")).peak


@pytest.mark.slow
@pytest.mark.parametrize("backward", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("screen", "ignored"),
    [
        pytest.param(None, 0.0, marks=pytest.mark.slow),
        pytest.param("exact", 0.8, marks=pytest.mark.slow),
        ("int8", 0.0),
    ],
)
def test_more_rows_cost_their_gradients_alone(screen, ignored, backward, no_waits):
    """Each further row: its gradient once, with the result twice, in 16 bits, and 256 bytes.

    Before there are gradients, rows that are screened as one are there in 16 and in 8 bits.
    """
    given = {"ignored": ignored, "backward": backward}
    few, many = peak(2 * ROWS, screen, **given), peak(6 * ROWS, screen, **given)
    of_a_row = 4 if backward else 3 if screen == "int8" else 2
    assert (many - few) / (4 * ROWS) <= of_a_row * DIM + 256
