"""The aligned model's opinion of a batch, out of the same weights: adapters off, one no-grad pass.

Stage: the arguments of a forward → `Fold` of the model without its adapters → reference ``[R, K]``,
a row for each of the R rows of the head's call. Only the K columns are computed (the log-sum-exp
too for ``logprob``, and then on constrained rows alone). There is never a second model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from str_kernels.engine.contract import Backend
from str_kernels.huggingface.deferred import DeferredLogits
from str_kernels.huggingface.head import deferring
from str_kernels.huggingface.recording import Fold
from str_kernels.options import LossOptions
from str_kernels.terms import row_terms

_NOT_FOR_REFERENCE = ("labels", "shift_labels", "num_items_in_batch")
_SHOWN = 3  # names in an error


class _NoLoss:
    """Owner of the reference pass's logits: there are no labels, so there is no loss."""

    def cross_entropy(self, *_: Any, **__: Any) -> Tensor:
        raise ValueError("the model computes a loss without labels, so it has no reference pass.")

    def logits_read(self, by: str, size: int) -> None:
        raise ValueError(
            f"reference='adapter_off': the model's own {by} needs its real logits, which the "
            "reference pass does not make; use a cache file."
        )


def reference_fold(
    model: nn.Module, forward: Callable[..., Any], arguments: dict[str, Any], *, adapters: bool
) -> Fold:
    """The logits of the aligned model on these arguments, as a fold.

    Args:
        model: whose adapters are switched off and which is put in evaluation mode; both restored.
        forward: the model's forward without the patch.
        arguments: of the training forward, by name; labels are left out.
        adapters: False for a model that has none and is itself the reference.

    Raises:
        ValueError: no adapter to switch off, one merged into the weights, a call that goes on from
            ``past_key_values``, or a model whose logits cannot be deferred.
    """
    if arguments.get("past_key_values") is not None:
        raise ValueError(
            "past_key_values: reference='adapter_off' runs the body twice and would extend the "
            "cache twice; train without a cache, or use a cache file."
        )
    kept = {name: x for name, x in arguments.items() if name not in _NOT_FOR_REFERENCE}
    if model.training and _checkpoints(model):
        kept["use_cache"] = False  # as checkpointing does: without a cache, packing is seen
    if adapters:
        with adapters_off(model):
            outputs = _evaluate(model, forward, kept)
    else:
        outputs = _evaluate(model, forward, kept)
    logits = outputs[0] if isinstance(outputs, tuple) else outputs.logits
    if not isinstance(logits, DeferredLogits) or logits.fold is None:
        raise ValueError(
            f"reference='adapter_off': the logits of {type(model).__name__} cannot be deferred, so "
            "its reference cannot be computed; use a cache file."
        )
    return logits.fold


def _evaluate(model: nn.Module, forward: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    device = next(model.parameters()).device
    devices = [] if device.type == "cpu" else [device]
    dtype, enabled = torch.get_autocast_dtype(device.type), torch.is_autocast_enabled(device.type)
    with (
        torch.no_grad(),
        # a weight cast here would be cached without its graph, and used so by the training pass
        torch.autocast(device.type, dtype=dtype, enabled=enabled, cache_enabled=False),
        torch.random.fork_rng(devices, device_type=device.type),
        _evaluation_mode(model),
        deferring(_NoLoss()),
    ):
        return forward(**arguments)


def _checkpoints(model: nn.Module) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    """No dropout and no checkpointing; as ``eval()``, but every module gets its own mode back."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


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
    """What is left with the adapters off must not be trained.

    What PEFT trains in place of a frozen original (``modules_to_save``, trainable tokens) may be.

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
    """The base model as it was aligned, for this block.

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


def safety_reference(
    fold: Fold, constrained: Tensor, options: LossOptions, backend: str | Backend = "auto"
) -> Tensor:
    """Reference ``[R, K]`` of the head's R rows: logits, or log-probabilities for ``logprob``.

    The very arithmetic of the training loss (fp32 accumulation), so that an adapter that has not
    moved has no penalty at all.

    Args:
        fold: the aligned model's logits.
        constrained: ``[R]`` bool; every other row comes back as NaN and is never read.
        options: of the training loss: its constraint, filter and screen.
        backend: as in ``linear_cross_entropy``.
    """
    rows, safety = fold.rows.reshape(-1), replace(options.safety, strength=1.0)
    options = LossOptions(
        safety=safety,
        logit_scale=fold.logit_scale,
        softcap=fold.softcap,
        filter_eps=options.filter_eps,
        screen=options.screen,
    )
    states = fold.hidden_states.reshape(-1, fold.hidden_states.shape[-1])
    wanted = constrained[rows]
    with torch.no_grad():
        terms = row_terms(
            states,
            fold.weight,
            torch.full_like(rows, options.ignore_index),
            options,
            bias=fold.bias,
            reference=states.new_zeros(len(safety.token_ids)),
            position_weights=wanted.float(),
            backend=backend,
        )
        values = terms.safety_logits
        if safety.kind == "logprob":
            values = values - terms.lse[:, None]
        table = values.new_full((fold.batch_shape.numel(), values.shape[-1]), torch.nan)
        table[rows] = values
        return table
