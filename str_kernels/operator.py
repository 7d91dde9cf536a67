"""The loss as one operator of torch, for compiled code.

Stage: the same as `terms`, behind ``torch.ops.str_kernels.fused_terms``. A tracer sees one call
with known shapes, which runs the engine's forward and backward on the same `Kept` as eager code.
Schemas are made from the records' fields, so that no position is counted by hand.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from str_kernels.backends.selection import resolve, select_backend
from str_kernels.constraint import needs_lse
from str_kernels.engine.backward import backward_rows
from str_kernels.engine.contract import (
    Backend,
    Head,
    Kept,
    Resolved,
    RowInputs,
    RowTerms,
    Statistics,
)
from str_kernels.engine.forward import forward_rows, kept_weight
from str_kernels.engine.logits import accumulator, kept_dtype
from str_kernels.notices import say_once
from str_kernels.options import LossOptions, SafetyConstraint
from str_kernels.terms import check_inputs, flatten, gradients_needed, tiles_for, unflatten
from str_kernels.transforms import refuse_second_order
from str_kernels.vocabulary import VocabularyIndex

_KNOWN = 5  # statistics that compiled code has too; the entropy follows them
# The parts of a `VocabularyIndex`.
_INDEX = ("order", "mean_rows", "sample", "quantised", "row_scales", "columns", "hot")


class Outputs(NamedTuple):
    """Every tensor that the operator returns: the terms, their `Statistics`, and parts of `Kept`.

    A tracer must know all shapes, so tensors of R rows are padded to N, and ``safety_alone`` from S
    to N; ``counts [2]``, on the CPU, holds R and S. An empty tensor ``[0]`` stands for None.
    """

    cross_entropy: Tensor
    penalty: Tensor
    lse: Tensor
    lse_rest: Tensor
    correct: Tensor
    dead_mass: Tensor
    live_share: Tensor
    safety_logits: Tensor
    rows: Tensor
    safety_alone: Tensor
    safety_rows: Tensor
    ce_gradient: Tensor
    lse_gradient: Tensor
    open_mass: Tensor
    log_rest: Tensor
    counts: Tensor


@dataclass(frozen=True)
class Settings:
    """The operator's arguments other than tensors, passed as one string.

    ``needs``: whether hidden states, weight and bias need a gradient; ``dtype``: the name of the
    dtype of the hidden states; ``autocast``: whether the caller runs under it.
    """

    options: LossOptions
    backend: str
    needs: tuple[bool, bool, bool]
    dtype: str
    autocast: bool = False

    @staticmethod
    @cache
    def from_text(text: str) -> Settings:
        """Read the text of `_as_json`; each one is parsed and checked once."""
        read = json.loads(text)
        options = read.pop("options")
        safety = options.pop("safety")
        constraint = None if safety is None else SafetyConstraint(**safety)
        needs = tuple(read.pop("needs"))
        return Settings(LossOptions(**options, safety=constraint), needs=needs, **read)

    @property
    def trained(self) -> bool:
        """Whether the weight or the bias needs a gradient."""
        return any(self.needs[1:])

    def resolved(self, device: torch.device, *, indexed: bool, positions: int) -> Resolved:
        """Resolve the settings; in compiled code a trainable head takes the exact pass."""
        options, dtype = self.options, getattr(torch, self.dtype)
        if self.trained:
            if options.filter_eps != 0.0:
                say_once("str_kernels: in compiled code a trainable head takes the exact pass")
            options = replace(options, filter_eps=0.0, screen="auto")
        return resolve(
            options,
            self.backend,
            dtype=dtype,
            device=device,
            indexed=indexed,
            needs=self.needs,
            positions=positions,
        )


# A tracer cannot follow dataclasses.fields or json.dumps, and gives a dataclass that was made in
# traced code its defaults. So the text is made from fields that are read one by one.
_FIELDS = {
    record: [f.name for f in fields(record)] for record in (Settings, LossOptions, SafetyConstraint)
}


def _as_json(value: Any) -> str:
    """Write settings as JSON, by operations that a tracer can follow."""
    if type(value) in _FIELDS:
        names = _FIELDS[type(value)]
        return "{" + ", ".join([f'"{n}": {_as_json(getattr(value, n))}' for n in names]) + "}"
    if isinstance(value, tuple):
        return "[" + ", ".join([_as_json(x) for x in value]) + "]"
    if isinstance(value, str):
        return f'"{value}"'
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    # float() turns a number that the tracer treats as a variable into a constant, which it can
    # format, with every digit, on all versions of Python and torch; repr and str it cannot
    return f"{value}" if isinstance(value, int) else f"{float(value)}"


def traced_terms(
    head: Head,
    inputs: RowInputs,
    options: LossOptions,
    index: VocabularyIndex | None,
    backend: str | Backend,
) -> RowTerms:
    """Compute ``row_terms`` in traced code."""
    if not isinstance(backend, str):
        raise ValueError(f"backend={backend!r}: compiled code takes a name, not an instance.")
    shape, weight = head.hidden_states.shape[:-1], head.weight
    head, inputs = flatten(head, inputs)
    parts = [None if index is None else getattr(index, name) for name in _INDEX]
    dtype = str(head.hidden_states.dtype).removeprefix("torch.")
    autocast = torch.is_autocast_enabled(weight.device.type)
    text = _as_json(Settings(options, backend, gradients_needed(head), dtype, autocast))
    found = Outputs(*torch.ops.str_kernels.fused_terms(*head, *inputs, *parts, text))
    logits = None if options.safety is None else found.safety_logits
    known = (getattr(found, name) for name in Statistics._fields[:_KNOWN])
    rest = found.log_rest if options.leaves_out else None
    statistics = Statistics(*known, None, logits, rest)
    terms = RowTerms(found.cross_entropy, found.penalty, statistics)
    return unflatten(terms, shape)


def _records(tensors: Sequence[Tensor | None]) -> tuple[Head, RowInputs, VocabularyIndex | None]:
    """Name the operator's tensors."""
    rest = iter(tensors)
    head, inputs = (kind(*islice(rest, len(kind._fields))) for kind in (Head, RowInputs))
    index = dict(zip(_INDEX, rest, strict=True))
    return head, inputs, None if index["order"] is None else VocabularyIndex(**index)


