"""`DeferredLogits`: the tensor that a patched head returns, computed when it is first read.

Stage: `Fold` → `DeferredLogits [..., V]` → the fused loss, or real logits for whoever reads them.

An operation that `recording` knows makes another deferred tensor; torch's cross-entropy of one is
the fused loss; everything else computes the logits, by the very calls of the model in the same
order, and goes on with those. What is not known is slower, never wrong.

These rules keep it so:

- the values are computed under the grad mode and autocast of their forward, and never after the
  weights have changed: an optimizer step in between is an error;
- an in-place write first computes every tensor of the same head call, because views must see the
  write and copies must not;
- a gradient of the logits (hook, ``retain_grad``) must be asked for before the loss, which then
  uses the real logits; after a fused loss, which has no such gradient, it is an error.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.utils._pytree import tree_leaves, tree_map_only

from str_kernels.engine.contract import Head
from str_kernels.huggingface.deferred.fold import GONE, Fold, Record, fold_linear
from str_kernels.huggingface.deferred.freshness import Freshness
from str_kernels.huggingface.deferred.head_call import HeadCall
from str_kernels.huggingface.deferred.holding import (
    backward_needs,
    backward_needs_not,
    before_backward,
    borrow,
    whole_head,
)
from str_kernels.huggingface.deferred.modes import Modes
from str_kernels.huggingface.deferred.parallel import gathered_logits, refuse_part
from str_kernels.huggingface.deferred.recording import extend, values_read
from str_kernels.huggingface.deferred.torch_functions import (
    GRADIENT_WATCHERS,
    LOSSES,
    METADATA,
    is_framework_hook,
    loss_arguments,
    name_of,
    writes,
)
from str_kernels.split import is_split, own_part


class DeferredLogits(Tensor):
    """Logits of a head, computed when first read; see the module's docstring."""

    _record: Record
    _call: HeadCall
    _modes: Modes
    _value: Tensor | None
    _hooks: list[Callable]

    @property
    def _fold(self) -> Fold:
        return self._record.fold

    @property
    def fold(self) -> Fold | None:
        """The record, or None after a write into the logits."""
        return None if self._call.written else self._fold

    @property
    def is_materialised(self) -> bool:
        """Whether the real logits exist."""
        return self._value is not None

    def materialise(self) -> Tensor:
        """The real logits with their graph; computed once.

        Raises:
            RuntimeError: the weights have changed since the forward.
        """
        if self._value is None:
            with self._modes.again():
                self._value = self._record.replay()
            _hook_all(self._value, self._hooks)
        return self._value

    @property
    def placements(self) -> tuple:
        """What torch's ``ColwiseParallel`` asks of the output of a split head: it is whole.

        Raises:
            AttributeError: the head is not split, and its logits are no ``DTensor``.
        """
        if self._fold.shard is None:
            raise AttributeError("placements: these logits are no DTensor")
        return ()

    def redistribute(self, *_: Any, **__: Any) -> DeferredLogits:
        """Stay as they are: what they become is whole in every process."""
        return self

    def to_local(self, **_: Any) -> DeferredLogits:
        """Stay as they are."""
        return self

    def __repr__(self, **_: Any) -> str:
        state = "materialised" if self.is_materialised else "pending"
        return f"DeferredLogits({list(self.shape)}, {self.dtype}, {state})"

    def __deepcopy__(self, memo: dict) -> Tensor:
        return self.materialise().__deepcopy__(memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.materialise().detach().__reduce_ex__(protocol)

    __hash__ = object.__hash__

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Answer from the record where that is possible, else from the real logits."""
        kwargs = kwargs or {}
        if func in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        logits = _first_deferred(args, kwargs)
        if logits is not None and not logits._call.written:
            if func in LOSSES:
                loss = _fused_loss(logits, func, args, kwargs)
                if loss is not None:
                    return loss
            folds = tree_map_only(DeferredLogits, _fold_of, (args, kwargs))
            fold = extend(logits._fold, func, *folds)
            if fold is not None:
                replay = _replay_of(func, args, kwargs)
                return _record(fold, replay, logits._call)
        return _with_real_logits(logits, func, args, kwargs)

    @classmethod
    def __torch_dispatch__(
        cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Code below torch functions sees the values alone; autograd has the node's graph."""
        args, kwargs = tree_map_only(
            DeferredLogits, lambda x: x.materialise().detach(), (args, kwargs or {})
        )
        return func(*args, **kwargs)


def defer_linear(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    call: HeadCall,
    *,
    lent: bool = False,
) -> DeferredLogits:
    """``F.linear(...)`` put off: ``[..., D]``, ``[V, D]``, ``[V]`` → deferred ``[..., V]``."""
    head, shard = Head(hidden_states, weight, bias), None
    if is_split(weight):
        head, shard = own_part(head)
        head = Head(head.hidden_states, *map(_as_parameter, head[1:]))
    fresh = Freshness(*head)
    call.fresh.append(fresh)

    def replay() -> Tensor:
        if shard is not None:
            return _of_all_processes(call, fresh, hidden_states, weight, bias)
        # after the forward one process may read its logits alone, which must not wait for others
        held = whole_head(call.head, weight) if call.inside else nullcontext()
        if torch.is_grad_enabled():
            backward_needs(call.head)
        with held:
            fresh.require()
            return before_backward(call.head, F.linear(hidden_states, weight, bias))

    return _record(fold_linear(head, shard, lent=lent), replay, call)


def _as_parameter(values: Tensor | None) -> Tensor | None:
    """A part of a frozen parameter is one too, which nobody computes anew."""
    return values if values is None or values.requires_grad else borrow(values)


def _of_all_processes(call: HeadCall, fresh: Freshness, *operands: Tensor | None) -> Tensor:
    """Real logits of a head that several processes share; each of them has to come here.

    Raises:
        RuntimeError: the forward has ended, so that one may come here alone.
    """
    if not call.inside:
        raise RuntimeError(
            "These logits were never computed, and tensor parallelism has split their head: read "
            "them in a forward without labels, where every process computes its part."
        )
    fresh.require()
    return gathered_logits(*operands)


class _GraphNode(Function):
    """A ``grad_fn`` for the wrapper, for code that runs below torch functions."""

    @staticmethod
    def forward(
        ctx: Any, hidden_states: Tensor, weight: Tensor, bias: Tensor | None, make: Callable
    ) -> DeferredLogits:
        logits = make()
        ctx.record, ctx.call = logits._record, logits._call
        if logits._fold.lent is not None:
            weight = None  # the record has it, until it lets go
        ctx.save_for_backward(hidden_states, weight, bias)
        return logits

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "The logits of a patched model, used below torch functions, are differentiable "
                "once: create_graph=True asks for a second derivative; read them by a torch "
                "function first (outputs.logits.clone()), or unpatch the model for it."
            )
        if ctx.call.written:
            raise RuntimeError("logits were written in place and then used below torch functions")
        if isinstance(grad, DeferredLogits):
            grad = grad.materialise()
        if ctx.call.gone:
            raise RuntimeError(GONE)
        if ctx.record.fold.shard is not None:
            refuse_part("logits that were used below torch functions")
        (hidden_states, weight, bias), needs = ctx.saved_tensors, ctx.needs_input_grad
        operands = (hidden_states, ctx.record.fold.weight if weight is None else weight, bias)
        with torch.enable_grad():
            leaves = [
                None if x is None else x.detach().requires_grad_(need)
                for x, need in zip(operands, needs, strict=False)
            ]
            logits = ctx.record.fold.compute(*leaves).to(grad.dtype)
            wanted = [x for x in leaves if x is not None and x.requires_grad]
            found = iter(torch.autograd.grad(logits, wanted, grad))
        gradients = (None if x is None or not x.requires_grad else next(found) for x in leaves)
        return (*gradients, None)


