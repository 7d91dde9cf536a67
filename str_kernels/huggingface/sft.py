"""TRL's `SFTTrainer` on a patched model: its fused head is answered by the patch.

From 1.15 on TRL gives every model a head of its own, ``model(..., fused_lm_head=True)``, and adds
up that head's log-probabilities itself. Asked so, a patched model runs its own fused forward and
fills TRL's output type from it::

    fused_lm_head=True ──▶ InFront ──▶ TRL's forward ──▶ the patch ──▶ TokenTerms ──▶ TRL's output
                             (flag renamed: TRL's forward lets the call through)

What DPO, GRPO, KTO and the like ask of the same head is not answered.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from str_kernels.backends.selection import resolve, select_backend
from str_kernels.engine.contract import RowTerms
from str_kernels.huggingface.instance import has_own_forward
from str_kernels.huggingface.rules import METADATA, name_of
from str_kernels.options import LossOptions
from str_kernels.terms import row_terms

if TYPE_CHECKING:
    from str_kernels.huggingface.patch import Patch

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
            held = inspect.getclosurevars(function).nonlocals
            if held.keys() >= _SFT.keys():
                return {name: held[name] for name in _SFT}
        forward = getattr(function, "__wrapped__", None)
    return None


class InFront:
    """The forward of a model whose patched one was covered by TRL's; makes TRL's let calls through.

    Args:
        patch: of the model.
        below: the forward that stood here, TRL's or a wrapper of it.
    """

    def __init__(self, patch: Patch, below: Callable[..., Any]) -> None:
        """Look like the model's forward to those who read signatures."""
        self.patch, self.below = patch, below
        self.__signature__ = inspect.signature(type(patch.model).forward)

    @torch.compiler.disable
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Rename the flag, if the patch can answer it."""
        if args and args[0] is self.patch.model:  # bound once more, as accelerate's unwrapping does
            args = args[1:]
        if kwargs.get(FLAG) and self.patch.installed and asks_for_sft(self.below):
            kwargs[RENAMED] = kwargs.pop(FLAG)
        return self.below(*args, **kwargs)


def stay_in_front(patch: Patch) -> None:
    """From now on, every ``model.train()`` puts `InFront` before a forward of TRL's.

    A trainer calls it (and ``eval()``, which is ``train(False)``) before each of its steps.
    """
    patch.model.__dict__["train"] = types.MethodType(_train, patch)


def _train(patch: Patch, mode: bool = True) -> nn.Module:
    model = patch.model
    forward = model.__dict__.get("forward")
    covered = not has_own_forward(model) and not isinstance(forward, InFront)
    if covered and _settings_of(forward) is not None:
        model.__dict__["forward"] = InFront(patch, forward)
    return type(model).train(model, mode)


def step_aside(model: nn.Module) -> None:
    """Undo ``stay_in_front``; below a newer wrapper an `InFront` stays, and only passes on."""
    if getattr(model.__dict__.get("train"), "__func__", None) is _train:
        del model.__dict__["train"]
    forward = model.__dict__.get("forward")
    if isinstance(forward, InFront):
        model.__dict__["forward"] = forward.below


class TokenTerms:
    """What one forward with labels knows of every token, for TRL."""

    def __init__(self) -> None:
        """Nothing yet."""
        self._columns: dict[str, Tensor] = {}

    def record(self, terms: RowTerms, labelled: Tensor, rows: Tensor, shape: torch.Size) -> None:
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
            "entropy": torch.where(labelled, terms.statistics.entropy, 0.0).detach(),
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

    Negated it stays so; its sum is a plain tensor; anything else is an error, because a trainer
    that weighs tokens (``loss_type="dft"``) or compares them would weigh the penalty along.
    """

    @staticmethod
    def of(losses: Tensor) -> SumOnly:
        """These very values, with their graph."""
        return losses.as_subclass(SumOnly)

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Negate, sum, describe; refuse the rest.

        Raises:
            ValueError: anything else.
        """
        if func not in _OF_SUMS and func not in METADATA:
            raise ValueError(
                f"log_probs: {name_of(func)} was asked of the losses of a model with a safety "
                "constraint, which hold the penalty; only their sum is a loss. SFTTrainer's "
                "loss_type must be 'nll'; for another, and for TRL's other trainers, patch with "
                "safety=None."
            )
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*args, **(kwargs or {}))
        return found.as_subclass(SumOnly) if func in _NEGATIONS else found


_NEGATIONS = {torch.neg, torch.negative, Tensor.neg, Tensor.negative, Tensor.__neg__}
_OF_SUMS = {*_NEGATIONS, torch.sum, Tensor.sum}


def entropy_is_free(states: Tensor, options: LossOptions, inputs: dict[str, Any]) -> bool:
    """Whether the loss's own pass computes every logit, and so the entropy as well."""
    chosen = select_backend(inputs["backend"], states.device, states.dtype).backend
    if chosen is None:
        return True
    indexed = inputs["index"] is not None
    resolved = resolve(options, chosen, dtype=states.dtype, device=states.device, indexed=indexed)
    return resolved.eps == 0.0


def entropy_of(
    arguments: tuple[Tensor, Tensor, Tensor], options: LossOptions, inputs: dict[str, Any]
) -> Tensor:
    """Entropy ``[n]`` in nats of labelled rows, by a pass of its own: a filter leaves logits out.

    Args:
        arguments: hidden states, weight and labels of ``row_terms``.
        options: of the loss.
        inputs: ``bias`` and ``backend`` of ``row_terms``; its ``index`` is not used.
    """
    exact = replace(options, safety=None, filter_eps=0.0, screen="auto")
    with torch.no_grad():
        terms = row_terms(
            *arguments, exact, bias=inputs["bias"], backend=inputs["backend"], entropy=True
        )
    return terms.statistics.entropy
