"""`Counter`: the counted memory of a model's step, at any context and with any levers.

Stage: `Subject`, what is trained on it → `Count` for a context and a set of levers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from str_kernels.levers.checkpoints import checkpointed
from str_kernels.levers.tiles import tiled
from str_kernels.levers.token_wise import token_wise_modules
from str_kernels.levers.windows import windowed
from str_kernels.planning.depth import Depths, depths_of, layers_of, line, shortened, whole
from str_kernels.planning.experts import experts_counted
from str_kernels.planning.head import HeadShape, building_bytes, index_bytes
from str_kernels.planning.ledger import Ledger, Most
from str_kernels.planning.levers import Levers
from str_kernels.planning.operations import Operations
from str_kernels.planning.request import Request
from str_kernels.planning.shapes import Shapes
from str_kernels.planning.step import FIRST_LOSS, REFERENCE_MOMENT, Shape, count_step
from str_kernels.planning.subject import Subject
from str_kernels.planning.tiles import in_few_tiles

OPTIMIZER, INDEX, BUCKETS = "optimizer states", "vocabulary index", "buckets between processes"
_STATES = 2  # numbers that AdamW keeps of each trained weight, in that weight's dtype


class Count(NamedTuple):
    """The most bytes of a step.

    Attributes:
        total: on the device.
        owners: the shares of these, by consumer.
        moment: when that is.
        host: bytes that wait on the host or on disk.
    """

    total: int
    owners: dict[str, int]
    moment: str
    host: int


class Counter:
    """Counts steps of one model; what was counted is remembered."""

    def __init__(self, subject: Subject, asked: Request) -> None:
        self.subject, self.asked = subject, asked
        self.layers = layers_of(subject.inner, subject.config)
        self.depths = (
            Depths(1, 1, 1) if self.layers is None else depths_of(self.layers, subject.config)
        )
        trained = subject.bytes_of(trained=True)
        self.always = {OPTIMIZER: _STATES * trained, BUCKETS: trained if asked.processes > 1 else 0}
        self.fixed = subject.bytes_of(trained=False) + trained + self.always[OPTIMIZER]
        self._counted: dict[tuple[int, Levers], Count] = {}
        self._operations: dict[tuple[int, Levers], Operations] = {}
        self._tiled: dict[bool, list[str]] = {}
        self._shapes = Shapes()

    def count(self, context: int, levers: Levers) -> Count:
        """Count a step.

        Raises:
            ValueError: a model that needs values to run, or does not allow a lever.
        """
        if levers.offload == "cpu" and self.asked.device == "cpu":
            raise ValueError(
                "offload='cpu': the device is the CPU, and so are its checkpoints; give 'disk' or "
                "leave it out."
            )
        key = context, levers
        if key not in self._counted:
            self._counted[key] = self._count(context, levers)
        return self._counted[key]

    def operations(self, context: int, levers: Levers) -> Operations:
        """Count the operations of a step.

        Raises:
            ValueError: as `count`; tiles, which are not all run.
        """
        if levers.tile_tokens is not None:
            raise ValueError("tile_tokens: operations are counted without tiles; leave it out.")
        self.count(context, levers)
        return self._operations[context, levers]

    def _count(self, context: int, levers: Levers) -> Count:
        every = levers.tile_all
        if levers.tile_tokens is not None and every not in self._tiled:
            with self._told(), experts_counted():
                found = token_wise_modules(self.subject.in_floats().inner, every=every)
                self._tiled[every] = list(found)
        few = self._at(self.depths.few, context, levers)
        more = few
        if self.depths.more != self.depths.few:
            more = self._at(self.depths.more, context, levers)
        self._operations[context, levers] = _operations(few, more, self.depths)
        most = whole(few.most, more.most, self.depths)
        host = whole({("host",): Most(few.host, {})}, {("host",): Most(more.host, {})}, self.depths)
        for key in most:
            for name, size in self._beside(key, levers).items():
                most[key] = _with(most[key], name, size)
        moment = max(most, key=lambda key: most[key].total)
        total, owners = most[moment]
        return Count(total, owners, _words(moment), host[("host",)].total)

    def _beside(self, moment: tuple, levers: Levers) -> dict[str, int]:
        """What else is there; the first loss builds the index, before the optimizer has states."""
        found = dict(self.always)
        if levers.fused_head:
            shape = HeadShape(self.subject.head.weight, self.asked.safety_tokens, self.asked.device)
            found[INDEX] = index_bytes(shape)
            if moment == FIRST_LOSS:
                found |= {INDEX: building_bytes(shape), OPTIMIZER: 0}
        return {name: size for name, size in found.items() if size}

    def _at(self, depth: int, context: int, levers: Levers) -> Ledger:
        ledger, subject = Ledger(self._shapes), self.subject
        tokens = self.asked.safety_tokens if levers.fused_head else 0
        shape = Shape(self.asked.batch, context, tokens, self.asked.device)
        with ExitStack() as stack:
            if self.layers is not None:
                stack.enter_context(shortened(self.layers, depth))
            stack.enter_context(self._levers(levers, ledger))
            stack.enter_context(self._told())
            count_step(ledger, subject, self.layers, shape, fused=levers.fused_head)
        return ledger

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Say in a sentence that a model does not run."""
        try:
            yield
        except (NotImplementedError, RuntimeError, TypeError, AttributeError) as error:
            told = (str(error) or type(error).__name__).splitlines()[0][:120]
            raise ValueError(
                f"model={self.subject.name!r}: its step cannot be counted on tensors without "
                f"values ({told}); measure one with a real model (str-kernels train --steps 2)."
            ) from error

    @contextmanager
    def _levers(self, levers: Levers, ledger: Ledger) -> Iterator[None]:
        """Apply the body's levers, with checkpoints that the ledger sees leave and return."""
        inner = self.subject.inner
        with ExitStack() as stack:
            if levers.tile_tokens is not None:
                found = self._token_wise(levers.tile_all)
                stack.enter_context(tiled(inner, found, levers.tile_tokens, in_few_tiles))
            if levers.window_attention:
                stack.enter_context(windowed(inner))
            if levers.gradient_checkpointing:
                away = saved_tensors_hooks(ledger.away, ledger.back) if levers.offload else None
                stack.enter_context(checkpointed(inner, away))
            yield

    def _token_wise(self, every: bool) -> list[nn.Module]:
        """The modules that run in tiles, of the layers that there are now."""
        modules = dict(self.subject.inner.named_modules())
        return [modules[name] for name in self._tiled[every] if name in modules]


def _operations(few: Ledger, more: Ledger, depths: Depths) -> Operations:
    """Those of the whole model, from those at two depths."""
    pair = []
    for ledger in (few, more):
        reference = ledger.operations[REFERENCE_MOMENT]
        pair.append((reference, ledger.operations.total() - reference))
    return Operations(*(line(a, b, depths) for a, b in zip(*pair, strict=True)))


def _with(most: Most, name: str, size: int) -> Most:
    return Most(most.total + size, {**most.owners, name: most.owners.get(name, 0) + size})


def _words(moment: tuple) -> str:
    return {
        REFERENCE_MOMENT: "in the reference pass",
        "forward": "in the forward",
        "head": "in the loss head",
        "first loss": "in the first loss, which builds the vocabulary index",
        "backward start": "as the backward begins",
        "backward": "in the backward of a layer",
    }.get(moment[0], "at the end of the step")
