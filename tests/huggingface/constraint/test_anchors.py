"""Anchor rows below a batch: held and not learned, weighed like its rows, drawn by the batch."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from str_kernels import AnchoredCollator, SafetyConstraint, patch_model
from str_kernels.inputs.chat import IGNORED, collate
from tests.huggingface.adapters import lora
from tests.huggingface.dense import dense_loss
from tests.huggingface.models import assert_same, gradients

PLAIN = partial(collate, pad_token_id=0)
REFUSED = [{"input_ids": [7, i, 8, 9, 10, 11, 12, 13]} for i in range(20, 26)]
BENIGN = [{"input_ids": [5, i, 6]} for i in range(40, 44)]


def task(count: int) -> list[dict]:
    rows = [[i, i + 1, 3, 4, *[2] * (i % 3)] for i in range(50, 50 + count)]
    return [{"input_ids": ids, "labels": [IGNORED, IGNORED, *ids[2:]]} for ids in rows]


HALVES = task(4)[:2], task(4)[2:]


def collator(**options) -> AnchoredCollator:
    return AnchoredCollator(PLAIN, REFUSED, BENIGN, pad_token_id=0, **options)


@pytest.mark.parametrize("positions", ["all", "labels", 1])
def test_anchors_weigh_a_share_of_the_task_s_rows(positions):
    """Spread over their own tokens; with two anchors to eight rows, as much as each of those."""
    before, batch = PLAIN(task(4)), collator(positions=positions)(task(4))
    width = before["labels"].shape[1]
    assert {x.shape for x in batch.values()} == {(6, 8)}
    for name, values in before.items():
        assert torch.equal(batch[name][:4, :width], values)
    assert batch["input_ids"][4].tolist() in [row["input_ids"] for row in REFUSED]
    assert batch["input_ids"][5, :3].tolist() in [row["input_ids"] for row in BENIGN]
    assert batch["attention_mask"].sum(-1)[4:].tolist() == [8, 3]
    assert (batch["labels"][4:] == IGNORED).all()
    weights = batch["position_weights"]
    assert (weights[batch["attention_mask"] == 0] == 0).all()
    assert torch.equal(weights[5, :3], weights[5, :1].expand(3))
    learned = (before["labels"][:, 1:] != IGNORED).sum(-1).float()
    assert torch.allclose(weights[:4].sum(-1), learned)
    assert torch.allclose(weights[4:].sum(-1), learned.sum() / 8)
    halves = [collator(positions=positions)(rows)["position_weights"] for rows in HALVES]
    assert torch.allclose(sum(half[2:].sum() for half in halves), weights[4:].sum())
    more = collator(positions=positions, share=1.0)(task(4))["position_weights"]
    assert torch.allclose(more[4:], 4 * weights[4:])


def test_the_draw_is_the_batch_s_and_the_seed_s():
    """Alike on every worker and after a resume; other batches and seeds meet other rows."""

    def drawn(rows, seed=0):
        return tuple(map(tuple, collator(seed=seed)(rows)["input_ids"][-2:].tolist()))

    rows = task(8)
    assert drawn(rows[:2]) == drawn(rows[:2])
    assert len({drawn([row]) for row in rows}) > 3
    assert len({drawn(rows[:2], seed) for seed in range(8)}) > 3


def test_anchors_join_one_batch_in_so_many_and_weigh_as_much_more():
    """The batch and the seed draw; without anchors a batch has the weights of its own rows."""
    rows, plain = task(120), collator()
    batches = [rows[i : i + 2] for i in range(0, 120, 2)]
    made = [collator(every=3)(batch) for batch in batches]
    joined = [len(batch["labels"]) == 4 for batch in made]
    assert 10 <= sum(joined) <= 30  # 20 on average, with a deviation of 3.7
    assert made[-1].keys() == made[0].keys()
    for batch, got, with_them in zip(batches, made, joined, strict=True):
        want = plain(batch)["position_weights"]
        own = got["position_weights"][:2]
        assert torch.equal(own, want[:2, : own.shape[1]])
        if with_them:
            assert torch.allclose(got["position_weights"][2:], 3 * want[2:])
    again = [len(collator(every=3)(batch)["labels"]) == 4 for batch in batches]
    other = [len(collator(every=3, seed=1)(batch)["labels"]) == 4 for batch in batches]
    assert again == joined != other


@pytest.mark.parametrize("kind", ["mse", "kl"])
def test_the_loss_is_the_formula_s(kind):
    """Cross-entropy of the task's rows, the constraint of all: values and every gradient."""
    model, safety = lora(), SafetyConstraint([3, 17, 40], 2.0, kind)
    batch = collator()(task(4))
    given = batch["position_weights"]
    inputs = {name: values for name, values in batch.items() if name != "position_weights"}
    want = gradients(model, dense_loss(model, inputs, safety, given))
    with patch_model(model, safety):
        got = gradients(model, model(**batch).loss)
    assert_same(got, want, 2e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AnchoredCollator(PLAIN, pad_token_id=0), "pools is empty"),
        (lambda: AnchoredCollator(PLAIN, REFUSED, [], pad_token_id=0), r"pools\[1\]: must have"),
        (lambda: collator(alone=1), "alone=1: must be True or False"),
        (lambda: AnchoredCollator(PLAIN, [{"prompt": "x"}], pad_token_id=0), r"pools\[0\]"),
        (lambda: AnchoredCollator(PLAIN, [{"input_ids": []}], pad_token_id=0), r"pools\[0\]"),
        (lambda: AnchoredCollator(PLAIN, [REFUSED, BENIGN], pad_token_id=0), r"pools\[0\]"),
        (lambda: collator(positions="some"), "positions='some'"),
        (lambda: collator(share=0.0), "share=0.0: must be above 0"),
        (lambda: collator(every=0), "every=0: must be an integer, 1 or more"),
        (
            lambda: AnchoredCollator(
                lambda rows: {**PLAIN(rows), "position_ids": None}, REFUSED, pad_token_id=0
            )(task(1)),
            "a batch of .*position_ids.*and nothing else",
        ),
    ],
)
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_anchors_alone():
    """They weigh what the batch would, and whatever it teaches is not held back."""
    own = collator()(task(4))["position_weights"][:4]
    weights = collator(alone=True)(task(4))["position_weights"]
    assert not weights[:4].any()
    assert torch.allclose(weights[4:].sum(), own.sum())
    rarely = collator(alone=True, every=1000)(task(4))["position_weights"]
    assert rarely.shape[0] == 4
    assert not rarely.any()


@pytest.mark.parametrize("kind", ["kl", "kl_mass"])
def test_the_reference_pass_runs_on_anchors_alone(kind):
    """It is given their rows; loss and gradients are those of the dense formula."""
    model, inputs = lora(), collator(alone=True)(task(4))
    safety, seen = SafetyConstraint([3, 17, 40], 2.0, kind), []
    unweighed = {name: values for name, values in inputs.items() if name != "position_weights"}
    want = gradients(model, dense_loss(model, unweighed, safety, inputs["position_weights"]))
    body = model.get_base_model().model
    body.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    with patch_model(model, safety, verify=False):
        assert_same(gradients(model, model(**inputs).loss), want, 2e-5)
        assert seen == [2, 6]
        seen.clear()
        none = torch.zeros_like(inputs["position_weights"])
        assert model(**{**inputs, "position_weights": none}).loss > 0
        assert seen == [6]  # nothing is constrained, so there is no reference to compute
        seen.clear()
        for batch in (collator()(task(4)), inputs):  # all rows once: whoever asks would wait again
            model(**batch)
        assert seen == [6, 6, 6, 6]
