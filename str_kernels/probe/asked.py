"""What a `SafetyProbe` was asked for, checked; and the aligned model's answer to it.

Stage: prompts and options → `Asked` → with a model and its tokenizer → `Aligned`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from str_kernels.huggingface.deferred.head import find_patch
from str_kernels.inputs.rows import Row, prompt_messages
from str_kernels.probe import EVERY, WARN_BELOW
from str_kernels.probe.aligned import (
    LONGEST,
    Aligned,
    aligned_weights,
    key_of,
    measure,
    refusal_openings,
)
from str_kernels.safety.inference import Prompt, check_fits, prompt_token_ids


@dataclass(frozen=True)
class Asked:
    """The arguments of a probe, as plain JSON types.

    Raises:
        ValueError: no prompts, or a number outside its range.
    """

    prompts: Sequence[Prompt | Row]
    every: int = EVERY
    openings: Sequence[str] | None = None
    tokens: Sequence[int] | None = None
    warn_below: float = WARN_BELOW
    stop_below: float | None = None

    def __post_init__(self) -> None:
        """Check every field."""
        _check_texts("prompts", self.prompts)
        if self.openings is not None:
            _check_texts("openings", self.openings)
            if len(self.openings) != len(self.prompts):
                raise ValueError(
                    f"openings={len(self.openings)} texts: must be one for each of the "
                    f"{len(self.prompts)} prompts."
                )
        if isinstance(self.every, bool) or not isinstance(self.every, int) or self.every < 1:
            raise ValueError(f"every={self.every!r}: must be a number of steps, 1 or more.")
        for name in ("warn_below", "stop_below"):
            bound = getattr(self, name)
            given = bound is not None or name == "warn_below"
            if given and not (isinstance(bound, int | float) and 0 < bound <= 1):
                raise ValueError(f"{name}={bound!r}: must be above 0 and at most 1.")

    def as_dict(self) -> dict[str, Any]:
        """Convert to JSON types."""
        lists = {
            name: None if (value := getattr(self, name)) is None else list(value)
            for name in ("prompts", "openings", "tokens")
        }
        return {**dataclasses.asdict(self), **lists}

    def answered(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase | None,
        earlier: Aligned | None,
        *,
        begun: bool,
        say: Callable[[str], None],
    ) -> Aligned:
        """Ask the aligned model, unless ``earlier`` is its answer to the same; ``begun``: trained.

        Raises:
            ValueError: there is no tokenizer, a prompt is too long, the aligned model refuses none,
                or cannot be asked any more.
        """
        if tokenizer is None:
            raise ValueError("tokenizer=None: the trainer has no processing class; give one.")
        requests = [row_token_ids(tokenizer, prompt) for prompt in self.prompts]
        check_fits(model, "prompts", requests, LONGEST)
        tokens = self._safety_tokens(model)
        key = key_of(requests, self.openings, tokens)
        if earlier is not None and earlier.key == key:
            return earlier
        with aligned_weights(model, begun=begun):
            if self.openings is None:
                found = from_first(refusal_openings(model, tokenizer, requests))
            else:
                found = [tokenizer(t, add_special_tokens=False)["input_ids"] for t in self.openings]
            refused = [pair for pair in zip(requests, found, strict=True) if pair[1]]
            _check_refused(len(requests), len(refused), say)
            return from_first(measure(model, refused, tokens, key))

    def _safety_tokens(self, model: nn.Module) -> list[int]:
        if self.tokens is not None:
            return [int(token) for token in self.tokens]
        patch = find_patch(model)
        safety = None if patch is None else patch.options.safety
        return [] if safety is None else [int(token) for token in safety.token_ids]


def from_first(value: Any) -> Any:
    """Return the first process's value: all have to decide alike."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return value
    box = [value]
    torch.distributed.broadcast_object_list(box)
    return box[0]


def _check_refused(asked: int, refused: int, say: Callable[[str], None]) -> None:
    if not refused:
        raise ValueError(
            f"prompts: the aligned model refuses none of {asked}, so there is nothing to lose; "
            "give requests that it refuses, or openings= where it refuses in words that the judge "
            "does not know."
        )
    if refused < asked:
        say(
            f"The aligned model refuses {refused} of {asked} requests of the probe; the others are "
            "left out."
        )


def _check_texts(name: str, given: Sequence[Any]) -> None:
    if isinstance(given, str) or not list(given) or not all(given):
        raise ValueError(f"{name}={given!r:.80}: must be a list of texts, none of them empty.")


def row_token_ids(tokenizer: PreTrainedTokenizerBase, prompt: Prompt | Row) -> list[int]:
    """Encode a request up to where the answer begins, whatever form it has."""
    if isinstance(prompt, dict):
        return prompt_token_ids(tokenizer, prompt_messages(prompt), prompt.get("tools"))
    return prompt_token_ids(tokenizer, prompt)
