"""Inference: prompts to token ids, left-padded batches, logits, greedy answers.

Every function restores what it changes of the model (train mode, random state, generation settings)
and records no gradient.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from str_kernels.huggingface.deferred.modes import evaluates_otherwise
from str_kernels.inputs.template import Tools, render
from str_kernels.ranks import sharing

Prompt = str | list[dict[str, Any]]


@contextmanager
def reading(model: nn.Module) -> Iterator[None]:
    """Set eval mode without gradients; restore every module's mode and the random state."""
    modes = [(module, module.training) for module in model.modules()]
    device = next(model.parameters()).device
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        model.eval()
        for module, mode in modes:
            if evaluates_otherwise(module):
                module.training = mode
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode


def prompt_token_ids(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, tools: Tools = None
) -> list[int]:
    """Encode a request up to where the answer begins, with the tokenizer's chat template.

    Raises:
        ValueError: the template rejects the conversation.
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    text = render(tokenizer, messages, answer_next=True, tools=tools)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def check_fits(model: nn.Module, name: str, prompts: Sequence[Sequence[int]], more: int) -> None:
    """Refuse prompts that leave no room for ``more`` tokens.

    Raises:
        ValueError: it names the first prompt that does not fit, counted from 1, and their number.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    long = [i for i, ids in enumerate(prompts) if limit and len(ids) + more > limit]
    if long:
        raise ValueError(
            f"{name}: prompt {long[0] + 1} has {len(prompts[long[0]])} tokens, and {more} more do "
            f"not fit into the model's context of {limit} ({len(long)} such prompts in all): "
            "shorten the prompts or the answers."
        )


def left_padded(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> dict[str, Tensor]:
    """Return ``input_ids`` and ``attention_mask`` ``[B, T]``; all rows end in the last column."""
    width = max(map(len, rows))
    ids = [[pad] * (width - len(row)) + list(row) for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return {
        "input_ids": torch.tensor(ids, device=device),
        "attention_mask": torch.tensor(mask, device=device),
    }


def last_logits(model: nn.Module, rows: Sequence[Sequence[int]], keep: int, pad: int) -> Tensor:
    """Return the logits ``[B, keep, V]`` of the last ``keep`` positions of each sequence."""
    batch = left_padded(rows, pad, next(model.parameters()).device)
    known = inspect.signature(_unwrapped(model).forward).parameters
    if "position_ids" in known:
        batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    if "logits_to_keep" in known:
        batch["logits_to_keep"] = keep
    if "use_cache" in known:
        batch["use_cache"] = False
    return model(**batch).logits[:, -keep:]


def generate_greedy(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int = 8,
    on_answer: Callable[[int, list[int]], None] | None = None,
) -> list[list[int]]:
    """Generate the likeliest token at each step, whatever the model's own settings are.

    Args:
        model: a causal language model, in any mode.
        tokenizer: names the padding token and an end token; the model may name further end tokens.
        prompts: the token ids of each prompt.
        max_new_tokens: longest answer.
        batch_size: prompts in one forward pass; the longest come together.
        on_answer: called with ``(index, answer)`` as soon as an answer is complete.

    Returns:
        The answers' token ids, in the order of the prompts, without the end token.

    Raises:
        ValueError: a prompt leaves no room for the answer in the model's context.
    """
    check_fits(model, "prompts", prompts, max_new_tokens)
    ends = end_tokens(model, tokenizer)
    pad = _pad_token(tokenizer)
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        pad_token_id=pad,
        eos_token_id=sorted(ends) or None,
    )
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    answers: list[list[int]] = [[] for _ in prompts]
    with reading(model), _generation_config(model, config):
        device = next(model.parameters()).device

        def generate(chosen: list[int]) -> list[list[int]]:
            batch = left_padded([prompts[index] for index in chosen], pad, device)
            return model.generate(**batch)[:, batch["input_ids"].shape[1] :].tolist()

        batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
        answered = sharing().in_order(batches, generate)
        for chosen, output in zip(batches, answered, strict=True):
            for index, answer in zip(chosen, output, strict=True):
                answers[index] = list(takewhile(lambda token: token not in ends, answer))
                if on_answer is not None:
                    on_answer(index, answers[index])
    return answers


def _unwrapped(model: nn.Module) -> nn.Module:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _pad_token(tokenizer: PreTrainedTokenizerBase) -> int:
    return 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def end_tokens(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the tokens at which generation stops: the model's and the tokenizer's."""
    named = _unwrapped(model).generation_config.eos_token_id
    ends = set(named if isinstance(named, list) else [named]) | {tokenizer.eos_token_id}
    return ends - {None}


@contextmanager
def _generation_config(model: nn.Module, config: GenerationConfig) -> Iterator[None]:
    """Replace the model's own settings, whose penalties would change greedy decoding."""
    holders = list({id(m): m for m in (model, _unwrapped(model))}.values())
    kept = [holder.generation_config for holder in holders]
    try:
        for holder in holders:
            holder.generation_config = config
        yield
    finally:
        for holder, own in zip(holders, kept, strict=True):
            holder.generation_config = own
