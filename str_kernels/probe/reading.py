"""What one probe reads off a model: its log-probabilities of given openings and of safety tokens.

Stage: a model in any mode, requests with openings → `Reading`, two small tensors on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from str_kernels.huggingface.deferred.sharding import is_fsdp1
from str_kernels.safety.inference import end_tokens, generate_greedy, last_logits, reading

BATCH = 8  # requests in one forward
_PAD = 0  # any token: the mask hides it

Exchange = tuple[Sequence[int], Sequence[int]]  # token ids of a request and of an opening


class Reading(NamedTuple):
    """What a model gives to n requests.

    Attributes:
        openings: ``log P(opening | request)``, ``[n]`` fp64: a sum over the opening's tokens.
        safety: log-probabilities of the K safety tokens where an answer begins, ``[n, K]`` fp64.
    """

    openings: Tensor
    safety: Tensor


def read(model: nn.Module, exchanges: Sequence[Exchange], token_ids: Sequence[int]) -> Reading:
    """Read a model; its modes, gradients and the random state stay as they are."""
    found = []
    with reading(model):
        for start in range(0, len(exchanges), BATCH):
            batch = exchanges[start : start + BATCH]
            rows = [[*request, *opening[:-1]] for request, opening in batch]
            logits = last_logits(model, rows, max(len(opening) for _, opening in batch), _PAD)
            for row, (_, opening) in zip(logits, batch, strict=True):
                found.append(_read_row(row[-len(opening) :].float(), opening, token_ids))
    sums, safety = zip(*found, strict=True)
    return Reading(torch.stack(sums).cpu().double(), torch.stack(safety).cpu().double())


def answers_of(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Sequence[int]],
    length: int,
) -> list[list[int]]:
    """Return at most ``length`` of the likeliest tokens after each request, no end token."""
    if not any(is_fsdp1(module) for module in model.modules()):
        return generate_greedy(model, tokenizer, requests, max_new_tokens=length, batch_size=BATCH)
    ends = end_tokens(model, tokenizer)
    found = _greedy(model, requests, length)
    return [list(takewhile(lambda token: token not in ends, answer)) for answer in found]


def _greedy(model: nn.Module, requests: Sequence[Sequence[int]], length: int) -> list[list[int]]:
    """As many whole forwards in every process: FSDP1's ``generate`` goes past the root's shards."""
    answers: list[list[int]] = [[] for _ in requests]
    with reading(model):
        for start in range(0, len(requests), BATCH):
            chosen = range(start, min(start + BATCH, len(requests)))
            for _ in range(length):
                rows = [[*requests[i], *answers[i]] for i in chosen]
                likeliest = last_logits(model, rows, 1, _PAD)[:, -1].argmax(-1).tolist()
                for i, token in zip(chosen, likeliest, strict=True):
                    answers[i].append(token)
    return answers


def _read_row(
    logits: Tensor, opening: Sequence[int], token_ids: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """The sum over an opening, and the safety tokens' log-probabilities, of ``[T, V]`` logits."""
    lse = logits.logsumexp(-1)
    own = logits.gather(-1, torch.tensor([opening], device=logits.device).T)[:, 0]
    held = logits[0, torch.tensor(token_ids, dtype=torch.long, device=logits.device)]
    return (own - lse).sum(), held - lse[0]
