"""Position weights: which positions, and how much each counts."""

from __future__ import annotations

import pytest
import torch

from str_kernels.huggingface.positions import position_weights
from tests.huggingface.dense import weights as by_hand

N = -100
LABELS = torch.tensor([[N, N, 4, 5, 6, N], [N, 7, N, 8, N, N], [N, N, N, N, N, N]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0]])


@pytest.mark.parametrize("positions", ["all", "labels", 1, 2, 5])
def test_by_hand(positions):
    """Each sequence's weights, and their sum: its number of labels; none where there is none."""
    got = position_weights(LABELS, positions, attention_mask=MASK)
    assert torch.allclose(got, by_hand(LABELS, MASK, positions))
    assert torch.allclose(got.sum(1), (LABELS != N).sum(1).float())


@pytest.mark.parametrize("positions", ["all", "labels", 1])
def test_packed_is_as_unpacked(positions):
    """Three sequences in one row, told apart by position ids, weigh what they weigh alone."""
    lengths = MASK.sum(1).tolist()
    packed = torch.cat([LABELS[row, :n] for row, n in enumerate(lengths)])[None]
    ids = torch.cat([torch.arange(n) for n in lengths])[None]
    want = position_weights(LABELS, positions, attention_mask=MASK)
    want = torch.cat([want[row, :n] for row, n in enumerate(lengths)])[None]
    assert torch.allclose(position_weights(packed, positions, position_ids=ids), want)


def test_left_padding():
    """Padding on the left counts as little as on the right."""
    got = position_weights(LABELS.flip(1), "all", attention_mask=MASK.flip(1))
    assert torch.allclose(got, by_hand(LABELS, MASK, "all").flip(1))


def test_positions_that_do_not_reach_the_loss():
    """A model that slices its last logit off: the weight goes to the others."""
    scored = torch.ones_like(MASK, dtype=torch.bool)
    scored[:, -1] = False
    got = position_weights(LABELS, "all", attention_mask=MASK, scored=scored)
    assert got[0].tolist() == pytest.approx([3 / 5] * 5 + [0])


@pytest.mark.parametrize("mask", [torch.ones(3, 1, 6, 6), {"full_attention": None}], ids=str)
def test_other_masks(mask):
    """A mask that does not tell padding is refused for "all" and not needed otherwise."""
    with pytest.raises(ValueError, match="attention_mask="):
        position_weights(LABELS, "all", attention_mask=mask)
    position_weights(LABELS, "labels", attention_mask=mask)