def _record(fold: Fold, replay: Callable[[], Tensor], call: HeadCall) -> DeferredLogits:
    modes, record = Modes.now(fold.device.type), Record(fold, replay)
    call.records.append(weakref.ref(record))

    def make() -> DeferredLogits:
        logits = Tensor._make_wrapper_subclass(
            DeferredLogits, fold.shape, dtype=fold.dtype, device=fold.device
        )
        logits._record, logits._call = record, call
        logits._modes, logits._value, logits._hooks = modes, None, []
        call.members.append(weakref.ref(logits))
        return logits

    differentiable = any(x is not None and x.requires_grad for x in fold.operands)
    if modes.grad and differentiable and not fold.words_second:
        return _GraphNode.apply(*fold.operands, make)
    return make()


def _replay_of(func: Callable, args: tuple, kwargs: dict) -> Callable[[], Tensor]:
    fresh = Freshness(*values_read(func, args, kwargs), steps=False)

    def replay() -> Tensor:
        fresh.require()
        real_args, real_kwargs = _real(args, kwargs)
        return func(*real_args, **real_kwargs)

    return replay


def _real(args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    return tree_map_only(DeferredLogits, DeferredLogits.materialise, (args, kwargs))


def _fold_of(logits: DeferredLogits) -> Fold | Tensor:
    return logits.materialise() if logits._call.written else logits._fold


def _first_deferred(args: tuple, kwargs: dict) -> DeferredLogits | None:
    found = (x for x in (*args, *kwargs.values()) if isinstance(x, DeferredLogits))
    return next(found, None)


def _fused_loss(logits: DeferredLogits, func: Callable, args: tuple, kwargs: dict) -> Tensor | None:
    """``F.cross_entropy`` or ``F.nll_loss`` without the logits, or None where it needs them."""
    fold, call = logits._fold, logits._call
    given = loss_arguments(args, kwargs)
    target = given.get("target")
    if call.owner is None or call.watched or given.get("input") is not logits:
        return None
    if any(given.get(name) is not None for name in ("weight", "size_average", "reduce")):
        return None
    if (func is F.nll_loss) != fold.log_softmax or not (fold.words_second or len(fold.shape) == 2):
        return None
    if not isinstance(target, Tensor) or isinstance(target, DeferredLogits):
        return None
    if target.is_floating_point() or target.shape != fold.hidden_states.shape[:-1]:
        return None
    if call.gone:
        raise RuntimeError(GONE)
    call.fused = True
    with whole_head(call.head, fold.weight), logits._modes.autocast_again():
        for fresh in call.fresh:
            fresh.require(values=not call.owner.running)
        loss = call.owner.cross_entropy(
            fold,
            target,
            ignore_index=given.get("ignore_index", -100),
            reduction=given.get("reduction", "mean"),
            label_smoothing=given.get("label_smoothing", 0.0),
        )
    if torch.is_grad_enabled():
        backward_needs_not(call.head)
    # the logits have no gradient, so their hooks would never be called
    return _hook_all(before_backward(call.head, loss.to(fold.dtype)), call.hooks)


def _hook_all(tensor: Tensor, hooks: list[Callable]) -> Tensor:
    if tensor.requires_grad:
        for hook in hooks:
            tensor.register_hook(hook)
    return tensor


def _with_real_logits(
    logits: DeferredLogits | None, func: Callable, args: tuple, kwargs: dict
) -> Any:
    """Run ``func`` on the values, after applying the rules of writes and gradients."""
    name = name_of(func)
    if logits is None:  # inside a list, as torch.cat has them
        logits = next(x for x in tree_leaves((args, kwargs)) if isinstance(x, DeferredLogits))
    call = logits._call
    if is_framework_hook(func, args):
        call.hooks.append(args[1])
        logits._hooks.append(args[1])
        if logits.is_materialised:
            _hook_all(logits.materialise(), args[1:2])
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)
    if func in GRADIENT_WATCHERS:
        if call.fused:
            raise RuntimeError(
                f"{name}: the fused loss of a patched model does not pass through its logits, so "
                "they have no gradient; unpatch the model, or watch the hidden states."
            )
        call.watched = True
    if call.owner is not None and not logits.is_materialised:
        call.owner.logits_read(name, logits.numel() * logits.dtype.itemsize)
    if writes(func, kwargs):
        call.materialise_all()
        call.written = True
    real_args, real_kwargs = _real(args, kwargs)
    return func(*real_args, **real_kwargs)
