"""Tries a patch on the user's own model, before anybody trains with it.

Stage: a few tokens → the model without the patch, then with it → loss, gradients, logits compared.

The head gets the same hidden states in both runs, so that only what the patch replaces is compared.
Products with the vocabulary are made in fp32, so that a bf16 model must agree to fp32's rounding
too. The trial has no constraint and no filter.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from str_kernels.engine.contract import Backend
from str_kernels.huggingface.deferred.head import vocabulary_size
from str_kernels.huggingface.deferred.sharding import why_unusable
from str_kernels.huggingface.deferred.tensor import DeferredLogits
from str_kernels.huggingface.patch.comparison import Run, Verification, compare
from str_kernels.huggingface.patch.model_state import preserved_draws, preserved_state
from str_kernels.huggingface.patch.patch import Patch
from str_kernels.options import LossOptions

_SEQUENCES, _LENGTH, _UNLABELLED = 2, 8, 2
_ROWS_AT_ONCE = 16384  # rows of the head in one product in fp32
_LARGEST_GRADIENT = 2**22  # a parameter of the head with more elements is not compared


def verify_patch(model: nn.Module, head: nn.Module, backend: str | Backend) -> Verification:
    """Run a few tokens through the model without and with a patch, and restore the model.

    Args:
        model: a causal LM without a patch.
        head: its output embedding.
        backend: as in ``linear_cross_entropy``.

    Raises:
        ValueError: the patched model does not compute what the model computes.
    """
    reason = why_unusable(model, head)
    if reason is not None:
        return Verification(skipped=reason)
    states: list[Tensor] = []
    with preserved_state(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            inputs = trial_inputs(model, vocabulary_size(head))
            dense = _run(model, head, inputs, states)
        except Exception as error:  # a model that cannot run so is no fault of the patch
            return Verification(skipped=f"{type(error).__name__}: {error}".splitlines()[0])
        if not dense.loss.isfinite():
            return Verification(skipped="its loss is not finite")
        with Patch(model, head, LossOptions(filter_eps=0.0), index=None, backend=backend) as probe:
            try:
                patched = _run(model, head, inputs, states)
            except Exception as error:
                raise ValueError(
                    _refusal(type(model).__name__, f"{type(error).__name__}: {error}")
                ) from error
    errors, faults = compare(dense, patched, vocabulary_size(head))
    if faults:
        raise ValueError(_refusal(type(model).__name__, "; ".join(faults)))
    return Verification(fused=probe.last_parts is not None, errors=errors)


def _refusal(model: str, what: str) -> str:
    return (
        f"model={model}: tried on {_SEQUENCES * _LENGTH} tokens, the patched model "
        f"does not compute what the model computes: {what}. The patch was taken off again; "
        "verify=False would keep it."
    )


def trial_inputs(model: nn.Module, words: int) -> dict[str, Any]:
    """Token ids, always the same and none of them special, with labels after a short prompt."""
    embedding = _input_embedding(model)
    weight = getattr(embedding, "weight", None)
    if isinstance(weight, Tensor) and weight.dim() == 2 and weight.shape[0]:
        words = min(words, weight.shape[0])
    reserved = set(_special_ids(getattr(model, "config", None)))
    drawn = torch.randint(words, (1024,), generator=torch.Generator().manual_seed(0)).tolist()
    chosen = [word for word in drawn if word not in reserved][: _SEQUENCES * _LENGTH]
    if len(chosen) < _SEQUENCES * _LENGTH:
        raise ValueError(f"too few of its {words} token ids are not special")
    device = weight.device if isinstance(weight, Tensor) else next(model.parameters()).device
    ids = torch.tensor(chosen, device=device).reshape(_SEQUENCES, _LENGTH)
    labels = ids.clone()
    labels[:, :_UNLABELLED] = -100
    inputs = {"input_ids": ids, "labels": labels}
    accepted = inspect.signature(type(model).forward).parameters
    optional = {"attention_mask": torch.ones_like(ids), "use_cache": False}
    return inputs | {name: value for name, value in optional.items() if name in accepted}


def _input_embedding(model: nn.Module) -> nn.Module | None:
    try:
        return model.get_input_embeddings()
    except (AttributeError, NotImplementedError):  # how transformers says that there is none
        return None


def _special_ids(config: Any) -> Iterator[int]:
    """Ids that the config names: padding, images, ends."""
    entries = config if isinstance(config, dict) else getattr(config, "to_dict", dict)()
    for name, value in entries.items():
        if isinstance(value, dict):
            yield from _special_ids(value)
        elif str(name).endswith(("_id", "_ids", "_token_index")):
            listed = value if isinstance(value, list | tuple) else [value]
            yield from (x for x in listed if isinstance(x, int))


def _run(model: nn.Module, head: nn.Module, inputs: dict[str, Any], states: list[Tensor]) -> Run:
    """One forward, whose head gets ``states`` as inputs; an empty list collects its own inputs."""
    hook = head.register_forward_pre_hook(_meet(states), with_kwargs=True)
    try:
        with preserved_draws(model), _ProductsInFloat32(vocabulary_size(head)) as products:
            outputs = model(**inputs)
            loss, logits = _loss_and_logits(outputs)
            gradients = _gradients(loss, head, states)
            if isinstance(logits, DeferredLogits):
                logits = logits.materialise()
    finally:
        hook.remove()
    logits = None if logits is None else logits.detach()
    return Run(loss.detach(), logits, gradients, products.step)


def _loss_and_logits(outputs: Any) -> tuple[Tensor, Tensor | None]:
    if isinstance(outputs, tuple):
        loss, logits = outputs[0], outputs[1] if len(outputs) > 1 else None
    else:
        loss, logits = getattr(outputs, "loss", None), getattr(outputs, "logits", None)
    if not isinstance(loss, Tensor) or loss.dim():
        raise ValueError("its forward returns no loss")
    return loss, logits if isinstance(logits, Tensor) else None


def _meet(states: list[Tensor]) -> Callable:
    """A hook of the head: detach its input and keep it in ``states``, or put a kept one there."""
    known, calls = bool(states), iter(list(states))

    def meet(head: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        values = {**dict(enumerate(args)), **kwargs}
        name = next(name for name, x in values.items() if isinstance(x, Tensor))
        if known:
            values[name] = next(calls)
        else:
            values[name] = values[name].detach().requires_grad_()
            states.append(values[name])
        return tuple(values.pop(i) for i in range(len(args))), values

    return meet


def _gradients(loss: Tensor, head: nn.Module, states: list[Tensor]) -> dict[str, Tensor]:
    """Gradients of the head's inputs and of its small trained parameters, by name."""
    wanted = {f"gradient of the hidden states ({i})": x for i, x in enumerate(states)}
    if len(wanted) == 1:
        wanted = {"gradient of the hidden states": states[0]}
    for name, parameter in head.named_parameters():
        if parameter.requires_grad and parameter.numel() <= _LARGEST_GRADIENT:
            wanted[f"gradient of the head's {name}"] = parameter
    if not wanted:
        return {}
    found = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    return {
        name: torch.zeros_like(x) if gradient is None else gradient
        for (name, x), gradient in zip(wanted.items(), found, strict=True)
    }


