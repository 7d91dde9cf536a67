"""The reference of a batch, from the same weights: one pass with the adapters off, no gradients.

Stage: the arguments of a forward → `Fold` of the model without its adapters → reference ``[R, K]``,
one row for each of the R rows of the head's call. Only the K columns are computed; ``logprob`` and
``kl_mass`` also need the log-sum-exp, which is computed on constrained rows alone, without any
gradient. There is never a second model.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from str_kernels.constraint import needs_lse
from str_kernels.engine.contract import Backend, Head, RowInputs
from str_kernels.engine.logits import outcomes
from str_kernels.huggingface.constraint.adapters import adapters_off
from str_kernels.huggingface.constraint.sequences import is_encoder_decoder
from str_kernels.huggingface.deferred.fold import Fold
from str_kernels.huggingface.deferred.head import deferring
from str_kernels.huggingface.deferred.modes import evaluates_otherwise
from str_kernels.huggingface.deferred.tensor import DeferredLogits
from str_kernels.options import LossOptions
from str_kernels.terms import row_terms, safety_logits

# what transformers call a cache: until 5.23, from 5.24 on, and in state-space models
_CACHES = ("past_key_values", "cache", "cache_params")
_NOT_FOR_REFERENCE = ("labels", "shift_labels", "num_items_in_batch")


class _NoLoss:
    """Owner of the reference pass's logits: whatever loss the model makes of them is not read."""

    running = True

    def __init__(self, labelled: bool) -> None:
        self._labelled = labelled

    def cross_entropy(self, fold: Fold, target: Tensor, *, reduction: str, **_: Any) -> Tensor:
        if not self._labelled:
            raise ValueError(
                "the model computes a loss without labels, so it has no reference pass."
            )
        shape = target.shape if reduction == "none" else ()
        return fold.hidden_states.new_zeros(shape)

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
        arguments: of the training forward, by name; labels are left out, but where an
            encoder-decoder makes its decoder's ids from them.
        adapters: False for a model that has none and is itself the reference.

    Raises:
        ValueError: no adapter to switch off, one merged into the weights, a call that goes on from
            a cache (``past_key_values``) or from the states of an encoder, or a model whose logits
            cannot be deferred.
    """
    for name in _CACHES:
        if arguments.get(name) is not None:
            raise ValueError(
                f"{name}: reference='adapter_off' runs the body twice and would extend the "
                "cache twice; train without a cache, or use a cache file."
            )
    if adapters and arguments.get("encoder_outputs") is not None:
        raise ValueError(
            "encoder_outputs: were computed with the adapters on, and the reference is computed "
            "with the adapters off, in the encoder too; pass input_ids instead."
        )
    labelled = is_encoder_decoder(model)
    left_out = () if labelled else _NOT_FOR_REFERENCE
    kept = {name: x for name, x in arguments.items() if name not in left_out}
    modules = list(model.modules())
    if _needs_no_cache(model, modules, kept):
        kept["use_cache"] = False
    device = next(model.parameters()).device
    with (
        adapters_off(model) if adapters else nullcontext(),
        _evaluating(modules, device, _NoLoss(labelled)),
    ):
        logits = _logits(forward(**kept))
        fold = None if logits is None else logits.fold  # a lent weight is given back afterwards
    if fold is None:
        raise ValueError(
            f"reference='adapter_off': the logits of {type(model).__name__} cannot be deferred, so "
            "its reference cannot be computed; use a cache file."
        )
    return fold


def _needs_no_cache(model: nn.Module, modules: list[nn.Module], arguments: dict[str, Any]) -> bool:
    """Whether keys and values need not be kept: nothing reads them, and they take 2·T·L rows.

    Without a cache transformers tells packed sequences by their positions, if there is no mask.
    Then the training pass decides, which has a cache unless its layers are checkpointed.
    """
    if model.training and any(getattr(m, "gradient_checkpointing", False) for m in modules):
        return True
    if "use_cache" not in inspect.signature(type(model).forward).parameters:
        return False
    return arguments.get("attention_mask") is not None or arguments.get("position_ids") is None


def _logits(outputs: Any) -> DeferredLogits | None:
    found = outputs if isinstance(outputs, tuple) else (outputs.logits,)
    return next((x for x in found if isinstance(x, DeferredLogits)), None)


@contextmanager
def _evaluating(modules: list[nn.Module], device: torch.device, owner: _NoLoss) -> Iterator[None]:
    """Without gradients, dropout or checkpointing; modes, autocast and random state are restored.

    This is ``eval()``, except that every module gets its own mode back, and that a layer of
    bitsandbytes stays in its own.
    """
    training = [m for m in modules if m.training and not evaluates_otherwise(m)]
    devices = [] if device.type == "cpu" else [device]
    dtype, enabled = torch.get_autocast_dtype(device.type), torch.is_autocast_enabled(device.type)
    with (
        torch.no_grad(),
        # a weight cast here would be cached without its graph, and used so by the training pass
        torch.autocast(device.type, dtype=dtype, enabled=enabled, cache_enabled=False),
        torch.random.fork_rng(devices, device_type=device.type),
        deferring(owner),
    ):
        for module in training:
            module.training = False
        try:
            yield
        finally:
            for module in training:
                module.training = True


def safety_reference(
    fold: Fold, constrained: Tensor, options: LossOptions, backend: str | Backend = "auto"
) -> Tensor:
    """Reference ``[R, K]`` of the head's R rows: logits, or log-probabilities for ``logprob``.

    For ``kl_mass`` it is ``[R, K + 1]``, log-probabilities with that of all other tokens.

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
    if not needs_lse(safety):  # no row has a label, so there is nothing to filter either
        options = replace(options, filter_eps=0.0, screen="auto")
    states = fold.hidden_states.reshape(-1, fold.hidden_states.shape[-1])
    wanted = constrained[rows]
    with torch.no_grad():
        labels = torch.full_like(rows, options.ignore_index)
        reference = states.new_zeros(safety.references)
        inputs = RowInputs(labels, reference, wanted.float())
        head = Head(states, fold.weight, fold.bias)
        if needs_lse(safety):
            found = row_terms(head, inputs, options, backend=backend, shard=fold.shard).statistics
            values = outcomes(found)
        else:
            values = safety_logits(head, inputs, options, backend=backend, shard=fold.shard)
        table = values.new_full((fold.batch_shape.numel(), values.shape[-1]), torch.nan)
        table[rows] = values
        return table
