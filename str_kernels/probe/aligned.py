"""What the aligned model begins its refusals with, found once, before training changes a weight.

Stage: requests → the aligned model's greedy openings → those that the judge calls refusals →
`Aligned`, which is JSON and travels in the trainer's checkpoints.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from str_kernels.evaluation.judge import is_refusal
from str_kernels.evaluation.reasoning import open_thought
from str_kernels.huggingface.constraint.adapters import adapter_layers, adapters_off, trainable_base
from str_kernels.probe.reading import Reading, answers_of, read

LONGEST = 16  # tokens of an answer that are judged; most refusals show by the sixth
_TAIL = 16  # tokens; the mark that opens a thought has fewer


@dataclass(frozen=True)
class Aligned:
    """The aligned model's refusals of n requests.

    Args:
        requests: token ids of the n requests that it refuses.
        openings: token ids of what it begins each refusal with.
        token_ids: the K safety tokens; none where nothing is held.
        log_probs: ``log Q(opening | request)``, n.
        safety: its log-probabilities of the safety tokens where an answer begins, n × K.
        key: a hash of everything that was asked for.
    """

    requests: tuple[tuple[int, ...], ...]
    openings: tuple[tuple[int, ...], ...]
    token_ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    safety: tuple[tuple[float, ...], ...]
    key: str

    @property
    def exchanges(self) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """Each request with its opening."""
        return list(zip(self.requests, self.openings, strict=True))

    @property
    def reading(self) -> Reading:
        """What the aligned model itself gives."""
        shape = len(self.requests), len(self.token_ids)
        safety = torch.tensor(self.safety, dtype=torch.float64).reshape(shape)
        return Reading(torch.tensor(self.log_probs, dtype=torch.float64), safety)

    def as_dict(self) -> dict[str, Any]:
        """Convert to JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, read: dict[str, Any]) -> Aligned:
        """Make again what ``as_dict`` converted."""
        deep = ("requests", "openings", "safety")
        given = {**read, **{name: tuple(map(tuple, read[name])) for name in deep}}
        return cls(**{n: tuple(v) if isinstance(v, list) else v for n, v in given.items()})


def key_of(*asked: Any) -> str:
    """Return a hash of JSON values."""
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:32]


@contextmanager
def aligned_weights(model: nn.Module, *, begun: bool) -> Iterator[None]:
    """In this block the model is the aligned one.

    Args:
        model: with adapters that can be switched off, or not.
        begun: training has changed weights.

    Raises:
        ValueError: it has, and no adapters hold all of the change.
    """
    layers = adapter_layers(model)
    if begun and (not layers or trainable_base(model)):
        raise ValueError(
            "prompts: the checkpoint has no probe of these requests, and the model's own weights "
            "have been trained, so the aligned model cannot be asked; resume with the probe that "
            "the run began with, or without one."
        )
    if layers:
        with adapters_off(model):
            yield
    else:
        yield


def refusal_openings(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Sequence[int]],
) -> list[list[int] | None]:
    """Return what the model begins each refusal with, or None for a request that it answers.

    That is the shortest beginning of its greedy answer that the judge calls a refusal already:
    later tokens say what is refused, and how politely.
    """
    found, answers = [], answers_of(model, tokenizer, requests, LONGEST)
    for request, answer in zip(requests, answers, strict=True):
        mark = open_thought(tokenizer.decode(list(request)[-_TAIL:]))
        found.append(_shortest(answer, lambda ids, mark=mark: mark + _text(tokenizer, ids)))
    return found


def measure(
    model: nn.Module,
    exchanges: Sequence[tuple[Sequence[int], Sequence[int]]],
    token_ids: Sequence[int],
    key: str = "",
) -> Aligned:
    """Read the aligned model, which ``model`` has to be now."""
    found = read(model, exchanges, token_ids)
    return Aligned(
        requests=tuple(tuple(request) for request, _ in exchanges),
        openings=tuple(tuple(opening) for _, opening in exchanges),
        token_ids=tuple(token_ids),
        log_probs=tuple(found.openings.tolist()),
        safety=tuple(map(tuple, found.safety.tolist())),
        key=key,
    )


def _shortest(answer: list[int], text: Callable[[list[int]], str]) -> list[int] | None:
    if not is_refusal(text(answer)):
        return None
    beginnings = (answer[:length] for length in range(1, len(answer) + 1))
    return next(part for part in beginnings if is_refusal(text(part)))


def _text(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True)
