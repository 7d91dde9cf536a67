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

from str_kernels.huggingface.deferred.forward import (
    PATCH,
    inner_forward,
    install_forward,
    installed_function,
    is_installed,
    remove_forward,
)
from str_kernels.huggingface.deferred.head_call import HeadCall, LossOwner
from str_kernels.huggingface.deferred.holding import (
    backward_needs,
    borrow,
    hold,
    holding,
    is_freed,
    is_lent,
)
from str_kernels.huggingface.deferred.parallel import (
    is_parallel,
    past_framework,
    plain_states,
    require_parallel,
)
from str_kernels.huggingface.deferred.sharding import (
    is_gathered_later,
    is_of_zero3,
    is_sharded,
    row_count,
)
from str_kernels.huggingface.deferred.tensor import DeferredLogits, defer_linear
from str_kernels.split import is_split
from str_kernels.validation import validate_weight

_LINEAR = torch._C._nn.linear  # F.linear, which DeepSpeed may have replaced
_deferring: ContextVar[LossOwner | None] = ContextVar("str_kernels_deferring", default=None)


@contextmanager
def deferring(owner: LossOwner | None) -> Iterator[None]:
    """In this block the heads that `defer_head` prepared defer to ``owner``; None: they compute."""
    token = _deferring.set(owner)
    try:
        with holding():
            yield
    finally:
        _deferring.reset(token)


def causal_lm(model: nn.Module) -> nn.Module:
    """The transformers model inside ``torch.compile`` and PEFT's wrapper, or the model itself.

    Raises:
        ValueError: not a transformers model, or wrapped for several devices already.
    """
    if isinstance(model, nn.DataParallel):
        raise ValueError(
            "model=DataParallel: is not supported; start one process a GPU (torchrun, accelerate "
            "launch), and patch the model before it is wrapped."
        )
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ValueError(f"model={type(model).__name__}: patch the model before it is wrapped.")
    inner = _unwrapped(model)
    if not isinstance(inner, nn.Module) or not hasattr(inner, "get_output_embeddings"):
        raise ValueError(
            f"model is a {type(inner).__name__}: must be a transformers causal language model."
        )
    return inner


def find_patch(model: Any) -> Any:
    """The `Patch` that this model carries, inside PEFT's wrapper or not; None: it carries none."""
    return getattr(_unwrapped(model), "__dict__", {}).get(PATCH)


def _unwrapped(model: Any) -> Any:
    """The model inside ``torch.compile`` and PEFT's wrapper, which pass on its attributes."""
    model = getattr(model, "_orig_mod", model)
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return getattr(inner, "_orig_mod", inner)


def find_head(model: nn.Module) -> nn.Module:
    """The present output embedding of a model that `causal_lm` gave.

    Raises:
        ValueError: the model has none, or one whose weight cannot be fused.
    """
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(
            f"model={type(model).__name__}: has no output head (get_output_embeddings() gave "
            "None); patch a causal language model, such as AutoModelForCausalLM gives."
        )
    _refuse_head(head)
    return head


def defer_head(head: nn.Module) -> None:
    """Let this head defer its logits inside ``deferring``."""
    install_forward(head, _head_forward)


def undefer_heads(model: nn.Module) -> None:
    """Undo `defer_head` for every head of a model."""
    for module in model.modules():
        if installed_function(module) is _head_forward:
            remove_forward(module)


@contextmanager
def deferrable_head(head: nn.Module) -> Iterator[None]:
    """`defer_head` for this block, unless it is in force already."""
    before = is_installed(head)
    defer_head(head)
    try:
        yield
    finally:
        if not before:
            remove_forward(head)


def vocabulary_size(head: nn.Module) -> int:
    """How many rows the head has: this counts as the vocabulary, whatever the config says."""
    return row_count(head)


def validate_tokens(token_ids: tuple[int, ...], head: nn.Module) -> None:
    """Every safety token must be a row of the head.

    Raises:
        ValueError: names the largest id.
    """
    largest, rows = max(token_ids), vocabulary_size(head)
    if largest >= rows:
        raise ValueError(
            f"safety.token_ids holds {largest}: the model's head has {rows} rows, 0 to "
            f"{rows - 1}; were the tokens identified with another tokenizer?"
        )


def _refuse_head(head: nn.Module) -> None:
    if is_gathered_later(head):
        return
    if not any(p.dim() == 2 and p.is_floating_point() for p in head.parameters()):
        raise ValueError(
            f"model: its head, a {type(head).__module__}.{type(head).__qualname__}, has no weight "
            "[V, D] of floating point; keep the head unquantised (for bitsandbytes: "
            "llm_int8_skip_modules=['lm_head'])."
        )
    for name, parameter in head.named_parameters():
        if parameter.dim() == 2 or parameter.numel() == 0 or not parameter.is_floating_point():
            _refuse_weight(parameter, f"the head's {name}")


def _refuse_weight(weight: Tensor, name: str) -> None:
    if is_sharded(weight) and (not is_of_zero3(weight) or is_freed(weight)):
        raise ValueError(
            f"{name} is a {type(weight).__name__} in its product, split over processes (tensor "
            "parallelism?), which is not supported: leave lm_head out of the plan, or use DDP or "
            "FSDP2."
        )
    validate_weight(weight, name)
    if type(weight) not in (Tensor, nn.Parameter):
        raise ValueError(
            f"{name} is a {type(weight).__name__}: the fused loss needs a plain tensor; keep the "
            "head unquantised and unsharded."
        )


def _head_forward(head: nn.Module, *args: Any, **kwargs: Any) -> Any:
    owner, inner = _deferring.get(), inner_forward(head)
    if owner is None:
        if torch.is_grad_enabled():
            backward_needs(head)
        return inner(*args, **kwargs)
    if is_parallel(head):
        require_parallel(head)
        inner, (args, kwargs) = past_framework(inner), plain_states((args, kwargs))
    states = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
    call, block = HeadCall(owner, head), hold(head, DeferredLogits)
    if block is not None:
        block.callback(call.let_go)
    with _own_linear(), _DeferLinear(vocabulary_size(head), states.shape[:-1], call):
        return inner(*args, **kwargs)


@contextmanager
def _own_linear() -> Iterator[None]:
    """The head meets torch's own ``F.linear``: ZeRO-3's replacement is no torch function."""
    replaced = F.linear
    if (getattr(replaced, "__module__", None) or "").startswith("deepspeed."):
        F.linear = _LINEAR
    try:
        yield
    finally:
        F.linear = replaced


class _DeferLinear(TorchFunctionMode):
    """While the head runs, its product with the vocabulary becomes a deferred tensor."""

    def __init__(self, words: int, rows: torch.Size, call: HeadCall) -> None:
        super().__init__()
        self._words, self._rows, self._call = words, rows, call

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not _LINEAR:
            return func(*args, **kwargs)
        hidden_states, weight, bias = _linear_arguments(*args, **kwargs)
        # a product with other rows is not the logits: DoRA multiplies its factors so
        of_all_rows = weight.shape[0] == self._words and hidden_states.shape[:-1] == self._rows
        if not of_all_rows or type(hidden_states) is not Tensor:
            return func(*args, **kwargs)
        if not is_split(weight):
            _refuse_weight(weight, "the head's weight")
        lent = is_lent(self._call.head, weight)
        if lent:
            weight, bias = borrow(weight), borrow(bias)
        return defer_linear(hidden_states, weight, bias, self._call, lent=lent)


def _linear_arguments(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple:
    return input, weight, bias
