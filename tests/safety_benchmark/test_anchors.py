import pytest
import torch

from benchmarks.safety.anchors import joined, without_labels
from benchmarks.safety.data import anchor_rows, batches, encode, load_split
from tests.tiny import word_tokenizer


def test_half_of_the_anchors_are_benign(data):
    rows = anchor_rows(data, 10)
    assert [("steal" in row["prompt"], "clean" in row["prompt"]) for row in rows] == [
        (True, False),
        (False, True),
    ] * 5
    asked = {
        r["prompt"]
        for name in ("refusals", "lookalike_benign")
        for r in load_split(data, name).test
    }
    assert not asked & {row["prompt"] for row in rows}


@pytest.mark.parametrize("positions", ["all", "labels", 1])
def test_an_anchor_counts_as_much_as_a_row_of_the_task(data, positions):
    tokenizer = word_tokenizer()
    task = encode(tokenizer, load_split(data, "sst2").train[:8], 64)
    held = without_labels(encode(tokenizer, anchor_rows(data, 4), 64))
    order = {"steps": 2, "pad": 0, "seed": 0}
    own = list(batches(task, size=4, **order))
    made = list(joined(iter(own), batches(held, size=2, **order), positions, 0))
    assert len(made) == 2
    for batch, before in zip(made, own, strict=True):
        width = before["labels"].shape[1]
        assert len({x.shape for x in batch.values()}) == 1
        assert torch.equal(batch["input_ids"][:4, :width], before["input_ids"])
        assert (batch["labels"][4:] == -100).all()
        assert (batch["position_weights"][batch["attention_mask"] == 0] == 0).all()
        sums = batch["position_weights"].sum(-1)
        learned = (batch["labels"][:, 1:] != -100).sum(-1).float()
        assert torch.allclose(sums[:4], learned[:4])
        assert torch.allclose(sums[4:], learned[:4].mean())
