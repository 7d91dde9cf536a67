"""What the reference pass does without: a cache of keys and values, gradients, checkpoints."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from str_kernels import patch_model
from str_kernels.huggingface.constraint.reference_pass import reference_fold
from str_kernels.huggingface.deferred.forward import inner_forward
from tests.huggingface.adapters import SAFETY, lora
from tests.huggingface.models import batch


@pytest.mark.parametrize(
    ("left_out", "added", "cached"),
    [
        ((), {}, False),
        (("attention_mask",), {}, False),
        # packed, perhaps: whether that is seen depends on the cache, so both passes have one
        (("attention_mask",), {"position_ids": torch.arange(11).repeat(3, 1)}, True),
    ],
    ids=["mask", "neither", "positions alone"],
)
def test_no_cache_is_made(left_out, added, cached):
    """The pass keeps no keys and values where the training pass would not see packing by that."""
    model, seen = lora(), []
    body = model.get_base_model().model
    body.register_forward_hook(
        lambda m, args, out: seen.append((torch.is_grad_enabled(), out.past_key_values))
    )
    inputs = {n: x for n, x in batch().items() if n not in left_out} | added
    with patch_model(model, SAFETY, verify=False):
        model(**inputs).loss.backward()
    (grad, of_reference), (of_grad, of_training) = seen
    assert (grad, of_grad) == (False, True)
    assert (of_reference is not None) == cached
    assert of_training is not None


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_a_call_that_goes_on_from_a_cache_is_refused(name):
    """By either of transformers' names: the body would run twice and extend the cache twice."""
    model = lora()
    given = {**batch(), name: DynamicCache(config=model.config)}
    with pytest.raises(ValueError, match=f"{name}: reference='adapter_off' runs the body"):
        reference_fold(model, inner_forward(model.get_base_model()), given, adapters=True)
