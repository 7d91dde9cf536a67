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
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from str_kernels.engine.contract import Backend
from str_kernels.functional import LossParts
from str_kernels.huggingface.filtering import AccuracyGuard, AutoIndex, fall_back
from str_kernels.huggingface.head import defer_head, deferring, find_head
from str_kernels.huggingface.instance import (
    has_own_forward,
    inner_forward,
    install_forward,
    remove_forward,
)
from str_kernels.huggingface.loss import LabelledForward
from str_kernels.huggingface.meter import LossMeter
from str_kernels.huggingface.notice import Notices
from str_kernels.huggingface.positions import Positions
from str_kernels.huggingface.recording import Fold
from str_kernels.huggingface.reference_pass import reference_fold, require_fixed_base
from str_kernels.huggingface.sft import (
    FLAG,
    RENAMED,
    TokenTerms,
    asks_for_sft,
    stay_in_front,
    step_aside,
)
from str_kernels.options import LossOptions
from str_kernels.safety.references import ReferenceCache
from str_kernels.terms import RowTerms
from str_kernels.vocabulary import VocabularyIndex

if TYPE_CHECKING:
    from str_kernels.huggingface.verify import Verification

PATCH = "_str_kernels_patch"

Reference = Literal["adapter_off"] | ReferenceCache
Index = VocabularyIndex | Literal["auto"] | None


