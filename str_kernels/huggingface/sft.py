"""TRL's `SFTTrainer` with the patched model's own loss: the way for the constraint to count there.

TRL gives every model a fused head of its own and sums that head's log-probabilities itself, past
``outputs.loss``. The mixin asks the model for its loss instead, as transformers' ``Trainer`` does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from str_kernels.huggingface.install import find_patch


class PatchedLossMixin:
    """Put it in front of TRL's trainer: ``class MyTrainer(PatchedLossMixin, SFTTrainer): pass``.

    Loss, gradients and ``mean_token_accuracy`` are those of the patched model, packing and
    padding-free batches included. ``entropy`` is not logged, for it needs the logits.

    Raises:
        ValueError: at the first loss: the model is not patched, ``loss_type`` is not ``"nll"``, or
            ``router_aux_loss_coef`` is not the model's own.
    """

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of the model's forward, and SFTTrainer's counts of tokens."""
        patch = find_patch(self.accelerator.unwrap_model(model))
        self._require_plain_loss(patch)
        inputs["use_cache"] = False  # as SFTTrainer does; with a cache packing is not seen
        loss, outputs = Trainer.compute_loss(self, model, inputs, True, num_items_in_batch)
        self._count(inputs, patch)
        return (loss, outputs) if return_outputs else loss

    def _require_plain_loss(self, patch: Any) -> None:
        if patch is None:
            raise ValueError("PatchedLossMixin: the model is not patched; call patch_model first.")
        if self.args.loss_type != "nll":
            raise ValueError(
                f"loss_type={self.args.loss_type!r}: the model's own loss is 'nll'; another one is "
                "TRL's own, without the constraint: use SFTTrainer and patch_model(model)."
            )
        asked = getattr(self.args, "router_aux_loss_coef", None)
        own = getattr(patch.model.config.get_text_config(), "router_aux_loss_coef", 0.0)
        if asked is not None and asked != own:
            raise ValueError(
                f"router_aux_loss_coef={asked}: the model's own loss uses its config's, {own}; set "
                "it there."
            )

    def _count(self, inputs: dict[str, Any], patch: Any) -> None:
        mode = "train" if self.model.training else "eval"
        if mode == "train":
            counted = inputs.get("attention_mask")
            size = inputs["input_ids"].numel() if counted is None else counted.sum()
            size = torch.as_tensor(size, device=inputs["input_ids"].device)
            self._total_train_tokens += self.accelerator.gather_for_metrics(size).sum().item()
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]
        parts = patch.last_parts
        if parts is not None:
            pair = torch.stack([parts.num_correct, parts.num_labels]).float()
            correct, labels = self.accelerator.gather_for_metrics(pair).reshape(-1, 2).sum(0)
            accuracy = (correct / labels.clamp(min=1)).item()
            self._metrics[mode]["mean_token_accuracy"].append(accuracy)