def _forward(*arguments: Any) -> Outputs:
    head, inputs, index = _records(arguments[:-1])
    settings, device = Settings.from_text(arguments[-1]), head.weight.device
    with torch.no_grad():
        with torch.autocast(device.type, enabled=settings.autocast):
            check_inputs(head, inputs, settings.options, index)
        with torch.autocast(device.type, enabled=False):
            resolved = settings.resolved(
                device, indexed=index is not None, positions=len(head.hidden_states)
            )
            tiles = tiles_for(head.weight, index, resolved)
            terms, kept = forward_rows(head, inputs, tiles, resolved)
    return _padded(terms, kept, resolved)


def _padded(terms: RowTerms, kept: Kept, resolved: Resolved) -> Outputs:
    """Pad the result of a forward to the shapes that a tracer knows."""
    count, lse = len(kept.lse), kept.lse

    def absent(dtype: torch.dtype) -> Tensor:
        return lse.new_empty(0, dtype=dtype)

    def pad(values: Tensor | None, dtype: torch.dtype = lse.dtype) -> Tensor:
        if values is None:
            return absent(dtype)
        if len(values) == count:
            return values
        return torch.cat([values, values.new_zeros(count - len(values), *values.shape[1:])])

    statistics, of_rows = terms.statistics, kept_dtype(resolved.dtype)
    return Outputs(
        terms.cross_entropy,
        terms.penalty,
        *statistics[:_KNOWN],
        safety_logits=pad(statistics.safety_logits),
        rows=pad(kept.rows),
        safety_alone=pad(kept.safety_alone, torch.int64),
        safety_rows=absent(resolved.dtype) if kept.safety_rows is None else kept.safety_rows,
        ce_gradient=pad(kept.ce_gradient, of_rows),
        lse_gradient=pad(kept.lse_gradient, of_rows),
        open_mass=pad(kept.open_mass),
        log_rest=pad(kept.log_rest),
        counts=torch.tensor(
            [len(x) if x is not None else 0 for x in (kept.rows, kept.safety_alone)]
        ),
    )


def _forward_fake(*arguments: Any) -> Outputs:
    hidden, settings = arguments[0], Settings.from_text(arguments[-1])
    safety = settings.options.safety
    count, dtype = hidden.shape[0], accumulator(hidden.dtype)

    def make(*shape: int, dtype: torch.dtype = dtype, there: bool = True) -> Tensor:
        return hidden.new_empty(shape if there else 0, dtype=dtype)

    gradients, kept = hidden.shape, kept_dtype(hidden.dtype)
    constrained, of_hidden = safety is not None, settings.needs[0]
    of_safety = (len(safety.token_ids), hidden.shape[1]) if constrained else (0,)
    rows = ("cross_entropy", "penalty", "lse", "lse_rest", "dead_mass", "live_share")
    return Outputs(
        **{name: make(count) for name in rows},
        correct=make(count, dtype=torch.bool),
        safety_logits=make(count, len(safety.token_ids) if constrained else 0, there=constrained),
        rows=make(count, dtype=torch.int64),
        safety_alone=make(count, dtype=torch.int64, there=constrained),
        safety_rows=make(
            *of_safety, dtype=hidden.dtype, there=of_hidden and settings.options.constrained
        ),
        ce_gradient=make(*gradients, dtype=kept, there=of_hidden),
        lse_gradient=make(
            *gradients, dtype=kept, there=of_hidden and constrained and needs_lse(safety)
        ),
        open_mass=make(count, there=settings.trained),
        log_rest=make(count, there=settings.options.leaves_out),
        counts=torch.empty(2, dtype=torch.int64),
    )


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    (head, constants, _), found = _records(inputs[:-1]), Outputs(*output)
    ctx.text = inputs[-1]
    trained = Settings.from_text(ctx.text).trained
    kept = Kept(
        *constants,
        weight=kept_weight(head.weight, trained=trained),
        hidden_states=head.hidden_states if trained else None,
        bias=head.bias if trained else None,
        **{name: getattr(found, name) for name in Outputs._fields if name in Kept._fields},
    )
    if not Settings.from_text(ctx.text).options.leaves_out:
        kept = kept._replace(log_rest=None)
    ctx.save_for_backward(*kept, found.counts)
    ctx.mark_non_differentiable(*output[2:])


