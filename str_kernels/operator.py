"""The loss as one operator of torch, for code that is being compiled.

Stage: the same as `terms`, behind ``torch.ops.str_kernels.fused_terms``. A tracer sees one call
with known shapes; inside, the ordinary path runs: the same checks, choices and backends. Eager code
does not come here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from str_kernels.backends.selection import select_backend
from str_kernels.engine.autograd import (
    RowInputs,
    Settings,
    backward_rows,
    forward_rows,
)
from str_kernels.engine.contract import Backend, Head
from str_kernels.engine.logits import accumulator, kept_dtype
from str_kernels.engine.rows import plan_rows
from str_kernels.notices import say_once
from str_kernels.options import LossOptions, SafetyConstraint
from str_kernels.terms import RowTerms, check_inputs, flatten, resolve, unflatten
from str_kernels.vocabulary import VocabularyIndex

# What the operator is told besides the tensors, in the order of its schema. -1 stands for "auto".
_SETTINGS = (
    "int ignore_index, float logit_scale, float? softcap, float label_smoothing, float z_loss, "
    "float filter_eps, str screen, int[]? token_ids, float strength, str kind, "
    "float[]? token_weights, float temperature, str backend, bool[] needs"
)
_INPUTS = (
    "Tensor hidden_states, Tensor weight, Tensor labels, Tensor? bias, Tensor? reference, "
    "Tensor? position_weights, Tensor? order, Tensor? mean_rows, Tensor? sample, "
    "Tensor? quantised, Tensor? row_scales"
)
_OUTPUTS = (
    "Tensor cross_entropy, Tensor penalty, Tensor lse, Tensor safety_logits, Tensor correct, "
    "Tensor dead_mass, Tensor live_share, Tensor ce_gradient, Tensor lse_gradient, "
    "Tensor open_mass"
)
_SAVED = (
    "Tensor grad_cross_entropy, Tensor grad_penalty, Tensor lse, Tensor safety_logits, "
    "Tensor ce_gradient, Tensor lse_gradient, Tensor open_mass"
)


def traced_terms(
    hidden_states: Tensor,
    weight: Tensor,
    labels: Tensor,
    safety: SafetyConstraint | None,
    settings: dict[str, Any],
    *,
    bias: Tensor | None,
    reference: Tensor | None,
    position_weights: Tensor | None,
    index: VocabularyIndex | None,
    backend: str | Backend,
) -> RowTerms:
    """``row_terms`` for a tracer; the arguments of ``linear_cross_entropy``.

    The filter of a trainable weight is not traced: its pass is the exact one.
    """
    if not isinstance(backend, str):
        raise ValueError(f"backend={backend!r}: compiled code takes a name, not an instance.")
    lead = hidden_states.shape[:-1]
    flat, rows = flatten(hidden_states, labels, reference, position_weights)
    grad = torch.is_grad_enabled()
    needs = [grad and x is not None and x.requires_grad for x in (flat, weight, bias)]
    eps = settings["filter_eps"]
    parts = (None,) * 5
    if index is not None:
        parts = (index.order, index.mean_rows, index.sample, index.quantised, index.row_scales)
    outputs = torch.ops.str_kernels.fused_terms(
        flat,
        weight,
        rows.labels,
        bias,
        rows.reference,
        rows.position_weights,
        *parts,
        settings["ignore_index"],
        settings["logit_scale"],
        settings["softcap"],
        settings["label_smoothing"],
        settings["z_loss"],
        -1.0 if eps == "auto" else eps,
        settings["screen"],
        None if safety is None else list(safety.token_ids),
        0.0 if safety is None else safety.strength,
        "mse" if safety is None else safety.kind,
        None if safety is None or safety.token_weights is None else list(safety.token_weights),
        1.0 if safety is None else safety.temperature,
        backend,
        needs,
    )
    cross_entropy, penalty, lse, safety_logits, correct, dead_mass, live_share = outputs[:7]
    kept = None if safety is None else safety_logits
    terms = RowTerms(
        cross_entropy, penalty, lse, kept, correct, dead_mass, live_share, entropy=None
    )
    return unflatten(terms, lead)


def _options(
    ignore_index: int,
    logit_scale: float,
    softcap: float | None,
    label_smoothing: float,
    z_loss: float,
    filter_eps: float,
    screen: str,
    token_ids: list[int] | None,
    strength: float,
    kind: str,
    token_weights: list[float] | None,
    temperature: float,
    backend: str,
    needs: list[bool],
) -> LossOptions:
    safety = None
    if token_ids is not None:
        safety = SafetyConstraint(token_ids, strength, kind, token_weights, temperature)
    eps = "auto" if filter_eps == -1.0 else filter_eps
    if any(needs[1:]):
        if eps != 0.0:
            say_once("str_kernels: in compiled code a trainable head takes the exact pass")
        eps, screen = 0.0, "auto"
    return LossOptions(
        ignore_index=ignore_index,
        logit_scale=logit_scale,
        softcap=softcap,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        filter_eps=eps,
        screen=screen,
        safety=safety,
    )


def _prepare(
    tensors: tuple[Tensor | None, ...], settings: tuple
) -> tuple[Head, RowInputs, Settings]:
    """The operator's arguments as the ordinary path has them."""
    hidden, weight, labels, bias, reference, position_weights = tensors[:6]
    order, mean_rows, sample, quantised, row_scales = tensors[6:]
    options, needs, backend = _options(*settings), settings[-1], settings[-2]
    index = None
    if order is not None:
        index = VocabularyIndex(order, mean_rows, sample, quantised, row_scales)
    check_inputs(hidden, weight, labels, options, bias, reference, position_weights, index)
    chosen = select_backend(backend, hidden.device, hidden.dtype).backend
    if chosen is None:
        raise ValueError("backend='dense': is plain torch code; compiled code needs no operator.")
    resolved = resolve(chosen, options, hidden, weight, index, entropy=False, grad=any(needs))
    return Head(hidden, weight, bias), RowInputs(labels, reference, position_weights), resolved