class _ProductsInFloat32(TorchFunctionMode):
    """Makes ``F.linear`` with the vocabulary's rows in fp32, part by part, and stores no part."""

    def __init__(self, words: int) -> None:
        super().__init__()
        self._words, self.step = words, 0.0

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.linear:
            return func(*args, **kwargs)
        return self._linear(*args, **kwargs)

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if weight.shape[0] != self._words:
            return F.linear(input, weight, bias)
        device = input.device.type
        if torch.is_autocast_enabled(device):  # its casts, without its product
            dtype = torch.get_autocast_dtype(device)
            input, weight = input.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        if not {input.dtype, weight.dtype} & {torch.float16, torch.bfloat16}:
            return F.linear(input, weight, bias)
        self.step = max(torch.finfo(x.dtype).eps for x in (input, weight))
        rows = range(0, self._words, _ROWS_AT_ONCE)
        parts = [slice(start, start + _ROWS_AT_ONCE) for start in rows]
        settings = {"use_reentrant": False, "preserve_rng_state": False}
        biases = [None if bias is None else bias[part] for part in parts]
        logits = [
            checkpoint(_linear_in_float32, input, weight[part], b, **settings)
            for part, b in zip(parts, biases, strict=True)
        ]
        return torch.cat(logits, -1)


def _linear_in_float32(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    with torch.autocast(input.device.type, enabled=False):
        return F.linear(input.float(), weight.float(), None if bias is None else bias.float())
