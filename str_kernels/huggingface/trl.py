"""TRL's `SFTTrainer` on a patched model: the patch answers for TRL's fused head.

From 1.15 on TRL gives every model a head of its own, ``model(..., fused_lm_head=True)``, and sums
that head's log-probabilities itself. Asked so, a patched model runs its own fused forward and fills
TRL's output type from it::

    fused_lm_head=True ─▶ FlagRenamer ─▶ TRL's forward ─▶ the patch ─▶ TokenTerms ─▶ TRL's output
                            (TRL's forward calls the model's own where it does not see its flag)

A trainer that is made before the patch needs no `FlagRenamer`: the patch sees the flag first. For
one that is made afterwards, `watch_for_head` replaces ``model.train``, which every trainer calls
before its steps; this is done only in a process that has imported TRL.

Requests of DPO, GRPO, KTO and the like to the same head are not answered.
"""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from str_kernels.backends.selection import resolve
from str_kernels.engine.contract import Head, RowInputs, RowTerms
from str_kernels.huggingface.deferred.forward import PATCH, has_own_forward
from str_kernels.huggingface.deferred.torch_functions import METADATA, is_framework_hook, name_of
from str_kernels.options import LossOptions
from str_kernels.terms import row_terms

FLAG, RENAMED = "fused_lm_head", "_str_kernels_per_token"

# TRL's closure of settings, and what SFTTrainer sets: no other trainer wants exactly these.
_SFT = {
    "outputs": ("log_probs", "entropy", "is_top1"),
    "temperature": 1.0,
    "cast_lm_head_to_fp32": False,
}


def asks_for_sft(forward: Callable[..., Any] | None) -> bool:
    """Whether TRL's head is in this forward, with the settings of SFTTrainer."""
    return _settings_of(forward) == _SFT


def _settings_of(forward: Callable[..., Any] | None) -> dict[str, Any] | None:
    while forward is not None:
        function = getattr(forward, "__func__", forward)
        if inspect.isfunction(function):
            found = inspect.getclosurevars(function).nonlocals
            if found.keys() >= _SFT.keys():
                return {name: found[name] for name in _SFT}
        forward = getattr(function, "__wrapped__", None)
    return None


class FlagRenamer:
    """The forward of a model on which TRL's covers the patched one.

    It renames TRL's flag, so that TRL's forward calls the patched one, which reads the new name.

    Args:
        model: the patched model.
        below: the forward that was there, TRL's or a wrapper of it.
    """

    def __init__(self, model: nn.Module, below: Callable[..., Any]) -> None:
        """Take the signature of the model's forward, for those who read it."""
        self.model, self.below = model, below
        self.__signature__ = inspect.signature(type(model).forward)

    @torch.compiler.disable
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Rename the flag, if the patch can answer it."""
        if args and args[0] is self.model:  # bound once more, as accelerate's unwrapping does
            args = args[1:]
        if kwargs.get(FLAG) and PATCH in self.model.__dict__ and asks_for_sft(self.below):
            kwargs[RENAMED] = kwargs.pop(FLAG)
        return self.below(*args, **kwargs)


def watch_for_head(model: nn.Module) -> None:
    """From now on, every ``model.train()`` puts a `FlagRenamer` before a forward of TRL's.

    A trainer calls it (and ``eval()``, which is ``train(False)``) before each of its steps. Without
    TRL in the process nothing is done.
    """
    if "trl" in sys.modules:
        model.__dict__["train"] = types.MethodType(_train, model)


def _train(model: nn.Module, mode: bool = True) -> nn.Module:
    forward = model.__dict__.get("forward")
    covered = not has_own_forward(model) and not isinstance(forward, FlagRenamer)
    if covered and _settings_of(forward) is not None:
        model.__dict__["forward"] = FlagRenamer(model, forward)
    return type(model).train(model, mode)


def stop_watching(model: nn.Module) -> None:
    """Undo ``watch_for_head``; a `FlagRenamer` below a newer wrapper stays, and only passes on."""
    if getattr(model.__dict__.get("train"), "__func__", None) is _train:
        del model.__dict__["train"]
    forward = model.__dict__.get("forward")
    if isinstance(forward, FlagRenamer):
        model.__dict__["forward"] = forward.below


class TokenTerms:
    """The terms of every token in one forward with labels, for TRL."""

    def __init__(self) -> None:
        self._columns: dict[str, Tensor] = {}

    def record(
        self,
        terms: RowTerms,
        entropy: Tensor,
        labelled: Tensor,
        *,
        rows: Tensor,
        shape: torch.Size,
    ) -> None:
        """Keep the terms ``[n]`` of these rows of a batch ``[B, T]``.

        Raises:
            ValueError: for the second time in a forward.
        """
        if self._columns:
            raise ValueError(
                "fused_lm_head=True: the model computes more than one cross-entropy from its head, "
                "so TRL's sum over tokens is not its loss; unpatch the model for SFTTrainer."
            )
        found = {
            "loss": terms.cross_entropy + terms.penalty,
            "entropy": torch.where(labelled, entropy, 0.0).detach(),
            "is_top1": terms.statistics.correct & labelled,
            "label_mask": labelled,
        }
        for name, values in found.items():
            table = values.new_zeros(shape.numel()).index_copy(0, rows, values)
            self._columns[name] = table.reshape(shape)

    def answer(self, outputs: Any, arguments: dict[str, Any], *, constrained: bool) -> Any:
        """TRL's output ``[B, T - 1]``, or ``[B, T]`` of labels that are shifted already.

        Raises:
            ValueError: the model's loss was no cross-entropy of its head's logits, or there were
                shifted labels alone.
        """
        from trl.trainer.utils import FusedCausalLMOutput

        if arguments.get("labels") is None:
            raise ValueError(
                "shift_labels: the model's own loss needs labels beside them; with sequence "
                "parallelism, which leaves them out, unpatch the model for SFTTrainer."
            )
        if not self._columns:
            raise ValueError(
                "fused_lm_head=True: the model computed its loss without a cross-entropy of its "
                "deferred logits, so there are no terms of its tokens; unpatch it for SFTTrainer."
            )
        shifted = arguments.get("shift_labels")
        width = arguments["labels"].shape[1] - 1 if shifted is None else shifted.shape[1]
        columns = {name: table[:, :width] for name, table in self._columns.items()}
        losses = columns.pop("loss")
        if constrained:
            losses = SumOnly.of(_fold_in(losses, self._columns["loss"][:, width:]))
        aux_loss = getattr(outputs, "aux_loss", None)
        return FusedCausalLMOutput(
            loss=outputs.loss, log_probs=-losses, aux_loss=aux_loss, **columns
        )


def _fold_in(losses: Tensor, rest: Tensor) -> Tensor:
    """Losses ``[B, T - 1]`` whose sum is that of the rest, too: the last token's penalty."""
    if not rest.numel() or not losses.numel():
        return losses
    last = losses[:, -1:] + rest.sum(-1, keepdim=True)
    return torch.cat([losses[:, :-1], last], -1)