def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    tensors, settings = arguments[:11], arguments[11:]
    needs = settings[-1]
    with torch.no_grad(), torch.autocast(tensors[0].device.type, enabled=False):
        head, rows, resolved = _prepare(tensors, settings)
        done, penalty = forward_rows(head, rows, resolved, tuple(needs))
    count = len(head.hidden_states)

    def spread(values: Tensor | None) -> Tensor:
        """``[R, ...]`` → ``[N, ...]``: a tracer does not know how many rows meet the vocabulary."""
        if values is None:
            return head.hidden_states.new_empty(0, dtype=kept_dtype(head.hidden_states.dtype))
        return values.new_zeros(count, *values.shape[1:]).index_copy_(0, done.rows, values)

    return (
        done.cross_entropy,
        penalty,
        done.lse,
        done.lse.new_empty(0) if done.safety_logits is None else done.safety_logits,
        done.correct,
        done.dead_mass,
        done.live_share,
        spread(done.ce_gradient),
        spread(done.lse_gradient),
        spread(done.open_mass),
    )


def _forward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    hidden, token_ids, kind, needs = arguments[0], arguments[18], arguments[20], arguments[-1]
    count = hidden.shape[0]
    dtype = accumulator(hidden.dtype)

    def row(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return hidden.new_empty(shape, dtype=of)

    states = (count, hidden.shape[1])
    kept = kept_dtype(hidden.dtype)
    return (
        row(count),
        row(count),
        row(count),
        row(0) if token_ids is None else row(count, len(token_ids)),
        row(count, of=torch.bool),
        row(count),
        row(count),
        row(*states if needs[0] else (0,), of=kept),
        row(
            *states if needs[0] and token_ids is not None and kind == "logprob" else (0,),
            of=kept,
        ),
        row(count),
    )


def _backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    (grad_cross_entropy, grad_penalty, lse, safety_logits, ce, by_lse, open_mass) = arguments[:7]
    tensors, settings = arguments[7:18], arguments[18:]
    needs = settings[-1]
    with torch.no_grad(), torch.autocast(lse.device.type, enabled=False):
        head, rows, resolved = _prepare(tensors, settings)
        options = resolved.options
        plan = plan_rows(rows.labels, rows.position_weights, options, lse.dtype)
        dense = plan.dense.nonzero()[:, 0]
        saved = {
            **rows._asdict(),
            "rows": dense,
            "safety_alone": (plan.safety & ~plan.dense).nonzero()[:, 0],
            "weight": head.weight,
            "hidden_states": head.hidden_states,
            "bias": head.bias,
            "lse": lse,
            "safety_logits": None if options.safety is None else safety_logits,
            "ce_gradient": ce[dense] if needs[0] else None,
            "lse_gradient": by_lse[dense] if len(by_lse) else None,
            "open_mass": open_mass[dense],
            "masses": None,
            "slope": None,
            "probabilities": None,
        }
        gradients = backward_rows(resolved, tuple(needs), saved, grad_cross_entropy, grad_penalty)
    return tuple(lse.new_empty(0) if x is None else x for x in gradients)


def _backward_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight, bias, needs = arguments[7], arguments[8], arguments[10], arguments[-1]
    lse = arguments[2]
    like = (hidden, weight, bias)
    return tuple(
        torch.empty_like(x, memory_format=torch.contiguous_format) if need else lse.new_empty(0)
        for x, need in zip(like, needs, strict=True)
    )


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    ctx.settings = inputs[11:]
    _, _, lse, safety_logits, _, _, _, ce_gradient, lse_gradient, open_mass = output
    ctx.save_for_backward(lse, safety_logits, ce_gradient, lse_gradient, open_mass, *inputs[:11])
    ctx.mark_non_differentiable(*output[2:])


def _backward_rule(ctx: Any, grad_cross_entropy: Tensor, grad_penalty: Tensor, *_: Any) -> tuple:
    gradients = torch.ops.str_kernels.fused_terms_backward(
        grad_cross_entropy, grad_penalty, *ctx.saved_tensors, *ctx.settings
    )
    hidden, weight, bias = (
        gradient if need else None
        for gradient, need in zip(gradients, ctx.settings[-1], strict=True)
    )
    return (hidden, weight, None, bias, *(None,) * (7 + len(ctx.settings)))


def _register() -> None:
    torch.library.define("str_kernels::fused_terms", f"({_INPUTS}, {_SETTINGS}) -> ({_OUTPUTS})")
    torch.library.define(
        "str_kernels::fused_terms_backward",
        f"({_SAVED}, {_INPUTS}, {_SETTINGS}) -> (Tensor hidden_states, Tensor weight, Tensor bias)",
    )
    for name, run, fake in (
        ("str_kernels::fused_terms", _forward, _forward_fake),
        ("str_kernels::fused_terms_backward", _backward, _backward_fake),
    ):
        torch.library.impl(name, ("cpu", "cuda"))(run)
        torch.library.register_fake(name)(fake)
    torch.library.register_autograd(
        "str_kernels::fused_terms", _backward_rule, setup_context=_setup_context
    )


_register()
