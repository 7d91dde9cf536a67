"""PEFT's adapters: which layers there are, switching them off, and what is trained besides."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

_SHOWN = 3  # names in an error


def adapter_layers(model: nn.Module) -> list[nn.Module]:
    """Every layer below ``model`` that PEFT can switch off."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    return [m for m in model.modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)]


def trainable_base(model: nn.Module) -> list[str]:
    """Names of parameters that are trained and stay when the adapters are switched off."""
    from peft.utils import AuxiliaryTrainingWrapper

    own: set[int] = set()
    for layer in adapter_layers(model):
        if isinstance(layer, AuxiliaryTrainingWrapper):
            kept = {id(p) for p in layer.original_module.parameters()}
            own |= {id(p) for p in layer.parameters()} - kept
        for name in getattr(layer, "adapter_layer_names", ()):  # PEFT 0.17: not on a wrapper
            part = getattr(layer, name, None)
            own |= {id(p) for p in part.parameters()} if hasattr(part, "parameters") else set()
    return [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in own]


def require_fixed_base(model: nn.Module) -> None:
    """Refuse a model that trains parameters which stay when the adapters are switched off.

    Copies that PEFT trains in place of a frozen original (``modules_to_save``, trainable tokens) do
    not stay.

    Raises:
        ValueError: parameters outside the adapters that are trained; the first of them are named.
    """
    moving = trainable_base(model)
    if moving:
        more = f", and {len(moving) - _SHOWN} more" if len(moving) > _SHOWN else ""
        raise ValueError(
            f"reference='adapter_off': parameters outside the adapters are trained "
            f"({', '.join(moving[:_SHOWN])}{more}), and the reference would move with them; freeze "
            "them, train copies of them (modules_to_save of peft), or pass reference=<a cache file "
            "made before training>."
        )


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Switches the adapters off in this block: what is left is the aligned model.

    PEFT's flags are set one by one: its ``disable_adapter()`` also rewrites ``requires_grad``,
    which unfreezes what the user had frozen.

    Raises:
        ValueError: no adapter to switch off, or one merged into the weights.
    """
    layers = adapter_layers(model)
    if not layers:
        raise ValueError(
            "reference='adapter_off': the model has no adapter to switch off, so training would "
            "move its own reference; wrap it with peft.get_peft_model, or pass reference=<a cache "
            "file>."
        )
    if any(getattr(layer, "merged", False) for layer in layers):
        raise ValueError(
            "reference='adapter_off': an adapter is merged into the weights; call "
            "unmerge_adapter() first."
        )
    layers = [layer for layer in layers if not layer.disable_adapters]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False