class Patch:
    """A patched model; ``patch_model`` makes it. As a context manager it unpatches on leaving.

    Attributes:
        model: the causal language model inside, without PEFT's wrapper.
        options: ``LossOptions`` of its loss, the constraint among them.
        reference: ``"adapter_off"`` or a ``ReferenceCache``.
        positions: what is constrained.
        index: a ``VocabularyIndex``, ``"auto"`` or None.
        backend: as in ``linear_cross_entropy``.
        guard: checks the accuracy of the filter; ``guard.last_report`` is its latest finding.
        last_parts: ``LossParts`` of the latest loss, detached; None before the first.
        meter: sums of the losses in training mode since somebody last took them.
        verification: what the trial of the patch on this model found; None: there was none.
    """

    def __init__(
        self,
        model: nn.Module,
        options: LossOptions,
        *,
        reference: Reference = "adapter_off",
        positions: Positions = "all",
        index: Index = "auto",
        backend: str | Backend = "auto",
        check_accuracy_every: int | None = None,
        verification: Verification | None = None,
    ) -> None:
        """Install; ``patch_model`` has checked everything."""
        self.model, self.options = model, options
        self.reference, self.positions = reference, positions
        self.index, self.backend = index, backend
        self.verification = verification
        self.guard = AccuracyGuard(check_accuracy_every)
        self._auto_index = AutoIndex()
        self.last_parts: LossParts | None = None
        self.meter, self.notices = LossMeter(), Notices()
        self._running = False
        install_forward(model, _patched_forward)
        defer_head(find_head(model))
        model.__dict__[PATCH] = self
        stay_in_front(self)
        body = model.base_model
        self._body_hook = (
            None if body is model else body.register_forward_pre_hook(self._notice_bypass)
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
        step_aside(self.model)
        del self.model.__dict__[PATCH]
        if self._body_hook is not None:
            self._body_hook.remove()
        for module in self.model.modules():
            remove_forward(module)

    def vocabulary_index(self, fold: Fold) -> VocabularyIndex | None:
        """The index for this call of the head."""
        if isinstance(self.index, str):
            return self._auto_index.of(fold, self.options)
        return self.index

    def check_accuracy(self, arguments: tuple[Tensor, Tensor, Tensor], **inputs: Any) -> None:
        """Let the guard look at a training loss, and follow its advice."""
        if not self.model.training or not torch.is_grad_enabled():
            return
        advice = self.guard.after_loss(arguments, **inputs)
        if advice is not None:
            self.options = fall_back(self.options, advice, self.guard.last_report, self.notices)

    def observe(
        self, terms: RowTerms, parts: LossParts, held: tuple[Tensor, Tensor] | None
    ) -> None:
        """Keep the statistics of a loss, detached and on the device.

        Args:
            terms: of every row.
            parts: of the loss.
            held: reference and position weights of the rows, if the constraint took part.
        """
        self.last_parts = parts
        self._auto_index.judge(parts.live_share)
        if self.model.training:
            self.meter.add(terms, parts)
            if held is not None:
                self.meter.add_drift(terms, self.options.safety, *held)

    def run(self, args: tuple, kwargs: dict) -> Any:
        """The model's own forward; its head defers if there are labels."""
        before, self._running = self._running, True
        try:
            return self._run(inner_forward(self.model), args, kwargs)
        finally:
            self._running = before

    def _run(self, inner: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        given = self._given_weights(kwargs.pop("position_weights", None))
        asked = kwargs.pop(RENAMED, False)
        if kwargs.get(FLAG):
            if not asks_for_sft(inner):
                self._bypassed()
                with deferring(None):
                    return inner(*args, **kwargs)
            asked = kwargs.pop(FLAG)
        tokens = TokenTerms() if asked else None
        arguments = _named(self.model, args, kwargs)
        if arguments.get("labels") is None and arguments.get("shift_labels") is None:
            if given is not None:
                raise ValueError("position_weights: there are no labels, so no loss to weigh.")
            self._say_unlabelled()
            with deferring(None):
                return inner(*args, **kwargs)
        defer_head(find_head(self.model))  # PEFT or resize_token_embeddings may have replaced it
        forward = LabelledForward(self, arguments, self._aligned(inner, arguments), tokens, given)
        with deferring(forward):
            outputs = inner(*args, **kwargs)
        forward.leave(outputs)
        if tokens is None:
            return outputs
        return tokens.answer(outputs, arguments, constrained=self.options.constrained)

    def _aligned(self, inner: Callable[..., Any], arguments: dict[str, Any]) -> Fold | None:
        """The reference pass of this batch, where the reference is the model without adapters."""
        if not self.options.constrained or not isinstance(self.reference, str):
            return None
        aligned = reference_fold(self.model, inner, arguments, adapters=True)
        require_fixed_base(self.model)
        return aligned

    def _given_weights(self, weights: Any) -> Tensor | None:
        """The position weights that a batch carries, which the model knows nothing of."""
        if weights is None:
            return None
        if self.options.safety is None:
            raise ValueError(
                "position_weights: weigh the positions of the safety constraint, and the model was "
                "patched with safety=None."
            )
        if not isinstance(weights, Tensor) or not weights.is_floating_point():
            given = getattr(weights, "dtype", type(weights).__name__)
            raise ValueError(
                f"position_weights={given}: must be a tensor [B, T] of floating point."
            )
        return weights

    def _say_unlabelled(self) -> None:
        if self.model.training and torch.is_grad_enabled() and self.options.constrained:
            self.notices.say_unconstrained(
                "the model was called in training mode without labels, so the loss is computed "
                "elsewhere (label smoothing or compute_loss_func of the trainer?)"
            )

    def _notice_bypass(self, body: nn.Module, args: tuple) -> None:
        """Hook of the body: somebody trains through another forward than the patched one."""
        training = self.model.training and torch.is_grad_enabled()
        if training and not self._running and not has_own_forward(self.model):
            self._bypassed()

    def _bypassed(self) -> None:
        if not self.options.constrained:
            self.notices.say_bypassed()
            return
        raise ValueError(
            f"model={type(self.model).__name__}: its forward was replaced, and the loss is "
            "computed past the patch (fused_lm_head=True of TRL's trainers). DPO, GRPO, KTO and "
            "the like have no cross-entropy that the constraint could join; for them patch with "
            "safety=None or not at all. SFTTrainer has one: from TRL 1.15 on, its own loop trains "
            "with the constraint; in a loop of yours call model.train() after the trainer is made."
        )


# a compiled caller runs the patched forward eagerly: deferred tensors cannot be traced
@torch.compiler.disable
def _patched_forward(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    patch = model.__dict__.get(PATCH)
    if patch is None:  # unpatched below somebody's wrapper
        return inner_forward(model)(*args, **kwargs)
    return patch.run(args, kwargs)


def _named(model: nn.Module, args: tuple, kwargs: dict) -> dict[str, Any]:
    """The arguments of a forward by name, whatever was passed by position."""
    if not args:
        return dict(kwargs)
    names = [name for name in inspect.signature(type(model).forward).parameters if name != "self"]
    return {**dict(zip(names, args, strict=False)), **kwargs}
