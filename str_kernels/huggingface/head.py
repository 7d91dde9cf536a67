"""The head of a causal language model: find it, refuse what cannot be fused, make it defer.

Stage: ``head(hidden_states)`` → ``F.linear`` with V rows → `DeferredLogits`.

The head's own ``forward`` runs, whatever wraps it (PEFT, hooks, a norm); only the product with the
vocabulary inside it is put off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from str_kernels.huggingface.deferred import HeadCall, LossOwner, defer_linear
from str_kernels.huggingface.instance import inner_forward, install_forward
from str_kernels.validation import validate_weight

_deferring: ContextVar[LossOwner | None] = ContextVar("str_kernels_deferring", default=None)


@contextmanager
def deferring(owner: LossOwner | None) -> Iterator[None]:
    """Patched heads defer their logits to ``owner`` in this block; None: they do not defer."""
    token = _deferring.set(owner)
    try:
        yield
    finally:
        _deferring.reset(token)


def find_head(model: nn.Module) -> nn.Module:
    """The output embedding of ``model``, as it is now.

    Raises:
        ValueError: the model has none, or one whose weight cannot be fused.
    """
    finder = getattr(model, "get_output_embeddings", None)
    head = finder() if finder is not None else None
    if head is None:
        raise ValueError(
            f"model={type(model).__name__}: has no output head (get_output_embeddings() gave "
            "None); patch a causal language model, such as AutoModelForCausalLM gives."
        )
    _refuse_head(head)
    return head


def defer_head(head: nn.Module) -> None:
    """Let this head defer its logits wherever ``deferring`` says so."""
    install_forward(head, _head_forward)


def vocabulary_size(head: nn.Module) -> int:
    """How many rows the head has: what counts as the vocabulary, whatever the config says."""
    weight = getattr(head, "weight", None)
    if weight is not None:
        return weight.shape[0]
    return max(p.shape[0] for p in head.parameters() if p.dim() == 2)


def _refuse_head(head: nn.Module) -> None:
    if not any(p.dim() == 2 and p.is_floating_point() for p in head.parameters()):
        raise ValueError(
            f"model: its head, a {type(head).__module__}.{type(head).__qualname__}, has no weight "
            "[V, D] of floating point; keep the head unquantised."
        )
    for name, parameter in head.named_parameters():
        if parameter.dim() == 2 or parameter.numel() == 0 or not parameter.is_floating_point():
            validate_weight(parameter, f"the head's {name}")
            _refuse_subclass(parameter, f"the head's {name}")


def _refuse_subclass(weight: Tensor, name: str) -> None:
    if type(weight) not in (Tensor, nn.Parameter):
        raise ValueError(
            f"{name} is a {type(weight).__name__}: the fused loss needs a plain tensor; keep the "
            "head unquantised and unsharded."
        )


def _head_forward(head: nn.Module, *args: Any, **kwargs: Any) -> Any:
    owner, inner = _deferring.get(), inner_forward(head)
    if owner is None:
        return inner(*args, **kwargs)
    states = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
    with _DeferLinear(vocabulary_size(head), states.shape[:-1], owner):
        return inner(*args, **kwargs)


class _DeferLinear(TorchFunctionMode):
    """While the head runs, its product with the vocabulary becomes a deferred tensor."""

    def __init__(self, words: int, rows: torch.Size, owner: LossOwner) -> None:
        super().__init__()
        self._words, self._rows, self._call = words, rows, HeadCall(owner)

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.linear:
            return func(*args, **kwargs)
        hidden_states, weight, bias = _linear_arguments(*args, **kwargs)
        # a product of other rows is not the logits: DoRA multiplies its factors so
        of_all_rows = weight.shape[0] == self._words and hidden_states.shape[:-1] == self._rows
        if not of_all_rows or type(hidden_states) is not Tensor:
            return func(*args, **kwargs)
        validate_weight(weight, "the head's weight")
        _refuse_subclass(weight, "the head's weight")
        return defer_linear(hidden_states, weight, bias, self._call)


def _linear_arguments(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple:
    return input, weight, bias
