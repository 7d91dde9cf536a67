"""A tiny Llama with adapters, a batch for two processes, and the truth from one process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from str_kernels import SafetyConstraint
from tests.distributed.pool import WORLD
from tests.huggingface.dense import dense_loss
from tests.huggingface.models import relative

TOKENS = (5, 17, 40, 95)
KINDS = ("none", "kl", "mse", "logprob")
LENGTH = 12
# fp32: sums of a few thousand products in another order, 2^-24 each, seen through two layers
GRADIENTS, LOSS = 5e-6, 1e-6


def constraint(kind: str) -> SafetyConstraint | None:
    """One of ``KINDS``; strong enough for its gradient to count."""
    return None if kind == "none" else SafetyConstraint(TOKENS, 2.0, kind=kind)


@dataclass(frozen=True)
class Case:
    """A model and its constraint, by plain values that travel to another process.

    Attributes:
        kind: of the constraint.
        tied: whether the head is the input embedding.
        trained_head: whether the head's weight is trained beside the adapters.
        vocab: rows of the head.
        positions: as of ``patch_model``.
        labels: how many labels each of the batch's sequences has.
    """

    kind: str = "kl"
    tied: bool = False
    trained_head: bool = False
    vocab: int = 96
    positions: Any = "all"
    labels: tuple[int, ...] = (2, 5, 8, 10)
    dtype: torch.dtype = field(default=torch.float32)

    @property
    def safety(self) -> SafetyConstraint | None:
        """The constraint."""
        return constraint(self.kind)

    def model(self) -> nn.Module:
        """Always the same: a tiny Llama, and adapters that have moved away from zero."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            config = LlamaConfig(
                vocab_size=self.vocab, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
                pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=self.tied,
            )  # fmt: skip
            base = LlamaForCausalLM(config)
            with torch.no_grad():
                base.get_input_embeddings().weight.normal_(std=0.5)
                base.get_output_embeddings().weight.normal_(std=0.5)
            names = ["q_proj", "v_proj", "down_proj"]
            adapters = LoraConfig(r=4, target_modules=names, init_lora_weights=False)
            model = get_peft_model(base.to(self.dtype), adapters)
        if self.trained_head:
            base.get_output_embeddings().weight.requires_grad_(True)
        return model.train()

    def batch(self) -> dict[str, Tensor]:
        """Right-padded sequences whose labels end each of them."""
        g, rows = torch.Generator().manual_seed(1), len(self.labels)
        ids = torch.randint(3, self.vocab, (rows, LENGTH), generator=g)
        mask, labels = torch.ones_like(ids), ids.clone()
        for row, count in enumerate(self.labels):
            end = LENGTH - row % 3
            mask[row, end:], ids[row, end:], labels[row, end:] = 0, 0, -100
            labels[row, : max(1, end - count)] = -100
            if count == 0:
                labels[row] = -100
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    @property
    def items(self) -> int:
        """How many labels the whole batch has."""
        return int((self.batch()["labels"][:, 1:] != -100).sum())

    def share(self, rank: int) -> dict[str, Tensor]:
        """The rows of one process, and the number by which all divide."""
        size = len(self.labels) // WORLD
        rows = slice(rank * size, (rank + 1) * size)
        mine = {name: x[rows] for name, x in self.batch().items()}
        return {**mine, "num_items_in_batch": torch.tensor(self.items)}

    def truth(self, reference: Tensor | None = None) -> Found:
        """Loss and gradients of one process with the whole batch, from materialised logits."""
        model, batch = self.model(), self.batch()
        if self.safety is None:
            loss = model(**batch).loss
        else:
            loss = dense_loss(
                model, batch, self.safety, self.positions, num_items=self.items,
                reference=reference,
            )  # fmt: skip
        loss.backward()
        return Found(loss.item(), gradients(model))


@dataclass
class Found:
    """What a run gives: its loss, and gradients by plain names."""

    loss: float
    gradients: dict[str, Tensor]
    more: dict[str, Any] = field(default_factory=dict)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """The whole gradient of every trained parameter that has one, whatever wraps it."""
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    found = {n: p.grad for n, p in trained.items() if p.grad is not None}
    return {_plain(n): _whole(g).detach().clone() for n, g in found.items()}


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _plain(name: str) -> str:
    for wrapper in ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "module."):
        name = name.replace(wrapper, "")
    return name


def step(case: Case, model: Callable[..., Any], bare: nn.Module | None = None) -> Found:
    """One forward and backward in this process, as a trainer does them: the mean over processes."""
    rank = torch.distributed.get_rank()
    loss = model(**case.share(rank)).loss * WORLD
    loss.backward()
    mean = loss.detach().clone() / WORLD
    torch.distributed.all_reduce(mean)
    return Found(mean.item(), gradients(bare or model))


def assert_right(
    found: list[Found], want: Found, gradient: float = GRADIENTS, loss: float = LOSS
) -> None:
    """Every process has the loss and the gradients of one process with the whole batch."""
    for mine in found:
        assert abs(mine.loss - want.loss) <= loss * abs(want.loss), (mine.loss, want.loss)
        names = sorted(mine.gradients), sorted(want.gradients)
        assert names[0] == names[1], names
        errors = {n: relative(mine.gradients[n], want.gradients[n]) for n in want.gradients}
        assert max(errors.values()) <= gradient, errors
