"""A share of the sequences is constrained: drawn by seed and step, the same sum on average."""

from __future__ import annotations

import pytest
import torch

from str_kernels.huggingface import build_reference_cache, patch_model
from str_kernels.huggingface.constraint.share import Drawn, Sharing, arguments_of_rows
from tests.huggingface.adapters import constraint, lora
from tests.huggingface.dense import dense_loss, weights
from tests.huggingface.models import assert_same, batch, build, gradients


def rows_seen(model, patch):
    """How many rows each pass of the body had, the reference's first."""
    seen = []
    hook = model.get_base_model().model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    return seen, hook


@pytest.mark.parametrize("kind", ["kl", "kl_mass"])
@pytest.mark.parametrize("positions", ["all", "labels"])
def test_drawn_rows_are_constrained_as_their_weights_say(kind, positions):
    """Loss and gradients of the materialised formula, the reference pass on the drawn rows."""
    model, inputs, safety = lora(), batch(rows=4), constraint(kind)
    drawn = Sharing(0.5, 3).draw(4)
    assert len(drawn.rows) == 2
    shifted = torch.nn.functional.pad(inputs["labels"], (0, 1), value=-100)[:, 1:]
    given = weights(shifted, inputs["attention_mask"], positions)
    given = given * drawn.factors(given.device)[:, None]
    want = gradients(model, dense_loss(model, inputs, safety, given))
    with patch_model(model, safety, positions=positions, share=0.5, share_seed=3) as patch:
        seen, hook = rows_seen(model, patch)
        got = gradients(model, model(**inputs).loss)
        hook.remove()
    assert_same(got, want, 2e-5)
    assert seen == [2, 4]


def test_the_average_of_many_draws_is_all():
    """Every row is drawn as often as the share says, a whole number of rows or not."""
    for share, size in ((0.25, 8), (0.3, 1), (0.6, 5)):
        sharing = Sharing(share, 0)
        total = sum(sharing.draw(size).factors(torch.device("cpu")) for _ in range(4000)) / 4000
        # a row's mean of 4,000 draws of 0 or 1/share: its deviation is 0.025 at most
        assert (total - 1.0).abs().max() < 0.12


def test_a_draw_depends_on_seed_step_and_forward_alone():
    """A resumed process draws what the first would have drawn; another seed or step does not."""
    first = Sharing(0.5, 1)
    for _ in range(5):
        first.draw(8)
    first.begin(7)
    want = [first.draw(20).rows for _ in range(3)]
    resumed = Sharing(0.5, 1)
    resumed.begin(7)
    assert [resumed.draw(20).rows for _ in range(3)] == want
    kept = Sharing(0.5, 1)
    kept.load_state_dict(first.state_dict())
    assert kept.draw(20) == first.draw(20)
    for seed, step in ((2, 7), (1, 8)):
        other = Sharing(0.5, seed)
        other.begin(step)
        assert other.draw(20).rows != want[0]


def test_a_batch_of_which_no_row_is_drawn(tmp_path):
    """There is no reference pass and no penalty, with a cache file neither; all in evaluation."""
    model, inputs, safety = lora(), batch(rows=1), constraint("kl")
    path = tmp_path / "references"
    build_reference_cache(build(), [inputs], path, safety)
    seed = next(s for s in range(99) if not Sharing(0.1, s).draw(1).rows)
    for reference, passes in (("adapter_off", [1]), (path, [1])):
        with patch_model(model, safety, reference=reference, share=0.1, share_seed=seed) as patch:
            seen, hook = rows_seen(model, patch)
            model(**inputs)
            hook.remove()
            assert seen == passes
            assert patch.last_parts.penalty == 0
            model.eval()
            model(**inputs)
            assert patch.last_parts.penalty > 0
            model.train()


def test_arguments_of_other_rows_keep_the_pass_whole():
    """Nothing is cut by guess: images, a dictionary of masks, three planes of positions."""
    drawn = Drawn([1], 3, 0.5, [1])
    ids = torch.arange(6).reshape(3, 2)
    cut = arguments_of_rows({"input_ids": ids, "use_cache": False, "labels": ids}, drawn)
    assert cut["input_ids"].tolist() == cut["labels"].tolist() == [[2, 3]]
    assert cut["use_cache"] is False
    for more in (
        {"pixel_values": torch.ones(3, 2)},
        {"attention_mask": {"full": ids}},
        {"position_ids": torch.ones(3, 3, 2)},
        {"position_ids": torch.ones(1, 2)},
    ):
        assert arguments_of_rows({"input_ids": ids, **more}, drawn) is None


def test_a_pass_that_cannot_be_cut_is_whole():
    """Positions that all rows share: the loss is that of the drawn rows all the same."""
    model, inputs, safety = lora(), batch(rows=4), constraint("kl")
    inputs["attention_mask"][:] = 1
    losses = []
    for more in ({}, {"position_ids": torch.arange(inputs["input_ids"].shape[1])[None]}):
        with patch_model(model, safety, share=0.5):
            losses.append(model(**inputs, **more).loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("share", [0.0, 1.5, "half", True])
def test_other_shares_are_refused(share):
    with pytest.raises(ValueError, match=r"share=.*: must be above 0 and at most 1"):
        patch_model(lora(), constraint("kl"), share=share)


def test_a_share_of_nothing_is_refused():
    with pytest.raises(ValueError, match="was given without safety"):
        patch_model(build(), share=0.5)