def _backward_rule(ctx: Any, grad_cross_entropy: Tensor, grad_penalty: Tensor, *_: Any) -> tuple:
    refuse_second_order(grad_cross_entropy, grad_penalty)
    gradients = torch.ops.str_kernels.fused_terms_backward(
        grad_cross_entropy, grad_penalty, *ctx.saved_tensors, ctx.text
    )
    needs = Settings.from_text(ctx.text).needs
    of_head = (x if need else None for x, need in zip(gradients, needs, strict=True))
    return (*of_head, *(None,) * len(RowInputs._fields + _INDEX), None)


def _backward(grad_cross_entropy: Tensor, grad_penalty: Tensor, *arguments: Any) -> tuple:
    *tensors, counts, text = arguments
    kept, settings = Kept(*tensors), Settings.from_text(text)
    dense, alone = counts.tolist()  # on the CPU: the host does not wait for a device
    padded = ("rows", "ce_gradient", "lse_gradient", "open_mass")
    kept = kept._replace(
        **{name: getattr(kept, name)[:dense] for name in padded},
        safety_alone=kept.safety_alone[:alone],
    )
    dtype = getattr(torch, settings.dtype)
    backend, _ = select_backend(settings.backend, kept.lse.device, dtype)
    # the forward chose and checked the filter; a traced backward has no part that depends on it
    resolved = Resolved(backend, settings.options, settings.needs, dtype)
    with torch.no_grad():
        gradients = backward_rows(kept, None, resolved, grad_cross_entropy, grad_penalty)
    return tuple(kept.lse.new_empty(0) if x is None else x for x in gradients)


def _backward_fake(grad_cross_entropy: Tensor, grad_penalty: Tensor, *arguments: Any) -> tuple:
    *tensors, _, text = arguments
    kept, settings = Kept(*tensors), Settings.from_text(text)
    rows = kept.ce_gradient  # [0] where the hidden states need no gradient
    shape = (kept.lse.shape[0], *rows.shape[1:])
    hidden = rows.new_empty(shape, dtype=getattr(torch, settings.dtype))
    like = (hidden, kept.weight, kept.bias)
    return tuple(
        torch.empty_like(x, memory_format=torch.contiguous_format)
        if need
        else kept.lse.new_empty(0)
        for x, need in zip(like, settings.needs, strict=True)
    )


def _schema(record: type[NamedTuple]) -> str:
    """Declare the record's fields as an operator's arguments, optional if they may be None."""
    kinds = {name: str(kind) for name, kind in record.__annotations__.items()}
    return ", ".join(f"Tensor{'?' if 'None' in kinds[n] else ''} {n}" for n in record._fields)


def _register() -> None:
    results = ", ".join("Tensor" for _ in Outputs._fields)
    of_index = ", ".join(f"Tensor? {name}" for name in _INDEX)
    upstream = "Tensor grad_cross_entropy, Tensor grad_penalty"
    for name, schema, run, fake in (
        (
            "str_kernels::fused_terms",
            f"({_schema(Head)}, {_schema(RowInputs)}, {of_index}, str settings) -> ({results})",
            _forward,
            _forward_fake,
        ),
        (
            "str_kernels::fused_terms_backward",
            f"({upstream}, {_schema(Kept)}, Tensor counts, str settings) "
            "-> (Tensor, Tensor, Tensor)",
            _backward,
            _backward_fake,
        ),
    ):
        torch.library.define(name, schema)
        torch.library.impl(name, ("cpu", "cuda"))(run)
        torch.library.register_fake(name)(fake)
    torch.library.register_autograd(
        "str_kernels::fused_terms", _backward_rule, setup_context=_setup_context
    )


_register()
