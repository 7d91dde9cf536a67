"""PEFT's adapters: which layers there are, switching them off, and what is trained besides."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

_OF_THE_BASE = {"base_layer", "original_module"}  # PEFT's names of what an adapter wraps


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
        more = f" and {len(moving) - 1} more" if len(moving) > 1 else ""
        raise ValueError(
            f"reference='adapter_off': parameters outside the adapters are trained ({moving[0]}"
            f"{more}), and the reference would move with them; freeze them, train copies of them "
            "(modules_to_save of peft), or pass reference=<a cache file made before training>."
        )


def trained_adapters(layers: list[nn.Module]) -> set[str]:
    """Names of the active adapters that have a parameter that is trained, in any of the layers."""
    trained: set[str] = set()
    for layer in layers:
        active = set(layer.active_adapters)
        for name, parameter in layer.named_parameters():
            parts = set(name.split("."))  # PEFT keeps every part of an adapter under its name
            if parameter.requires_grad and not parts & _OF_THE_BASE:
                trained |= active & parts
    return trained


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Switches the trained adapters off in this block: what is left is the aligned model.

    Active adapters without trained parameters stay: they are part of what training began with, and
    cannot move. Where no adapter is trained, as in the evaluation of a loaded one, all are off.

    PEFT's attributes are set one by one: its ``disable_adapter()`` and ``set_adapter()`` also
    rewrite ``requires_grad``, which unfreezes what the user had frozen.

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
    trained, before = trained_adapters(layers), [layer._active_adapter for layer in layers]
    for layer, active in zip(layers, before, strict=True):
        kept = [name for name in layer.active_adapters if trained and name not in trained]
        layer._active_adapter, layer._disable_adapters = kept or active, not kept
    try:
        yield
    finally:
        for layer, active in zip(layers, before, strict=True):
            layer._active_adapter, layer._disable_adapters = active, False
