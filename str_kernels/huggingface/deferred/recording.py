"""What happens to logits between the head and the loss, recorded instead of computed.

Stage: `Fold` ──an operation of the model──▶ `Fold`.

``RECORDED`` maps a torch function to the way in which it changes a fold: factors and tanh become a
scale and a softcap, row operations act on the hidden states (and on the row numbers, so that a row
can be found again in the batch), slices of the vocabulary act on the weight. A function that is not
in the table, or whose handler returns None, needs the real logits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves

from str_kernels.huggingface.deferred.fold import Fold
from str_kernels.huggingface.deferred.parallel import refuse_part

# Every handler: (fold, function, positional arguments, keyword arguments) → Fold, or None for "no".
# Deferred tensors among the arguments have been replaced by their folds.
Handler = Callable[[Fold, Callable, tuple, dict], "Fold | None"]


def _cast(fold: Fold, function: Callable, args: tuple, kwargs: dict) -> Fold | None:
    plain = (torch.dtype, torch.device, torch.memory_format, str, bool, Tensor, type(None))
    if not all(isinstance(value, plain) for value in (*args[1:], *kwargs.values())):
        return None
    # what the call does to dtype and device, seen on an empty tensor
    probe = function(torch.empty(0, dtype=fold.dtype, device=fold.device), *args[1:], **kwargs)
    if not isinstance(probe, Tensor) or probe.device != fold.device:
        return None
    return replace(fold, dtype=probe.dtype) if probe.dtype.is_floating_point else None


def _detach(fold: Fold, function: Callable, args: tuple, kwargs: dict) -> Fold:
    bias = None if fold.bias is None else fold.bias.detach()
    return replace(
        fold, hidden_states=fold.hidden_states.detach(), weight=fold.weight.detach(), bias=bias
    )


def _multiply(fold: Fold, function: Callable, args: tuple, kwargs: dict) -> Fold | None:
    if kwargs or len(args) != 2:
        return None
    return _times(fold, args[1] if args[0] is fold else args[0], divide=False)


def _divide(fold: Fold, function: Callable, args: tuple, kwargs: dict) -> Fold | None:
    if kwargs or len(args) != 2 or args[0] is not fold:
        return None
    return _times(fold, args[1], divide=True)


def _times(fold: Fold, other: Any, *, divide: bool) -> Fold | None:
    if isinstance(other, Real) and other != 0:
        factor = 1 / other if divide else other
        cap = None if fold.softcap is None else fold.softcap * factor
        if cap is not None and cap <= 0:
            return None
        return replace(fold, logit_scale=fold.logit_scale * factor, softcap=cap)
    if not isinstance(other, Tensor) or fold.softcap is not None or other.dim() > len(fold.shape):
        return None
    factor = 1 / other if divide else other
    bias = fold.bias
    probe = torch.empty((1,) * len(fold.shape), dtype=fold.dtype)
    dtype = torch.result_type(probe, other)
    if other.numel() == 1:  # perhaps learned: its gradient goes through the hidden states
        factor = factor.reshape(())
        bias = None if bias is None else bias * factor
        return replace(fold, hidden_states=fold.hidden_states * factor, bias=bias, dtype=dtype)
    if other.shape[-1] == fold.words == other.numel():  # one factor a word, as in DoRA
        _refuse_words(fold, "a factor of each logit")
        factor = factor.reshape(-1)
        bias = None if bias is None else bias * factor
        return replace(fold, weight=fold.weight * factor[:, None], bias=bias, dtype=dtype)
    return None


def _tanh(fold: Fold, function: Callable, args: tuple, kwargs: dict) -> Fold | None:
    return replace(fold, softcap=1.0) if fold.softcap is None else None


def _add(fold: Fold, function: Callable, args: tuple, kwargs: dict) -> Fold | None:
    if kwargs or len(args) != 2 or fold.softcap is not None:
        return None
    other = args[1] if args[0] is fold else args[0]
    if isinstance(other, Fold):
        return _concatenate(fold, other)
    if not isinstance(other, Tensor) or other.dim() == 0 or other.dim() > len(fold.shape):
        return None
    if other.numel() != fold.words or other.shape[-1] != other.numel():
        return None
    _refuse_words(fold, "an addend of each logit")
    added = other.reshape(-1) / fold.logit_scale  # a bias that the model adds itself
    dtype = torch.promote_types(fold.dtype, other.dtype)
    return replace(fold, bias=added if fold.bias is None else fold.bias + added, dtype=dtype)


def _concatenate(fold: Fold, other: Fold) -> Fold | None:
    """LoRA on the head: the sum of two products is one product of longer rows."""
    if other is fold or other.softcap is not None or other.log_softmax or other.words_second:
        return None
    if other.shape != fold.shape or other.device != fold.device:
        return None
    _refuse_words(fold, "a sum of two products with the vocabulary")
    dtype = torch.promote_types(fold.dtype, other.dtype)
    states = [x.hidden_states.to(dtype) * x.logit_scale for x in (fold, other)]
    weights = [x.weight.to(fold.weight.dtype) for x in (fold, other)]
    biases = [x.bias * x.logit_scale for x in (fold, other) if x.bias is not None]
    return replace(
        fold,
        hidden_states=torch.cat(states, -1),
        weight=torch.cat(weights, 1),
        bias=sum(biases) if biases else None,
        logit_scale=1.0,
        dtype=dtype,
    )


def _index(fold: Fold, function: Callable, args: tuple, kwargs: dict) -> Fold | None:
    index = args[1] if isinstance(args[1], tuple) else (args[1],)
    if any(isinstance(i, list | bool | Fold) for i in index):
        return None
    used = sum(_dims_used(i) for i in index)
    last = index[-1] if index else ...
    if last is ... or not (used == len(fold.shape) or any(i is ... for i in index)):
        return fold.with_rows(lambda x: x[index])
    if not isinstance(last, slice) or last.step not in (None, 1):  # the last index selects words
        return None
    rows = (*index[:-1], slice(None))
    if last != slice(None):
        _refuse_words(fold, "a slice of the vocabulary")
        bias = None if fold.bias is None else fold.bias[last]
        fold = replace(fold, weight=fold.weight[last], bias=bias)
    return fold.with_rows(lambda x: x[rows])


def _refuse_words(fold: Fold, what: str) -> None:
    if fold.shard is not None:
        refuse_part(what)


def _dims_used(index: Any) -> int:
    if isinstance(index, Tensor) and index.dtype == torch.bool:
        return index.dim()
    return int(index is not None and index is not ...)


def _reshape(fold: Fold, function: Callable, args: tuple, kwargs: dict) -> Fold | None:
    size = args[1] if len(args) == 2 and isinstance(args[1], tuple | list) else args[1:]
    if kwargs or not size or not all(isinstance(n, int) for n in size):
        return None
    lead, rows, words = size[:-1], fold.rows.numel(), fold.words
    if size[-1] == words or (
        size[-1] == -1 and -1 not in lead and torch.Size(lead).numel() == rows
    ):
        return fold.with_rows(lambda x: x.reshape(*lead, x.shape[-1]))
    return None


def _rows_only(fold: Fold, function: Callable, args: tuple, kwargs: dict) -> Fold | None:
    """``squeeze``, ``unsqueeze``, ``flatten`` of dimensions that are not the words'."""
    dims = [*args[1:], *kwargs.values()]
    top = len(fold.shape) + (function in _UNSQUEEZE)
    if not dims or not all(isinstance(n, int) for n in dims):
        return None
    if any(n % top == top - 1 for n in dims) or (function in _FLATTEN and len(dims) < 2):
        return None
    return fold.with_rows(lambda x: function(x, *args[1:], **kwargs))


