"""`Patch`: what a patched model carries, and what happens in its forward.

::

    forward(labels=...) ──▶ reference pass (adapters off, no grad), if the constraint needs one
            │
         lm_head ──▶ DeferredLogits ──the model's own arithmetic──▶ F.cross_entropy ──▶ fused loss

The model's class, its ``forward``, its loss function and their signatures stay as they are; there
is no code per model.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from str_kernels import transforms
from str_kernels.engine.contract import Backend
from str_kernels.functional import LossParts
from str_kernels.huggingface import trl
from str_kernels.huggingface.constraint.adapters import require_fixed_base
from str_kernels.huggingface.constraint.filling import FillingCache
from str_kernels.huggingface.constraint.reference_pass import reference_fold
from str_kernels.huggingface.constraint.sequences import Sequences
from str_kernels.huggingface.constraint.share import (
    Drawn,
    Sharing,
    arguments_of_rows,
    weighted_rows,
)
from str_kernels.huggingface.constraint.splits import Split, attends_whole, split_of
from str_kernels.huggingface.deferred.fold import Fold
from str_kernels.huggingface.deferred.forward import (
    PATCH,
    has_own_forward,
    inner_forward,
    install_forward,
    remove_forward,
)
from str_kernels.huggingface.deferred.freshness import StepClock
from str_kernels.huggingface.deferred.head import defer_head, deferring, find_head, undefer_heads
from str_kernels.huggingface.deferred.holding import gather_again, whole_head
from str_kernels.huggingface.deferred.sharding import has_one_weight
from str_kernels.huggingface.patch.comparison import Verification
from str_kernels.huggingface.patch.context import LossContext, Reference
from str_kernels.huggingface.patch.filtering import Index, IndexSource
from str_kernels.huggingface.patch.guard import AccuracyGuard
from str_kernels.huggingface.patch.learned import SCHEMA, reading_state
from str_kernels.huggingface.patch.loss import FusedLoss, LabelledForward
from str_kernels.huggingface.patch.meter import FirstPenalty, LossMeter, Share
from str_kernels.huggingface.patch.notices import Notices
from str_kernels.huggingface.patch.processes import ALONE, together
from str_kernels.huggingface.patch.rows import check_weights
from str_kernels.options import LossOptions
from str_kernels.settings import Positions
from str_kernels.vocabulary import VocabularyIndex


class Patch:
    """A patched model; ``patch_model`` makes it. As a context manager it unpatches on leaving.

    Attributes:
        model: the causal language model inside, without PEFT's wrapper.
        options: ``LossOptions`` of its loss, the constraint among them.
        reference: ``"adapter_off"`` or a ``ReferenceCache``.
        positions: what is constrained.
        sharing: draws the rows of a batch that are constrained; ``begin`` tells it of a step.
        index: a ``VocabularyIndex``, ``"auto"`` or None.
        backend: as in ``linear_cross_entropy``.
        guard: checks the accuracy of the filter; ``guard.last_report`` is its latest finding.
        last_parts: ``LossParts`` of the latest loss, detached; None before the first.
        meter: sums of the losses in training mode since they were last taken.
        evaluation_meter: the same in evaluation mode, each loss weighed as its rows.
        verification: the result of the trial of the patch on this model; None: there was none.
    """

    def __init__(
        self,
        model: nn.Module,
        head: nn.Module,
        options: LossOptions,
        *,
        reference: Reference = "adapter_off",
        positions: Positions = "all",
        sharing: Sharing | None = None,
        index: Index = "auto",
        backend: str | Backend = "auto",
        check_accuracy_every: int | None = None,
        verification: Verification | None = None,
        trainer_logs: object = None,
    ) -> None:
        """Install; ``patch_model`` has checked everything. ``trainer_logs`` is kept alive."""
        self.meter, self.evaluation_meter, self.notices = LossMeter(), LossMeter(), Notices()
        self.guard = AccuracyGuard(check_accuracy_every, self.notices)
        self.model, self.options = model, options
        self.reference, self.positions = reference, positions
        self.sharing = Sharing() if sharing is None else sharing
        self.index, self.backend, self.verification = index, backend, verification
        self.last_parts: LossParts | None = None
        self._source, self._head = IndexSource(index), head
        self._first = FirstPenalty(self.notices, cached=not isinstance(reference, str))
        self._clock: StepClock | None = StepClock.shared()
        self._trainer_logs = trainer_logs
        self._running, self._leaves_rows_out = False, True
        self._given: LossOptions = options
        self._fallback: dict[str, Any] = {}  # options that the guard has changed
        self._names = list(inspect.signature(type(model).forward).parameters)[1:]  # without self
        install_forward(model, _patched_forward)
        defer_head(head)
        model.__dict__[PATCH] = self
        trl.watch_for_head(model)
        body = model.base_model
        self._body_hook = (
            None if body is model else body.register_forward_pre_hook(self._notice_bypass)
        )

    def __repr__(self) -> str:
        state = "" if self.installed else "removed, "
        filtered = f"filter_eps={self.options.filter_eps}, screen={self.options.screen}"
        backend = self.backend if isinstance(self.backend, str) else type(self.backend).__name__
        index = "given" if isinstance(self.index, VocabularyIndex) else self.index
        return (
            f"Patch({type(self.model).__name__}: {state}fused cross-entropy, {self._holds()}; "
            f"{filtered}, index={index}, backend={backend})"
        )

    def _holds(self) -> str:
        safety = self.options.safety
        if safety is None:
            return "no constraint"
        reference = self.reference if isinstance(self.reference, str) else self.reference.path
        return (
            f"holds {len(safety.token_ids)} safety tokens by {safety.kind} at {safety.strength:g}, "
            f"positions={self.positions}, reference={reference}"
        )

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *_: object) -> None:
        self.unpatch()

    @property
    def installed(self) -> bool:
        """Whether the model carries this patch."""
        return self.model.__dict__.get(PATCH) is self

    def unpatch(self) -> None:
        """Restore the model; harmless when done already."""
        if not self.installed:
            return
        trl.stop_watching(self.model)
        del self.model.__dict__[PATCH]
        if self._body_hook is not None:
            self._body_hook.remove()
        undefer_heads(self.model)
        remove_forward(self.model)
        gather_again(self._head)
        self._clock = self._trainer_logs = None

    def state_dict(self) -> dict[str, Any]:
        """What the patch has learned since it was made, as JSON values for a checkpoint.

        That is the automatic vocabulary index, or that it was dropped; what the guard fell back to
        and how far it has counted; the sums for the next log; whether the first penalty was judged;
        how far a share of the rows has been drawn.
        ``SafetyLogCallback`` keeps it in the trainer's checkpoints; a loop of your own keeps it
        beside optimizer and adapter.
        """
        return {
            "schema": SCHEMA,
            "index": self._source.state_dict(),
            "fallback": dict(self._fallback),
            "guard": self.guard.state_dict(),
            "meter": self.meter.state_dict(),
            "first_penalty_judged": self._first.judged,
            "sharing": self.sharing.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what ``state_dict`` returned; call it before the first forward.

        What this patch has learned itself is forgotten.

        Raises:
            ValueError: not the state of a patch, or a damaged one. In the next forward: a damaged
                index.
        """
        with reading_state(state):
            self._source.load_state_dict(state["index"])
            self.guard.load_state_dict(state["guard"])
            self.meter.load_state_dict(state["meter"])
            self._first.judged = state["first_penalty_judged"]
            self._fallback = dict(state["fallback"])
            self.sharing.load_state_dict(state.get("sharing", [0, 0]))  # 0.2's first had none
            self.options = replace(self._given, **self._fallback)

    def run(self, args: tuple, kwargs: dict) -> Any:
        """The model's own forward; its head defers if there are labels."""
        before, self._running = self._running, True
        try:
            return self._run(inner_forward(self.model), args, kwargs)
        finally:
            self._running = before

    def _run(self, inner: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        weights = kwargs.pop("position_weights", None)  # the model does not know this argument
        check_weights(weights, self.options)
        asked = kwargs.pop(trl.RENAMED, False)
        if kwargs.get(trl.FLAG):
            if not trl.asks_for_sft(inner):
                self._bypassed()
                return _undeferred(inner, args, kwargs)
            asked = kwargs.pop(trl.FLAG)
        arguments = {**dict(zip(self._names, args, strict=False)), **kwargs}
        if _targets(arguments) is None:
            if weights is not None:
                raise ValueError("position_weights: there are no labels, so no loss to weigh.")
            self._warn_unlabelled()
            return _undeferred(inner, args, kwargs)
        if self._transformed(arguments):
            return _undeferred(inner, args, kwargs)
        self._follow_head()
        tokens = trl.TokenTerms() if asked else None
        processes = together(self.model)
        context = replace(self._context(inner, arguments, weights, tokens), together=processes)
        forward = LabelledForward(context)
        with deferring(forward):
            outputs = inner(*args, **kwargs)
        forward.leave(outputs)
        while forward.losses:
            self._observe(forward.losses.pop(0), len(_targets(arguments)), context)
        if tokens is None:
            return outputs
        return tokens.answer(outputs, arguments, constrained=self.options.constrained)

    def _transformed(self, arguments: dict[str, Any]) -> bool:
        """Whether a transform of torch's is in force, through which the model's own loss passes.

        Raises:
            ValueError: one is, and the constraint cannot join that loss.
        """
        values = chain(self.model.parameters(), arguments.values())
        if not transforms.functional() and not transforms.forward_mode(values):
            return False
        if self.options.constrained:
            raise ValueError(
                f"model={type(self.model).__name__}: take derivatives by loss.backward(), patch "
                "with safety=None, or call linear_cross_entropy(..., backend='dense') on the "
                "hidden states: torch.func (grad, vmap, jvp) and forward-mode AD cannot pass "
                "through a patched model with a safety constraint."
            )
        self.notices.warn_transformed()
        return True

    def _follow_head(self) -> None:
        """PEFT or resize_token_embeddings may have replaced the head."""
        if self.model.get_output_embeddings() is not self._head:
            self._head = find_head(self.model)
            defer_head(self._head)

    def _context(
        self,
        inner: Callable[..., Any],
        arguments: dict[str, Any],
        weights: Tensor | None,
        tokens: trl.TokenTerms | None,
    ) -> LossContext:
        split, drawn = split_of(arguments), self._draw(arguments)
        computed = self.options.constrained and isinstance(self.reference, str)
        by_row = weights is not None and weights.dim() == 2
        if computed and by_row and drawn is None and split is None and self._leaves_rows_out:
            drawn = weighted_rows(weights)  # the reference pass runs on these alone
            self._leaves_rows_out = drawn is not None  # else it would wait for nothing each time
        aligned, drawn = self._aligned(inner, arguments, split, drawn)
        return LossContext(
            model=type(self.model).__name__,
            options=self.options,
            reference=self.reference,
            positions=self.positions,
            backend=self.backend,
            index=self._source,
            notices=self.notices,
            sequences=Sequences.of(self.model, arguments),
            evaluating=not self.model.training,
            aligned=aligned,
            split=split,
            position_weights=weights,
            tokens=tokens,
            drawn=drawn,
        )

    def _draw(self, arguments: dict[str, Any]) -> Drawn | None:
        """The rows of this batch that are constrained, in training alone; None for all."""
        if not self.options.constrained or not self.model.training:
            return None
        return self.sharing.draw(len(_targets(arguments)))

    def _aligned(
        self,
        inner: Callable[..., Any],
        arguments: dict[str, Any],
        split: Split | None,
        drawn: Drawn | None,
    ) -> tuple[Fold | None, Drawn | None]:
        """The reference pass of this batch, where the reference is the model without adapters.

        It runs on the drawn rows alone, unless an argument may belong to other rows.
        """
        if not self.options.constrained:
            return None, drawn
        if isinstance(self.reference, FillingCache):
            self._fill(self.reference, arguments, split)
        if not isinstance(self.reference, str):
            return None, drawn
        if drawn is not None:
            cut = arguments_of_rows(arguments, drawn)
            if cut is None:
                drawn = drawn._replace(passed=list(range(drawn.size)))
            elif not drawn.passed:
                return None, drawn
            arguments = arguments if cut is None else cut
        with attends_whole(self.model, split):
            aligned = reference_fold(self.model, inner, arguments, adapters=True)
        require_fixed_base(self.model)
        same = aligned.weight is aligned.lent and has_one_weight(self._head)
        # the training pass has it, too
        return (aligned.without_weight() if same else aligned), drawn

    def _fill(self, cache: FillingCache, arguments: dict[str, Any], split: Split | None) -> None:
        """Let the cache compute what it lacks of this batch, by the model without adapters."""
        if split is not None:
            raise ValueError(
                f"reference={str(cache.path)!r}: fills itself, which a sequence that is split over "
                "processes does not allow; make the cache first, with str-kernels cache."
            )
        device, processes = next(self.model.parameters()).device, together(self.model)
        cache.fill(self.model, arguments, partial(processes.any, device=device))
        require_fixed_base(self.model)

    def _observe(self, loss: FusedLoss, rows: int, context: LossContext) -> None:
        """Keep the statistics of a loss, detached and on the device, and check the filter."""
        processes, split = context.together, context.split
        self.last_parts = loss.parts
        filtered = not trl.entropy_is_free(loss.operands[0], loss.options, loss.inputs)
        # processes that share the vocabulary have the same live share
        judges = processes if loss.inputs["shard"] is None else ALONE
        self._source.judge(loss.parts.live_share, judges, filtered=filtered)
        training = self.model.training
        meter = self.meter if training else self.evaluation_meter
        share = None if training else Share.of_rows(rows, loss.parts.num_labels, split)
        meter.add(loss.terms, loss.parts, share)
        if loss.constrained is not None:
            constrained = (loss.terms, self.options.safety, *loss.constrained)
            meter.add_drift(*constrained)
            if training and torch.is_grad_enabled():
                self._first.after_loss(*constrained)
        if training and torch.is_grad_enabled():
            held = whole_head(self._head, loss.operands[1]) if self.guard.due else nullcontext()
            with held:
                changed = self.guard.after_loss(
                    loss.operands, loss.options, processes, **loss.inputs
                )
            self._fallback |= changed
            self.options = replace(self.options, **changed)

    def _warn_unlabelled(self) -> None:
        if self.model.training and torch.is_grad_enabled() and self.options.constrained:
            self.notices.warn_unconstrained(
                "the model was called in training mode without labels, so the loss is computed "
                "elsewhere (label smoothing or compute_loss_func of the trainer?)"
            )

    def _notice_bypass(self, body: nn.Module, args: tuple) -> None:
        """A hook of the body: notice training through another forward than the patched one."""
        training = self.model.training and torch.is_grad_enabled()
        if training and not self._running and not has_own_forward(self.model):
            self._bypassed()

    def _bypassed(self) -> None:
        if not self.options.constrained:
            self.notices.warn_bypassed()
            return
        raise ValueError(
            f"model={type(self.model).__name__}: a replaced forward computes its loss past the "
            "patch. For SFTTrainer (TRL 1.15 or later) import trl before patching; in a loop of "
            "your own call model.train() after the trainer is made. DPO, GRPO and "
            "KTO have no cross-entropy for the constraint: patch with safety=None."
        )


# a compiled caller runs the patched forward eagerly: deferred tensors cannot be traced
@torch.compiler.disable
def _patched_forward(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    patch = model.__dict__.get(PATCH)
    if patch is None:  # unpatched below a newer wrapper
        return inner_forward(model)(*args, **kwargs)
    return patch.run(args, kwargs)


def _targets(arguments: dict[str, Any]) -> Tensor | None:
    labels = arguments.get("labels")
    return arguments.get("shift_labels") if labels is None else labels


def _undeferred(inner: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
    with deferring(None):
        return inner(*args, **kwargs)
