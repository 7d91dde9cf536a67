"""One training step on meta tensors, in the order in which the patched model runs it.

Stage: `Subject`, `Shape`, `Levers` → the most bytes of each moment: the reference pass, the
forward, the head, the backward of each layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from str_kernels.huggingface.constraint.adapters import adapters_off
from str_kernels.planning.attention import attention_of
from str_kernels.planning.depth import places
from str_kernels.planning.experts import experts_counted
from str_kernels.planning.head import FusedHead, HeadShape, exact_operations
from str_kernels.planning.ledger import Ledger
from str_kernels.planning.subject import Subject

WEIGHTS, ADAPTER = "weights", "adapter"
SHARED, KEPT, WORK = "masks, positions, embeddings", "kept for the backward", "one layer at work"
FIRST_LOSS, REFERENCE_MOMENT = ("first loss",), "reference"
HEAD, REFERENCE, GRADIENTS = "loss head", "reference pass", "adapter's gradients"


class Shape(NamedTuple):
    """What a step reads: B sequences of N tokens, K safety tokens (0: no constraint), a device."""

    batch: int
    context: int
    safety_tokens: int
    device: str


class _Reached(Exception):
    """The head was called with these states."""

    def __init__(self, states: Tensor) -> None:
        self.states = states


def count_step(
    ledger: Ledger, subject: Subject, layers: nn.ModuleList | None, shape: Shape, *, fused: bool
) -> None:
    """Run a step; its levers other than the head's are on the model already.

    Raises:
        NotImplementedError, RuntimeError: the model cannot run without values.
    """
    for tensor in (*subject.model.parameters(), *subject.model.buffers()):
        ledger.register(tensor, ADAPTER if tensor.requires_grad else WEIGHTS)
    with ExitStack() as stack:
        stack.enter_context(attention_of(shape.device, ledger.take))
        stack.enter_context(experts_counted())
        stack.enter_context(_layers_told(ledger, layers))
        stack.enter_context(ledger)
        with ledger.owned(SHARED):
            tokens = torch.ones(shape.batch, shape.context, dtype=torch.int64, device="meta")
            batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        kept = _reference(subject, ledger, batch) if fused and shape.safety_tokens else None
        ledger.moments = (("forward",),)
        loss = _loss(subject, ledger, batch, shape, fused=fused)
        del kept
        _backward(subject, ledger, loss)


def _reference(subject: Subject, ledger: Ledger, batch: dict[str, Tensor]) -> Tensor:
    """The states of the model without its adapter, which wait for the loss."""
    ledger.moments = ((REFERENCE_MOMENT,),)
    subject.model.eval()
    with torch.no_grad(), adapters_off(subject.inner), ledger.owned(REFERENCE):
        states = _states(subject, batch)
    subject.model.train()
    ledger.move(states, REFERENCE)
    return states


def _loss(
    subject: Subject, ledger: Ledger, batch: dict[str, Tensor], shape: Shape, *, fused: bool
) -> Tensor:
    if not fused:
        with _head_told(ledger, subject.head), ledger.owned(SHARED):
            return subject.inner(**batch, labels=batch["input_ids"]).loss
    with ledger.owned(SHARED):
        states = _states(subject, batch)
    ledger.moments = (FIRST_LOSS,)
    ledger.take(0)
    ledger.moments = (("head",),)
    with ledger.owned(HEAD):
        head = HeadShape(subject.head.weight, shape.safety_tokens, shape.device)
        ledger.compute(exact_operations(states, head))
        return FusedHead.apply(states, head, ledger.take)


def _states(subject: Subject, batch: dict[str, Tensor]) -> Tensor:
    """The states that the head would get."""

    def stop(_: nn.Module, args: tuple) -> None:
        raise _Reached(args[0])

    hook = subject.head.register_forward_pre_hook(stop)
    try:
        subject.inner(**batch)
    except _Reached as reached:
        return reached.states
    finally:
        hook.remove()
    raise NotImplementedError("its forward calls no output layer")


def _backward(subject: Subject, ledger: Ledger, loss: Tensor) -> None:
    ledger.moments = (("backward start",),)
    trained = [p for p in subject.model.parameters() if p.requires_grad]
    hooks = [
        p.register_post_accumulate_grad_hook(lambda p: ledger.move(p.grad, GRADIENTS))
        for p in trained
    ]
    try:
        with ledger.owned(WORK):
            loss.backward()
        ledger.moments = (("end",),)
        ledger.take(0)
    finally:
        for hook in hooks:
            hook.remove()
        for p in trained:
            p.grad = None


@contextmanager
def _layers_told(ledger: Ledger, layers: nn.ModuleList | None) -> Iterator[None]:
    """Tell the ledger which layer is at work: what it leaves in a forward is kept."""
    hooks = []

    def forward() -> bool:
        return ledger.moments[0] == ("forward",)

    def enter(*_: object) -> None:
        if forward():
            ledger.enter(WORK)

    def leave(*_: object) -> None:
        if forward():
            ledger.leave(KEPT)

    def recomputed(layer: int, count: int) -> Callable[..., None]:
        def hook(*_: object) -> None:
            if ledger.moments[0][0].startswith("backward"):
                ledger.moments = places(layer, count)

        return hook

    for i, layer in enumerate(layers or ()):
        hooks.append(layer.register_forward_pre_hook(enter))
        hooks.append(layer.register_forward_hook(leave, always_call=True))
        again = recomputed(i, len(layers))  # checkpointing may compute a layer past its own hooks
        hooks += [child.register_forward_pre_hook(again) for child in layer.children()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _head_told(ledger: Ledger, head: nn.Module) -> Iterator[None]:
    """Give what follows the head's call, the loss too, to the head."""

    def enter(*_: object) -> None:
        ledger.moments = (("head",),)
        ledger.owner = ledger.named(HEAD)

    hook = head.register_forward_pre_hook(enter)
    try:
        yield
    finally:
        hook.remove()
