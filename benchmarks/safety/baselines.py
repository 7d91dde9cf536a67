"""The nearest published methods, written plainly: they are compared for safety, not for speed.

`full_kl` and `pact` take the tuned model (a PEFT model whose adapters can be switched off) and a
batch, and return the penalty that joins the cross-entropy, a mean over labelled tokens.
`constrained_sft` returns what takes the cross-entropy's place; `safe_lora` changes the adapter when
it has been trained.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

TEMPERATURE = 2.0  # PACT's
TOP_P = 0.9
GATE = 2.0
PREFIX = 8  # positions gated in full; the gate fades as exp(-t / PREFIX) behind them
IGNORED = -100
# Constrained SFT's: how strictly the first, the second to fifth, and all later answer tokens are
# kept from moving.
BETAS = (0.5, 2.0, 2.0, 2.0, 2.0)
BETA = 0.1
SIMILAR = 0.35  # Safe LoRA's: layers whose update is less like its projection are projected


def full_kl(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Return the KL of the aligned model's next token from the tuned one's, whole vocabulary."""
    where = _labelled(batch["labels"])
    head = model.get_base_model().get_output_embeddings().weight
    tuned = F.log_softmax(_states(model, batch)[where] @ head.T, -1)
    with torch.no_grad(), model.disable_adapter():
        aligned = F.log_softmax(_states(model, batch)[where] @ head.T, -1)
    return F.kl_div(tuned, aligned, log_target=True, reduction="batchmean")


def pact(model: Any, batch: dict[str, Tensor], token_ids: Tensor, header: int) -> Tensor:
    """Return the subset KL to a gated mixture of two references (arXiv 2603.07445).

    All safety tokens weigh alike.

    The aligned model is read twice: with the prompt and with the answer alone. Where the tuned
    model is less sure among the safety tokens than the latter, the target leans to the latter.

    Args:
        model: the tuned model.
        batch: padded on the right, each row one prompt and one answer.
        token_ids: ``[K]``.
        header: tokens of the assistant's heading, at the end of every prompt.
    """
    where = _labelled(batch["labels"])
    weight = model.get_base_model().get_output_embeddings().weight[token_ids]
    tuned = _states(model, batch)[where] @ weight.T
    with torch.no_grad(), model.disable_adapter():
        full = _states(model, batch)[where] @ weight.T
        short = _without_prompt(batch, header)
        alone = _states(model, short)[_labelled(short["labels"])] @ weight.T
        gate = torch.sigmoid(GATE * (_spread(tuned) - _spread(alone)))
        gate *= torch.exp(-(_steps(where) - PREFIX).clamp(min=0) / PREFIX)
        target = torch.lerp(full, alone, gate[:, None])
    log_p = F.log_softmax(tuned / TEMPERATURE, -1)
    log_q = F.log_softmax(target / TEMPERATURE, -1)
    return TEMPERATURE**2 * F.kl_div(log_p, log_q, log_target=True, reduction="batchmean")


def constrained_sft(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Return the token-wise constrained objective (arXiv 2406.05946), a mean over labelled tokens.

    ``-2/β_t · log σ(β_t · log(π/π_aligned))``: its gradient begins as the cross-entropy's, and
    fades as a token becomes more probable than the aligned model has it, the sooner the larger β.
    """
    where = _labelled(batch["labels"])
    head = model.get_base_model().get_output_embeddings().weight
    targets = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)[where]

    def log_probabilities() -> Tensor:
        logits = _states(model, batch)[where] @ head.T
        return logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]

    with torch.no_grad(), model.disable_adapter():
        aligned = log_probabilities()
    steps = _steps(where).long()
    known = torch.tensor([*BETAS, BETA])
    beta = known[steps.clamp(max=len(BETAS))]
    moved = log_probabilities() - aligned
    return (-2.0 / beta * F.logsigmoid(beta * moved)).mean()


@torch.no_grad()
def safe_lora(tuned: Any, base: torch.nn.Module) -> int:
    """Project adapter weights onto what aligning changed (arXiv 2405.16833); return how many.

    With V = W_aligned - W_base of a layer and C = V Vᵀ / ‖V‖, its update B A becomes C B A where
    the cosine of both is at most `SIMILAR`.

    Args:
        tuned: a PEFT model with LoRA, whose own weights are the aligned model's.
        base: the model before it was aligned.
    """
    before, projected = dict(base.named_modules()), 0
    for name, layer in tuned.get_base_model().named_modules():
        if not hasattr(layer, "lora_B"):
            continue
        change = layer.base_layer.weight - before[name].weight
        norm = change.norm()
        if norm == 0:  # aligning left it alone, so there is nothing to project onto
            continue
        for adapter, b in layer.lora_B.items():
            a = layer.lora_A[adapter].weight
            moved = change @ (change.T @ b.weight) / norm
            likeness = F.cosine_similarity((b.weight @ a).flatten(), (moved @ a).flatten(), dim=0)
            if likeness <= SIMILAR:
                b.weight.copy_(moved)
                projected += 1
    return projected


def _labelled(labels: Tensor) -> Tensor:
    """Return ``[B, T]`` bool: the positions whose next token is learned."""
    return F.pad(labels[:, 1:] != IGNORED, (0, 1), value=False)


def _states(model: Any, batch: dict[str, Tensor]) -> Tensor:
    body = model.get_base_model().base_model
    keep = ("input_ids", "attention_mask")
    return body(**{name: batch[name] for name in keep}, use_cache=False).last_hidden_state


def _spread(logits: Tensor) -> Tensor:
    """Return the share of the safety tokens that hold ``TOP_P`` of their probability."""
    ordered = logits.softmax(-1).sort(-1, descending=True).values.cumsum(-1)
    return ((ordered < TOP_P).sum(-1) + 1).to(logits.dtype) / logits.shape[-1]


def _steps(where: Tensor) -> Tensor:
    """Count the answer positions before each labelled one in its row."""
    return (where.long().cumsum(-1) - 1)[where].float()


def _without_prompt(batch: dict[str, Tensor], header: int) -> dict[str, Tensor]:
    """Cut each row's prompt off, up to the assistant's heading."""
    starts = (batch["labels"] != IGNORED).long().argmax(-1) - header
    columns = starts[:, None] + torch.arange(batch["labels"].shape[1] - int(starts.min()))
    inside = columns < batch["labels"].shape[1]
    columns = columns.clamp(max=batch["labels"].shape[1] - 1)
    cut = {name: values.gather(1, columns) for name, values in batch.items()}
    cut["attention_mask"] = cut["attention_mask"] * inside
    cut["labels"] = cut["labels"].masked_fill(~inside, IGNORED)
    return cut
