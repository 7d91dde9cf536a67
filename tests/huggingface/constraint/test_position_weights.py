"""A batch that carries its own position weights, against the materialised formula."""

import pytest
import torch

from str_kernels.huggingface import patch_model
from tests.huggingface.adapters import constraint, lora
from tests.huggingface.dense import dense_loss
from tests.huggingface.models import assert_same, batch, build, gradients


@pytest.mark.parametrize("kind", ["mse", "logprob", "kl"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_rows_without_labels_are_held(name, kind):
    """An anchor: nothing is learned from it, and its safety tokens count as its weights say."""
    model, inputs, safety = lora(name), batch(rows=4), constraint(kind)
    inputs["labels"][2:] = -100
    given = torch.rand(inputs["labels"].shape, generator=torch.Generator().manual_seed(0))
    given = given * inputs["attention_mask"]
    want = gradients(model, dense_loss(model, inputs, safety, given))
    without = gradients(model, dense_loss(model, inputs, safety, given * (given < 0)))
    with patch_model(model, safety):
        got = gradients(model, model(**inputs, position_weights=given).loss)
    assert_same(got, want, 2e-5)
    assert (want["loss"] - without["loss"]).abs() > 1e-4  # they do count


def test_the_next_batch_without_weights_has_the_usual_ones():
    model, inputs, safety = lora(), batch(), constraint()
    want = gradients(model, dense_loss(model, inputs, safety, "all"))
    with patch_model(model, safety):
        model(**inputs, position_weights=torch.zeros(inputs["labels"].shape))
        assert_same(gradients(model, model(**inputs).loss), want, 2e-5)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (torch.ones(3, 4), r"position_weights=\[3, 4\]: must have one number for each row"),
        ([1.0], "position_weights=list: must be a tensor"),
        (torch.ones(3, 11, dtype=torch.long), r"position_weights=torch.int64: must be a tensor"),
    ],
)
def test_weights_that_do_not_fit_are_refused(weights, message):
    model = lora()
    with patch_model(model, constraint()), pytest.raises(ValueError, match=message):
        model(**batch(), position_weights=weights)


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_weights_that_are_no_weights_are_refused(bad):
    model, inputs = lora(), batch()
    weights = torch.ones(inputs["labels"].shape)
    weights[1, 2] = bad
    with patch_model(model, constraint()), pytest.raises(ValueError, match="must be finite and"):
        model(**inputs, position_weights=weights)


def test_without_labels_they_are_refused():
    model, inputs = lora(), batch()
    weights = torch.ones(inputs.pop("labels").shape)
    with patch_model(model, constraint()), pytest.raises(ValueError, match="there are no labels"):
        model(**inputs, position_weights=weights)


def test_without_a_constraint_they_are_refused():
    model, inputs = build(), batch()
    weights = torch.ones(inputs["labels"].shape)
    with patch_model(model), pytest.raises(ValueError, match="patched with safety=None"):
        model(**inputs, position_weights=weights)
