"""`patch_model`: one call puts the fused loss into one causal language model, one undoes it.

::

    forward(labels=...) ──▶ reference pass (adapters off, no grad), if the constraint needs one
            │
         lm_head ──▶ DeferredLogits ──the model's own arithmetic──▶ F.cross_entropy ──▶ fused loss

The model's class, its ``forward``, its loss function and their signatures stay as they are; there
is no code per model.
"""

from __future__ import annotations

import inspect
import os
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from str_kernels.backends.contract import Backend
from str_kernels.backends.selection import select_backend
from str_kernels.functional import LossParts, RowTerms
from str_kernels.huggingface.head import defer_head, deferring, find_head, vocabulary_size
from str_kernels.huggingface.instance import inner_forward, install_forward, remove_forward
from str_kernels.huggingface.loss import LabelledForward, warn_once
from str_kernels.huggingface.positions import Positions, validate_positions
from str_kernels.huggingface.recording import Fold
from str_kernels.huggingface.reference_pass import reference_fold
from str_kernels.options import LossOptions, SafetyConstraint, Screen
from str_kernels.safety.references import ReferenceCache
from str_kernels.vocabulary import VocabularyIndex

_PATCH = "_str_kernels_patch"

Reference = str | os.PathLike | Tensor
Index = VocabularyIndex | Literal["auto"] | None


class Patch:
    """A patched model; ``patch_model`` makes it. As a context manager it unpatches on leaving.

    Attributes:
        model: the causal language model inside, without PEFT's wrapper.
        options: ``LossOptions`` of its loss, the constraint among them.
        reference: ``"adapter_off"``, a tensor ``[K]`` or the path of a cache.
        positions: what is constrained.
        index: a ``VocabularyIndex``, ``"auto"`` or None.
        backend: as in ``linear_cross_entropy``.
        last_parts: ``LossParts`` of the latest loss, detached; None before the first.
    """

    def __init__(
        self,
        model: nn.Module,
        options: LossOptions,
        reference: Reference,
        positions: Positions,
        index: Index,
        backend: str | Backend,
    ) -> None:
        """Install; everything has been checked before."""
        self.model, self.options, self.backend = model, options, backend
        self.reference, self.positions, self.index = reference, positions, index
        self.last_parts: LossParts | None = None
        self._sums: Tensor | None = None
        self._said: set[str] = set()
        install_forward(model, _patched_forward)
        defer_head(find_head(model))
        model.__dict__[_PATCH] = self

    def __enter__(self) -> nn.Module:
        return self.model

    def __exit__(self, *_: object) -> None:
        self.unpatch()

    def unpatch(self) -> None:
        """Restore the model; harmless when done already."""
        if self.model.__dict__.get(_PATCH) is not self:
            return
        del self.model.__dict__[_PATCH]
        for module in self.model.modules():
            remove_forward(module)

    def vocabulary_index(self, fold: Fold) -> VocabularyIndex | None:
        """The index for this call of the head."""
        return None if self.index == "auto" else self.index

    def observe(self, terms: RowTerms, parts: LossParts) -> None:
        """Keep the statistics of a loss: detached device scalars, never read here."""
        self.last_parts = parts
        if self.model.training:
            sums = torch.stack(
                [
                    terms.cross_entropy.detach().sum().float(),
                    terms.penalty.detach().sum().float(),
                    parts.num_correct.float(),
                    parts.num_labels.float(),
                ]
            )
            self._sums = sums if self._sums is None else self._sums + sums

    def take_totals(self) -> dict[str, float]:
        """Averages over the labelled tokens of training since the last call; start anew."""
        sums, self._sums = self._sums, None
        if sums is None:
            return {}
        cross_entropy, penalty, correct, labels = sums.tolist()
        labels = max(labels, 1.0)
        return {
            "cross_entropy": cross_entropy / labels,
            "safety_penalty": penalty / labels,
            "token_accuracy": correct / labels,
        }

    def say_materialised(self, by: str) -> None:
        """Say once who needed the real logits."""
        warn_once(
            self._said,
            f"The logits of a patched model were built in full: {by} asked for them. The values "
            "are right; the memory is spent.",
        )

    def say_unconstrained(self, why: str) -> None:
        """Say once that a loss is computed without the constraint."""
        warn_once(self._said, f"The safety constraint takes no part in a loss: {why}.")

    @cached_property
    def cache(self) -> ReferenceCache:
        """The reference cache, opened at first use."""
        return ReferenceCache(self.reference, self.options.safety)

    def forward(self, args: tuple, kwargs: dict) -> Any:
        """The model's own forward, its head deferring if there are labels."""
        inner, arguments = inner_forward(self.model), _named(self.model, args, kwargs)
        if arguments.get("fused_lm_head"):
            self._refuse_foreign_head()
        if arguments.get("labels") is None and arguments.get("shift_labels") is None:
            self._warn_without_labels()
            with deferring(None):
                return inner(*args, **kwargs)
        defer_head(find_head(self.model))  # PEFT or resize_token_embeddings may have replaced it
        forward = LabelledForward(self, arguments, self._aligned(inner, arguments))
        with deferring(forward):
            outputs = inner(*args, **kwargs)
        forward.leave(outputs)
        return outputs

    def _aligned(self, inner: Any, arguments: dict[str, Any]) -> Fold | None:
        by_adapter = isinstance(self.reference, str) and self.reference == "adapter_off"
        if not self.options.constrained or not by_adapter:
            return None
        return reference_fold(self.model, inner, arguments, adapters=True)

    def _warn_without_labels(self) -> None:
        if self.model.training and torch.is_grad_enabled() and self.options.constrained:
            self.say_unconstrained(
                "the model was called in training mode without labels, so the loss is computed "
                "elsewhere (label smoothing or compute_loss_func of the trainer?)"
            )

    def _refuse_foreign_head(self) -> None:
        raise ValueError(
            "fused_lm_head=True: TRL's trainers compute the loss with a head of their own, past "
            "the patch; give the trainer transformers' loss: class MyTrainer(SFTTrainer): "
            "compute_loss = transformers.Trainer.compute_loss."
        )


