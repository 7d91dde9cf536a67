"""The patch tries itself on the user's own model before anybody trains with it.

Stage: a few tokens → the model as it is, then patched → loss, gradients and logits compared.

Both runs meet the same hidden states at the head, so that only what the patch replaces is compared;
and in both, products with the vocabulary are made in fp32, so that a bf16 model is held to fp32's
rounding too. The constraint is not in it, and the filter is off.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from str_kernels.engine.contract import Backend
from str_kernels.huggingface.deferred import DeferredLogits
from str_kernels.huggingface.head import find_head, vocabulary_size
from str_kernels.huggingface.patch import Patch
from str_kernels.huggingface.untouched import is_elsewhere, same_draws, untouched
from str_kernels.options import LossOptions

_SEQUENCES, _LENGTH, _UNLABELLED = 2, 8, 2
_ROWS_AT_ONCE = 16384  # of the head, when its product is made in fp32
_LARGEST_GRADIENT = 2**22  # elements of a trained parameter of the head that is compared too
_ROUNDINGS = 8  # a logit is rounded so often at most: product, bias, scale, softcap, casts
_MASKED = 1e6  # a logit as large as this is a mask


@dataclass(frozen=True)
class Verification:
    """What the trial found.

    Attributes:
        skipped: why it could not be made; None: it was, and nothing differed.
        fused: whether the loss was computed without the logits.
        errors: the size of each difference, by what was compared: of the loss absolute, of
            gradients and logits relative to their norm.
    """

    skipped: str | None = None
    fused: bool = False
    errors: dict[str, float] = field(default_factory=dict)


@dataclass
class _Run:
    """One forward and what is compared of it."""

    loss: Tensor
    logits: Tensor | None
    gradients: dict[str, Tensor]
    step: float  # relative rounding of the operands that the head multiplied


def verify_patch(model: nn.Module, backend: str | Backend) -> Verification:
    """Run a few tokens through the model without and with a patch; neither leaves a trace.

    Args:
        model: a causal LM without a patch.
        backend: as in ``linear_cross_entropy``.

    Raises:
        ValueError: the patched model does not compute what the model computes.
    """
    reason = next(filter(None, map(is_elsewhere, model.parameters())), None)
    if reason is not None:
        return Verification(skipped=reason)
    states: list[Tensor] = []
    with untouched(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            inputs = _inputs(model)
            dense = _run(model, inputs, states)
        except Exception as error:  # what the model cannot do is no fault of the patch
            return Verification(skipped=f"{type(error).__name__}: {error}".splitlines()[0])
        if not dense.loss.isfinite():
            return Verification(skipped="its loss is not finite")
        with Patch(model, LossOptions(filter_eps=0.0), index=None, backend=backend) as probe:
            try:
                patched = _run(model, inputs, states)
            except Exception as error:
                raise ValueError(_refusal(model, f"{type(error).__name__}: {error}")) from error
    errors, faults = _compare(dense, patched, vocabulary_size(find_head(model)))
    if faults:
        raise ValueError(_refusal(model, "; ".join(faults)))
    return Verification(fused=probe.last_parts is not None, errors=errors)


def _refusal(model: nn.Module, what: str) -> str:
    return (
        f"model={type(model).__name__}: tried on {_SEQUENCES * _LENGTH} tokens, the patched model "
        f"does not compute what the model computes: {what}. The patch was taken off again; "
        "verify=False would keep it."
    )


def _inputs(model: nn.Module) -> dict[str, Any]:
    """Token ids, the same every time, none of them special; labels but for a short prompt."""
    embedding = _input_embedding(model)
    weight = getattr(embedding, "weight", None)
    words = vocabulary_size(find_head(model))
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


def _run(model: nn.Module, inputs: dict[str, Any], states: list[Tensor]) -> _Run:
    """One forward; the head meets ``states``, or if that is empty, what it meets is put there."""
    head = find_head(model)
    hook = head.register_forward_pre_hook(_meet(states), with_kwargs=True)
    try:
        with same_draws(model), _ProductsInFloat32(vocabulary_size(head)) as products:
            outputs = model(**inputs)
            loss, logits = _loss_and_logits(outputs)
            gradients = _gradients(loss, head, states)
            if isinstance(logits, DeferredLogits):
                logits = logits.materialise()
    finally:
        hook.remove()
    logits = None if logits is None else logits.detach()
    return _Run(loss.detach(), logits, gradients, products.step)


def _loss_and_logits(outputs: Any) -> tuple[Tensor, Tensor | None]:
    if isinstance(outputs, tuple):
        loss, logits = outputs[0], outputs[1] if len(outputs) > 1 else None
    else:
        loss, logits = getattr(outputs, "loss", None), getattr(outputs, "logits", None)
    if not isinstance(loss, Tensor) or loss.dim():
        raise ValueError("its forward returns no loss")
    return loss, logits if isinstance(logits, Tensor) else None


def _meet(states: list[Tensor]) -> Callable:
    """A hook of the head that cuts its input off the body and keeps it, or gives what was kept."""
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
    """Gradients of what the head met and of its small trained parameters, by name."""
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


def _compare(dense: _Run, patched: _Run, words: int) -> tuple[dict[str, float], list[str]]:
    """The size of every difference, and a sentence for each that is more than rounding."""
    allowed = _ROUNDINGS * _rounding_of_logits(dense, patched)
    step = max(torch.finfo(x.dtype).eps for x in (dense.loss, patched.loss))
    loss = abs(dense.loss.double() - patched.loss.double()).item()
    errors, faults = {"loss": loss}, []
    # a plain sum over the vocabulary, as torch's is on some CPUs, wanders by √V roundings; it is
    # made in fp32 at least, whatever the loss is rounded to
    wandered = min(step, torch.finfo(torch.float32).eps) * words**0.5
    if not loss <= allowed + step * abs(dense.loss.item()) + wandered:
        faults.append(f"loss {patched.loss.item():.6g} instead of {dense.loss.item():.6g}")
    pairs = {name: (x, patched.gradients[name]) for name, x in dense.gradients.items()}
    if dense.logits is not None:
        pairs["logits"] = dense.logits, patched.logits
    for name, (want, got) in pairs.items():
        errors[name] = _relative_error(want, got)
        step = torch.finfo(want.dtype).eps
        if name != "logits":  # a gradient is rounded as the operands were
            step = max(step, dense.step)
        if not errors[name] <= allowed + _ROUNDINGS * step:
            faults.append(f"{name} off by {errors[name]:.2g} of its norm")
    return errors, faults


def _rounding_of_logits(dense: _Run, patched: _Run) -> float:
    """How far one rounding moves a logit, which is as far as it can move a probability."""
    logits = [run.logits for run in (dense, patched) if run.logits is not None]
    if not logits:
        return torch.finfo(torch.float32).eps
    size = logits[0].abs()
    size = torch.where(size < _MASKED, size, 0).max().item()
    return max(torch.finfo(x.dtype).eps for x in logits) * (1 + size)


def _relative_error(want: Tensor, got: Tensor | None) -> float:
    if got is None or got.shape != want.shape:
        return torch.inf
    want, got = want.double(), got.double()
    masked = (want == got) | (want.abs() >= _MASKED) & (got.abs() >= _MASKED)
    difference = torch.where(masked, 0, got - want).norm()
    return (difference / want.clamp(-_MASKED, _MASKED).norm().clamp(min=1e-30)).item()


class _ProductsInFloat32(TorchFunctionMode):
    """``F.linear`` with the vocabulary's rows is made in fp32, part by part, nothing kept."""

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