def _transpose(fold: Fold, function: Callable, args: tuple, kwargs: dict) -> Fold | None:
    dims = args[1] if len(args) == 2 and isinstance(args[1], tuple | list) else args[1:]
    if kwargs or not all(isinstance(n, int) for n in dims):
        return None
    top = len(fold.shape)
    dims = tuple(n % top for n in dims)
    if len(dims) == 2 and top - 1 not in dims:
        return fold.with_rows(lambda x: x.transpose(*dims))
    if top == 3 and dims in ((1, 2), (2, 1), (0, 2, 1)):
        return replace(fold, words_second=True)
    return None


def _log_softmax(fold: Fold, function: Callable, args: tuple, kwargs: dict) -> Fold | None:
    dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
    if dim not in (-1, len(fold.shape) - 1) or len(args) > 2:
        return None
    return replace(fold, log_softmax=True, dtype=kwargs.get("dtype") or fold.dtype)


_UNSQUEEZE = {Tensor.unsqueeze, torch.unsqueeze}
_FLATTEN = {Tensor.flatten, torch.flatten}
_ARITHMETIC = {_multiply, _divide, _tanh, _add, _log_softmax}

_FUNCTIONS: dict[Handler, tuple[Callable, ...]] = {
    _cast: (
        *(Tensor.float, Tensor.half, Tensor.bfloat16, Tensor.double, Tensor.to, Tensor.type),
        *(Tensor.contiguous, Tensor.clone, Tensor.type_as, torch.clone),
    ),
    _detach: (Tensor.detach, torch.detach),
    _multiply: (
        *(Tensor.mul, Tensor.__mul__, Tensor.__rmul__, Tensor.multiply),
        *(torch.mul, torch.multiply),
    ),
    _divide: (
        *(Tensor.div, Tensor.__truediv__, Tensor.true_divide, Tensor.divide),
        *(torch.div, torch.true_divide, torch.divide),
    ),
    _tanh: (Tensor.tanh, torch.tanh, F.tanh),
    _add: (Tensor.add, Tensor.__add__, Tensor.__radd__, torch.add),
    _index: (Tensor.__getitem__,),
    _reshape: (Tensor.view, Tensor.reshape, torch.reshape),
    _rows_only: (Tensor.squeeze, torch.squeeze, *_UNSQUEEZE, *_FLATTEN),
    _transpose: (
        *(Tensor.transpose, Tensor.permute, Tensor.swapaxes),
        *(torch.transpose, torch.permute),
    ),
    _log_softmax: (F.log_softmax, torch.log_softmax, Tensor.log_softmax),
}
RECORDED: dict[Callable, Handler] = {
    function: handler for handler, functions in _FUNCTIONS.items() for function in functions
}


def extend(fold: Fold, function: Callable, args: tuple, kwargs: dict) -> Fold | None:
    """The fold after ``function``, or None where it needs the real logits."""
    handler = RECORDED.get(function)
    if handler is None or fold.words_second or (fold.log_softmax and handler in _ARITHMETIC):
        return None
    return handler(fold, function, args, kwargs)


def values_read(function: Callable, args: tuple, kwargs: dict) -> list[Tensor]:
    """The plain tensors among the arguments whose values a recorded function reads."""
    if RECORDED[function] is _cast:  # of another tensor it takes the dtype alone
        return []
    leaves = tree_leaves((args, kwargs))
    return [x for x in leaves if type(x) in (Tensor, torch.nn.Parameter)]
