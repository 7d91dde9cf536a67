"""Check the arguments of the loss; a bad one is a ValueError with its facts, the rule, the remedy.

The code below this boundary does not repeat these checks. It makes two others: an index refuses
another weight than its own (`VocabularyIndex.check`), and a backend refuses a dtype, device or
screen that it cannot run (`Backend.refuses`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from str_kernels.options import LossOptions
from str_kernels.transforms import values_of

_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def _facts(name: str, tensor: Tensor) -> str:
    return f"{name} {list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} {tensor.device}"


def _require_tensor(name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} is a {type(value).__name__}: must be a torch.Tensor.")
    return value


def _require_floating(name: str, value: object) -> None:
    if _require_tensor(name, value).dtype not in _FLOATS:
        raise ValueError(f"{_facts(name, value)}: must be bfloat16, float16, float32 or float64.")


def _require_same_device(name: str, tensor: Tensor, hidden_states: Tensor) -> None:
    if tensor.device != hidden_states.device:
        raise ValueError(
            f"{_facts(name, tensor)}: must be on the device of hidden_states, "
            f"{hidden_states.device}; move it with .to()."
        )


def _require_constant(name: str, tensor: Tensor, hidden_states: Tensor) -> None:
    _require_same_device(name, tensor, hidden_states)
    if tensor.requires_grad:
        raise ValueError(f"{name} requires a gradient, but is a constant of the loss: detach() it.")


def validate_weight(weight: Tensor, name: str = "weight", *, part: bool = False) -> None:
    """Raise ValueError unless this is a whole ``[V, D]``: not sharded, offloaded or quantised.

    A ``part`` of a vocabulary may have no rows.
    """
    _require_tensor(name, weight)
    kind = type(weight).__name__
    if kind == "DTensor":
        raise ValueError(f"{name} is a DTensor: gather it first with .full_tensor().")
    if weight.is_meta:
        raise ValueError(f"{name} is on the meta device (offloaded): load the head on a real one.")
    if weight.numel() == 0 and hasattr(weight, "ds_id"):
        raise ValueError(
            f"{name} is a ZeRO-3 shard with no elements: gather it with "
            "deepspeed.zero.GatheredParameters, or keep the head out of the partition."
        )
    if weight.dtype not in _FLOATS or kind.startswith(("Params4bit", "Int8Params")):
        raise ValueError(
            f"{_facts(name, weight)} ({kind}): a quantised head is not supported; keep it in "
            "bfloat16, float16 or float32 (for bitsandbytes: llm_int8_skip_modules=['lm_head'])."
        )
    if weight.dim() != 2 or (weight.numel() == 0 and not (part and weight.shape[1])):
        raise ValueError(f"{_facts(name, weight)}: must be [V, D] with no empty dimension.")


def validate_loss_inputs(
    hidden_states: Tensor,
    weight: Tensor,
    labels: Tensor,
    options: LossOptions,
    *,
    bias: Tensor | None,
    reference: Tensor | None,
    position_weights: Tensor | None,
    vocab_size: int | None = None,
) -> None:
    """Raise ValueError for an argument of the loss of the wrong shape, dtype or device.

    ``vocab_size`` is V where ``weight`` is a part of the head.
    """
    validate_weight(weight, part=vocab_size is not None)
    _validate_operands(hidden_states, weight, bias)
    _validate_labels(labels, hidden_states)
    _validate_reference(reference, hidden_states, vocab_size or weight.shape[0], options)
    _validate_position_weights(position_weights, labels, hidden_states, options)


def validate_values(
    labels: Tensor, position_weights: Tensor | None, vocab_size: int, options: LossOptions
) -> None:
    """Raise ValueError for values out of range; the host waits for a device."""
    labels = values_of(labels)
    outside = labels_outside(labels, vocab_size, options)
    if outside.any():
        position = outside.nonzero()[0].tolist()
        raise ValueError(
            f"labels{position}={int(labels[tuple(position)])}: must be a row of the head, 0 to "
            f"{vocab_size - 1}, or ignore_index={options.ignore_index}."
        )
    if position_weights is None:
        return
    weights = values_of(position_weights)
    wrong = wrong_weights(weights)
    if wrong.any():
        position = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"position_weights{position}={weights[tuple(position)].item()}: must be finite and "
            "0 or more."
        )


def labels_outside(labels: Tensor, vocab_size: int, options: LossOptions) -> Tensor:
    """Tell, ``[...]`` bool, which labels are no row of the head and not ``ignore_index``."""
    return ((labels < 0) | (labels >= vocab_size)) & (labels != options.ignore_index)


def wrong_weights(position_weights: Tensor) -> Tensor:
    """Tell, ``[...]`` bool, which weights are negative, infinite or NaN."""
    return ~((position_weights >= 0) & (position_weights < math.inf))


def _validate_operands(hidden_states: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    _require_floating("hidden_states", hidden_states)
    if hidden_states.dim() < 1 or hidden_states.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{_facts('hidden_states', hidden_states)}: last dimension must be the weight's "
            f"D={weight.shape[1]} ({_facts('weight', weight)})."
        )
    operands = [("weight", weight)]
    if bias is not None:
        _require_floating("bias", bias)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"{_facts('bias', bias)}: must be [V={weight.shape[0]}].")
        operands.append(("bias", bias))
    for name, tensor in operands:
        _require_same_device(name, tensor, hidden_states)
        if tensor.dtype != hidden_states.dtype and not torch.is_autocast_enabled(
            hidden_states.device.type
        ):
            raise ValueError(
                f"{_facts(name, tensor)}: must have the dtype of hidden_states, "
                f"{hidden_states.dtype}, as for F.linear; cast one, or use torch.autocast."
            )


def _validate_labels(labels: Tensor, hidden_states: Tensor) -> None:
    _require_tensor("labels", labels)
    if labels.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{_facts('labels', labels)}: must be int64 or int32.")
    if labels.shape != hidden_states.shape[:-1]:
        raise ValueError(
            f"{_facts('labels', labels)}: must have the leading shape of hidden_states, "
            f"{list(hidden_states.shape[:-1])}, one label a position, already shifted."
        )
    _require_same_device("labels", labels, hidden_states)


def _validate_reference(
    reference: Tensor | None, hidden_states: Tensor, vocab_size: int, options: LossOptions
) -> None:
    if options.safety is None:
        if reference is not None:
            raise ValueError("reference was given without safety: pass a SafetyConstraint too.")
        return
    largest, count = max(options.safety.token_ids), options.safety.references
    if largest >= vocab_size:
        raise ValueError(
            f"safety.token_ids holds {largest}: the head has {vocab_size} rows, 0 to "
            f"{vocab_size - 1}; were the tokens identified with another tokenizer?"
        )
    if options.leaves_out and vocab_size == len(options.safety.token_ids):
        raise ValueError(
            f"safety.token_ids has {vocab_size} entries, all the head's rows: kind='kl_mass' "
            "compares them with the rest; name fewer tokens, or use kind='kl'."
        )
    if reference is None:
        raise ValueError("reference=None: a SafetyConstraint needs one, [..., K] or [K].")
    _require_floating("reference", reference)
    columns = f"K + 1={count} for kind='kl_mass'" if options.leaves_out else f"K={count}"
    allowed = ((count,), (*hidden_states.shape[:-1], count))
    if tuple(reference.shape) not in allowed:
        raise ValueError(
            f"{_facts('reference', reference)}: must be [{columns}] or {list(allowed[1])}."
        )
    _require_constant("reference", reference, hidden_states)


def _validate_position_weights(
    weights: Tensor | None, labels: Tensor, hidden_states: Tensor, options: LossOptions
) -> None:
    if weights is None:
        return
    if options.safety is None:
        raise ValueError("position_weights were given without safety: pass a SafetyConstraint too.")
    _require_tensor("position_weights", weights)
    if weights.dtype is torch.bool or weights.is_complex() or weights.shape != labels.shape:
        raise ValueError(
            f"{_facts('position_weights', weights)}: must be numbers of the shape of labels, "
            f"{list(labels.shape)}."
        )
    _require_constant("position_weights", weights, hidden_states)


def validate_num_items(num_items_in_batch: object, reduction: str) -> None:
    """Raise ValueError unless this is a number, 0 or more, or a one-element tensor, for "mean"."""
    if num_items_in_batch is None:
        return
    if reduction != "mean":
        raise ValueError(
            f"num_items_in_batch={num_items_in_batch} with reduction={reduction!r}: it is only "
            "the denominator of reduction='mean'; leave it out."
        )
    if isinstance(num_items_in_batch, Tensor):
        if num_items_in_batch.numel() != 1:
            raise ValueError(
                f"{_facts('num_items_in_batch', num_items_in_batch)}: must have one element."
            )
    elif isinstance(num_items_in_batch, bool) or not isinstance(num_items_in_batch, int | float):
        raise ValueError(
            f"num_items_in_batch={num_items_in_batch!r}: must be a number or a tensor."
        )
    elif not 0 <= num_items_in_batch < math.inf:
        raise ValueError(f"num_items_in_batch={num_items_in_batch!r}: must be finite, 0 or more.")
