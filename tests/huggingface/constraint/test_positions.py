"""Position weights: which positions, and how much each counts."""

from __future__ import annotations

import pytest
import torch
from transformers import DataCollatorWithFlattening

from str_kernels import SafetyConstraint
from str_kernels.huggingface import patch_model
from str_kernels.huggingface.constraint.positions import position_weights
from tests.huggingface.dense import constant_cache
from tests.huggingface.dense import weights as by_hand
from tests.huggingface.models import build

N = -100
LABELS = torch.tensor([[N, N, 4, 5, 6, N], [N, 7, N, 8, N, N], [N, N, N, N, N, N]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0]])


@pytest.mark.parametrize("positions", ["all", "labels", 1, 2, 5])
def test_by_hand(positions):
    """Each sequence's weights, and their sum: its number of labels; none where there is none."""
    got = position_weights(LABELS, positions, attention_mask=MASK)
    assert torch.allclose(got, by_hand(LABELS, MASK, positions))
    assert torch.allclose(got.sum(1), (LABELS != N).sum(1).float())


LENGTHS = MASK.sum(1).tolist()
STARTS = [0, *torch.tensor(LENGTHS).cumsum(0).tolist()]
POSITION_IDS = torch.cat([torch.arange(n) for n in LENGTHS])[None]
PACKING = {
    "cu_seq_lens_q": torch.tensor(STARTS, dtype=torch.int32),
    "seq_idx": torch.repeat_interleave(torch.tensor([4, 0, 9]), torch.tensor(LENGTHS))[None],
    "position_ids": POSITION_IDS,
}
AXES = {"position_ids": torch.stack([POSITION_IDS, POSITION_IDS, 2 * POSITION_IDS])}


def packed(rows: torch.Tensor) -> torch.Tensor:
    return torch.cat([rows[row, :n] for row, n in enumerate(LENGTHS)])[None]


@pytest.mark.parametrize("packing", [*({k: v} for k, v in PACKING.items()), AXES, PACKING], ids=str)
@pytest.mark.parametrize("positions", ["all", "labels", 1, 2])
def test_packed_is_as_unpacked(positions, packing):
    """Three sequences in one row, told apart by any argument, weigh what they weigh alone."""
    want = packed(position_weights(LABELS, positions, attention_mask=MASK))
    assert torch.allclose(position_weights(packed(LABELS), positions, packing=packing), want)


def test_the_most_explicit_counts():
    """Position ids that run on do not hide the boundaries that the attention is given."""
    running = torch.arange(STARTS[-1])[None]
    packing = {"position_ids": running, "cu_seq_lens_q": PACKING["cu_seq_lens_q"]}
    want = packed(position_weights(LABELS, 1, attention_mask=MASK))
    assert torch.allclose(position_weights(packed(LABELS), 1, packing=packing), want)


def test_nothing_tells_sequences_apart():
    """A row is then one sequence, as to the model; a mask of blocks denies that: refused."""
    labels = packed(LABELS)
    total = (labels != N).sum()
    alone = position_weights(labels, 1)
    assert alone.max() == alone.sum() == total
    blocks = torch.ones(1, 1, *labels.shape[1:] * 2)
    with pytest.raises(ValueError, match=r"attention_mask=\[1, 1, 14, 14\].*cu_seq_lens_q"):
        position_weights(labels, 1, attention_mask=blocks)
    told = position_weights(labels, 1, attention_mask=blocks, packing=PACKING)
    assert (told > 0).sum() == 2


def test_boundaries_over_rows_and_padding():
    """``cu_seq_lens_q`` counts through the flattened batch; what is after its end is padding."""
    labels = torch.tensor([[1, 1, 1, 1], [1, 1, 1, N]])
    packing = {"cu_seq_lens_q": torch.tensor([0, 3, 3, 5, 7])}  # an empty sequence among them
    got = position_weights(labels, 1, packing=packing)
    assert got.tolist() == [[3, 0, 0, 1], [1, 2, 0, 0]]


@pytest.mark.parametrize(
    ("name", "given", "shown"),
    [
        ("cu_seq_lens_q", [0, 6, 12], "list"),
        ("cu_seq_lens_q", torch.tensor([0.0, 12.0]), "float32"),
        ("cu_seq_lens_q", torch.tensor([[0, 12]]), r"\[1, 2\]"),
        ("cu_seq_lens_q", torch.tensor([12]), r"\[1\]"),
        ("cu_seq_lens_q", torch.tensor([1, 12]), r"\[1, 12\]"),
        ("cu_seq_lens_q", torch.tensor([0, 7, 6]), r"\[0, 7, 6\]"),
        ("cu_seq_lens_q", torch.tensor([0, 6, 19]), "19.*number of tokens, 18"),
        ("seq_idx", torch.zeros(3, 5, dtype=torch.long), r"\[3, 5\]"),
        ("position_ids", torch.arange(5)[None], r"\[1, 5\].*\[3, 6\]"),
        ("position_ids", torch.zeros(3, 2, 6, dtype=torch.long), r"\[2, 6\]"),
        ("position_ids", torch.zeros(3, 6), "float32"),
    ],
)
@pytest.mark.parametrize("positions", ["all", 2])
def test_malformed(positions, name, given, shown):
    """What does not fit the batch is refused by name; where only labels count it is not read."""
    with pytest.raises(ValueError, match=f"{name}=.*{shown}"):
        position_weights(LABELS, positions, packing={name: given})
    position_weights(LABELS, "labels", packing={name: given})


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
    """A mask that tells neither padding nor sequences is refused where those are needed."""
    for positions in ("all", 1):
        with pytest.raises(ValueError, match="attention_mask="):
            position_weights(LABELS, positions, attention_mask=mask)
    position_weights(LABELS, "labels", attention_mask=mask)


@pytest.mark.parametrize("kept", ["position_ids", "cu_seq_lens_q", "both", "neither"])
def test_the_collator_of_transformers(kept, tmp_path):
    """Flattened batches: the first label of each sequence holds the whole of its weight."""
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    batch = collate([{"input_ids": list(range(3, 3 + n))} for n in (5, 3, 6)])
    if kept != "both":
        batch.pop({"position_ids": "cu_seq_lens_q"}.get(kept, "position_ids"))
    if kept == "neither":
        batch.pop("cu_seq_lens_q")
    safety, reference = SafetyConstraint([3, 17, 40], 2.0, "mse"), torch.tensor([0.5, -1.0, 2.0])
    model = build()
    cache = constant_cache(tmp_path / "refs", batch, safety, reference)
    with patch_model(model, safety, reference=cache, positions=1, verify=False) as patch:
        model(**batch)
    weights = torch.zeros(1, 14)
    firsts = {0: 13 - 2} if kept == "neither" else {0: 4, 5: 2, 8: 5}
    for where, labels in firsts.items():
        weights[0, where] = labels
    values = patch.last_parts.safety_logits.reshape(1, 14, 3)
    constraint = (values - reference).square().mean(-1)
    want = 2.0 * (weights * constraint).nan_to_num().sum() / 11
    assert torch.allclose(patch.last_parts.penalty, want)
