"""Layers that evaluation mode would change for good keep their mode."""

from __future__ import annotations

import torch
from torch import nn

from str_kernels import patch_model
from tests.huggingface.adapters import SAFETY, wrap
from tests.huggingface.models import batch, build


class Linear4bit(nn.Linear):
    """Stands in for the layer of bitsandbytes: its first evaluation on a CPU packs the weight."""

    packed = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.packed |= not self.training
        return super().forward(x)


Linear4bit.__module__ = "bitsandbytes.nn.modules"


def test_a_4_bit_layer_is_not_packed():
    """Neither by the trial of the patch nor by the reference pass; other modules evaluate."""
    model, seen = build(), []
    for layer in model.model.layers:
        linear = layer.mlp.up_proj
        layer.mlp.up_proj = Linear4bit(linear.in_features, linear.out_features, bias=False)
        layer.mlp.act_fn.register_forward_hook(lambda m, *_: seen.append(m.training))
    layers = [layer.mlp.up_proj for layer in model.model.layers]
    model = wrap(model)
    with patch_model(model, SAFETY):
        model(**batch()).loss.backward()
    assert not any(layer.packed for layer in layers)
    assert all(layer.training for layer in layers)
    assert False in seen
    assert True in seen