def patch_model(
    model: nn.Module,
    safety: SafetyConstraint | None = None,
    *,
    reference: Reference | tuple[Literal["static"], Tensor] = "adapter_off",
    positions: Positions = "all",
    filter_eps: float | Literal["auto"] = "auto",
    screen: Screen = "auto",
    index: Index = "auto",
    backend: str | Backend = "auto",
) -> Patch:
    """Make one causal language model compute its loss fused, with the safety constraint.

    Nothing else changes: the model's ``forward``, its signature, ``generate``, ``save_pretrained``,
    ``outputs.logits`` (real logits once read) and the trainers' ``num_items_in_batch``.

    Args:
        model: a transformers causal LM, PEFT-wrapped or not; only this instance is touched.
        safety: the constraint, or None for the fused cross-entropy alone.
        reference: ``"adapter_off"`` (the same model with its adapters disabled, one no-grad pass a
            step), a static tensor ``[K]`` (also as ``("static", tensor)``), or the path of a cache
            that ``build_reference_cache`` wrote. That there is an adapter to switch off is checked
            at the first forward with labels, for PEFT may come after the patch.
        positions: ``"all"`` (prompt too, padding not), ``"labels"``, or k, the first k labelled
            positions of each sequence; the weights of a sequence always sum to its labels.
        filter_eps: as in ``linear_cross_entropy``.
        screen: as in ``linear_cross_entropy``.
        index: as in ``linear_cross_entropy``; ``"auto"`` makes one where it pays.
        backend: as in ``linear_cross_entropy``.

    Returns:
        A ``Patch``; ``with patch_model(model): ...`` unpatches on leaving.

    Raises:
        ValueError: patched already, no output head, a head that cannot be fused, an unknown
            reference or position, a token id beyond the head.
    """
    inner = causal_lm(model)
    if _PATCH in inner.__dict__:
        raise ValueError(
            f"model={type(inner).__name__}: is patched already; call unpatch_model(model) first."
        )
    head = find_head(inner)
    validate_positions(positions)
    options = LossOptions(safety=safety, filter_eps=filter_eps, screen=screen)
    select_backend(backend, next(head.parameters()).device)
    reference = _validate_reference(reference, safety, vocabulary_size(head))
    return Patch(inner, options, reference, positions, index, backend)


def unpatch_model(model: nn.Module) -> None:
    """Take the patch off again; nothing of it stays.

    Raises:
        ValueError: the model is not patched.
    """
    patch = find_patch(model)
    if patch is None:
        raise ValueError(f"model={type(model).__name__}: is not patched.")
    patch.unpatch()


def find_patch(model: nn.Module) -> Patch | None:
    """The patch that this model carries."""
    return causal_lm(model).__dict__.get(_PATCH)


def causal_lm(model: nn.Module) -> nn.Module:
    """The transformers model inside PEFT's wrapper, or the model itself.

    Raises:
        ValueError: not a torch module, or wrapped for several devices already.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model is a {type(model).__name__}: must be a transformers causal LM.")
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise ValueError(f"model={type(model).__name__}: patch the model before it is wrapped.")
    base = getattr(model, "get_base_model", None)
    return base() if base is not None else model


# a compiled caller runs the patched forward eagerly: deferred tensors cannot be traced
@torch.compiler.disable
def _patched_forward(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    patch = model.__dict__.get(_PATCH)
    if patch is None:  # unpatched below somebody's wrapper
        return inner_forward(model)(*args, **kwargs)
    return patch.forward(args, kwargs)


def _validate_reference(
    reference: Any, safety: SafetyConstraint | None, vocab_size: int
) -> Reference:
    if isinstance(reference, tuple) and len(reference) == 2 and reference[0] == "static":
        reference = reference[1]
    if not isinstance(reference, str | os.PathLike | Tensor):
        raise ValueError(
            f"reference={reference!r}: must be 'adapter_off', a tensor [K] or the path of a cache."
        )
    if safety is None:
        if isinstance(reference, Tensor) or reference != "adapter_off":
            raise ValueError("reference was given without safety: pass a SafetyConstraint too.")
        return reference
    largest, count = max(safety.token_ids), len(safety.token_ids)
    if largest >= vocab_size:
        raise ValueError(
            f"safety.token_ids holds {largest}: the model's head has {vocab_size} rows, 0 to "
            f"{vocab_size - 1}; were the tokens identified with another tokenizer?"
        )
    if isinstance(reference, Tensor):
        if reference.shape != (count,) or not reference.is_floating_point():
            raise ValueError(
                f"reference {list(reference.shape)} {reference.dtype}: a static one must be "
                f"[K={count}] floating point."
            )
        return reference.detach()
    if reference == "static":
        raise ValueError("reference='static': pass the tensor [K] itself, or ('static', tensor).")
    if reference != "adapter_off":
        ReferenceCache(reference, safety)  # opens it: a fault shows now, not at the first step
    return reference


def _named(model: nn.Module, args: tuple, kwargs: dict) -> dict[str, Any]:
    """The arguments of a forward by name, whatever was passed by position."""
    if not args:
        return dict(kwargs)
    names = [name for name in inspect.signature(type(model).forward).parameters if name != "self"]
    return {**dict(zip(names, args, strict=False)), **kwargs}