class SumOnly(Tensor):
    """Losses of tokens with the constraint in them: only their sum is what it seems.

    Negated or in another shape it stays so; its sum is a plain tensor; anything else is an error,
    because a trainer that weighs tokens (``loss_type="dft"``) or compares them would weigh the
    penalty along.
    """

    @staticmethod
    def of(losses: Tensor) -> SumOnly:
        """These very values, with their graph."""
        return losses.as_subclass(SumOnly)

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Negate, reshape, sum, describe; refuse the rest.

        Raises:
            ValueError: anything else.
        """
        known = func in _OF_SUMS or func in METADATA or is_framework_hook(func, args)
        if not known:
            raise ValueError(
                f"log_probs: {name_of(func)} was asked of the losses of a model with a safety "
                "constraint, which contain the penalty; only their sum is a loss. Reduce them in "
                "F.cross_entropy. SFTTrainer's loss_type must be 'nll'; for another, and for TRL's "
                "other trainers, patch with safety=None."
            )
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*args, **(kwargs or {}))
        return found.as_subclass(SumOnly) if func in _LOSSES_STILL else found


_NEGATIONS = {torch.neg, torch.negative, Tensor.neg, Tensor.negative, Tensor.__neg__}
_SHAPES = {torch.reshape, torch.flatten, Tensor.reshape, Tensor.view, Tensor.flatten, Tensor.to}
# DDP clones what a forward returns
_LOSSES_STILL = {*_NEGATIONS, *_SHAPES, torch.clone, Tensor.clone}
_OF_SUMS = {*_LOSSES_STILL, torch.sum, Tensor.sum}


def entropy_is_free(states: Tensor, options: LossOptions, inputs: dict[str, Any]) -> bool:
    """Whether the loss's own pass computes every logit, and so the entropy as well."""
    where = {"dtype": states.dtype, "device": states.device, "indexed": inputs["index"] is not None}
    positions = states.shape[:-1].numel()
    return resolve(options, inputs["backend"], **where, positions=positions).eps == 0.0


def entropy_of(
    arguments: tuple[Tensor, Tensor, Tensor], options: LossOptions, inputs: dict[str, Any]
) -> Tensor:
    """Entropy ``[n]`` in nats of labelled rows, by a pass of its own: a filter leaves logits out.

    Args:
        arguments: hidden states, weight and labels.
        options: of the loss.
        inputs: ``bias``, ``backend`` and ``shard``; an ``index`` is not used.
    """
    states, weight, labels = arguments
    exact = replace(options, safety=None, filter_eps=0.0, screen="auto")
    with torch.no_grad():
        head, rows = Head(states, weight, inputs["bias"]), RowInputs(labels)
        where = {"backend": inputs["backend"], "shard": inputs["shard"]}
        terms = row_terms(head, rows, exact, entropy=True, **where)
    return terms.statistics.entropy
