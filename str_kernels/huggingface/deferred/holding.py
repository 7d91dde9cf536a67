"""Holding a head whole that a framework makes whole for one call of it.

Stage: a head that FSDP2, ZeRO-3 or accelerate has gathered for its product → the same weight, whole
until the forward with its loss has ended; a frozen one is gone before backward.

- FSDP2 frees a weight's storage and fills it again: it is told not to, until the block ends.
- ZeRO-3 and accelerate replace a frozen weight by an empty one: theirs is borrowed, and every
  record of the call lets go of it when the block ends.
- ZeRO-3's parameter itself is needed where it is trained, and is gathered again for the loss.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn

from str_kernels.huggingface.deferred.sharding import is_fsdp2, is_of_zero3, is_offloaded


class Block(ExitStack):
    """What ends with a forward; ``zero3`` ends before, when its parameters are gathered anew."""

    def __init__(self) -> None:
        super().__init__()
        self.zero3: ExitStack = self.enter_context(ExitStack())


_block: ContextVar[Block | None] = ContextVar("str_kernels_holding", default=None)
_multiplied: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # heads with real logits in a graph


@contextmanager
def holding() -> Iterator[None]:
    """Heads that are called in this block stay whole until it ends."""
    with Block() as block:
        token = _block.set(block)
        try:
            yield
        finally:
            _block.reset(token)


def hold(head: nn.Module, deferred: type) -> Block | None:
    """Keep the head, which a framework has gathered for this call, whole; return the block.

    ``deferred`` is the class of tensors that DeepSpeed's own function of autograd must not meet.
    """
    block = _block.get()
    if block is None:
        return None
    for owner in _owners(head):
        _keep_gathered(owner, block)
    for module in filter(_has_backward_hook, head.modules()):
        if not isinstance(module.pre_bwd_fn, _PastDeferred):
            block.callback(setattr, module, "pre_bwd_fn", module.pre_bwd_fn)
            module.pre_bwd_fn = _PastDeferred(module.pre_bwd_fn, deferred)
    if any(is_of_zero3(p) and p.requires_grad for p in head.parameters()):
        # ours runs after DeepSpeed's hook, which frees the parameters
        handle = head.register_forward_hook(lambda *_: gathered(head, block))
        block.callback(handle.remove)
    return block


@contextmanager
def whole_head(head: nn.Module | None, weight: Tensor) -> Iterator[None]:
    """The weight that ``head`` was called with is whole in this block.

    One that was freed after the head's call is gathered, so every process has to come here; it is
    freed again with the block of `holding`, or with this one.

    Raises:
        ValueError: the weight was freed, and cannot be gathered here.
    """
    with Block() as alone:
        if is_freed(weight):
            gathered(head, _block.get() or alone)
        if is_freed(weight):
            raise ValueError(
                "the head's weight was freed between the head and the loss: compute the loss in "
                "the model's forward (give it labels), or let FSDP keep the head whole "
                "(reshard_after_forward=False)."
            )
        yield


def gathered(head: nn.Module | None, block: Block) -> None:
    """Gather what the framework has freed of the head, until the block ends."""
    if head is None:
        return
    of_zero3 = [p for p in head.parameters() if is_of_zero3(p)]
    if any(map(is_freed, of_zero3)):
        block.zero3.close()  # DeepSpeed allows no second one of the same parameter
        missing = [p for p in of_zero3 if is_freed(p)]
        block.zero3.enter_context(sys.modules["deepspeed"].zero.GatheredParameters(missing))
    for owner in _owners(head):
        owner.unshard()
        block.callback(owner.reshard)


def is_freed(tensor: Tensor) -> bool:
    """Whether a framework has taken the values away, as FSDP and ZeRO-3 do between two uses."""
    if is_of_zero3(tensor):
        return tensor.ds_status.name == "NOT_AVAILABLE"
    return tensor.numel() > 0 and not tensor.is_meta and tensor.untyped_storage().size() == 0


def is_lent(head: nn.Module, weight: Tensor) -> bool:
    """Whether the weight of this product is replaced by an empty one after it."""
    return not weight.requires_grad and (is_of_zero3(weight) or is_offloaded(head))


def borrow(tensor: Tensor | None) -> Tensor | None:
    """The present values of a parameter, which outlive their owner's use of them."""
    return None if tensor is None else nn.Parameter(tensor.data, requires_grad=False)


def backward_needs(head: nn.Module | None) -> None:
    """From now on FSDP2 gathers the head for backward: real logits were made with gradients."""
    for owner in () if head is None else _owners(head):
        _multiplied.add(owner)
        owner.set_unshard_in_backward(True)


def backward_needs_not(head: nn.Module | None) -> None:
    """A fused loss of a frozen head was made: FSDP2 need not gather a group that is the head alone.

    It goes on doing so where some logits of the head were real, since both may share a backward.
    """
    if head is None or any(p.requires_grad for p in head.parameters()):
        return
    for owner in _owners(head):
        if owner not in _multiplied and len(_state(owner)._modules) == 1:
            owner.set_unshard_in_backward(False)


def gather_again(head: nn.Module) -> None:
    """Undo `backward_needs_not`: the head is no longer fused."""
    for owner in _owners(head):
        owner.set_unshard_in_backward(True)


def before_backward(head: nn.Module | None, loss: Tensor) -> Tensor:
    """Let DeepSpeed gather a trained head when the backward of ``loss`` begins."""
    if head is None or not loss.requires_grad:
        return loss
    for module in filter(_has_backward_hook, head.modules()):
        own = module.parameters(recurse=False)
        if isinstance(module.pre_bwd_fn, _PastDeferred) and any(p.requires_grad for p in own):
            loss = module.pre_bwd_fn.function.apply(loss)
    return loss


class _PastDeferred:
    """Stands in for DeepSpeed's function of a module's outputs, which it applies to real ones."""

    def __init__(self, function: Any, deferred: type) -> None:
        self.function, self._deferred = function, deferred

    def apply(self, output: Tensor) -> Tensor:
        return output if isinstance(output, self._deferred) else self.function.apply(output)


def _has_backward_hook(module: nn.Module) -> bool:
    return "pre_bwd_fn" in module.__dict__


def _owners(head: nn.Module) -> list[nn.Module]:
    return [module for module in head.modules() if is_fsdp2(module)]


def _state(owner: nn.Module) -> Any:
    return owner._get_fsdp_state()


def _groups(owner: nn.Module) -> list[Any]:
    state = _state(owner)
    groups = getattr(state, "_fsdp_param_groups", None)  # since torch 2.12
    return [g for g in groups or [state._fsdp_param_group] if g is not None]


def _keep_gathered(owner: nn.Module, block: Block) -> None:
    groups = [g for g in _groups(owner) if g.post_forward_mesh_info is not None]
    if groups:
        block.callback(owner.reshard)
    for group in groups:  # called before `reshard`, which would do nothing else
        block.callback(setattr, group, "post_forward_mesh_info", group.post_forward_mesh_info)
        group.post_forward_mesh_info = None
