"""Turn texts into the hidden states that a model hands to its head, and the tokens that follow."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from str_kernels.inputs.chat import IGNORED
from str_kernels.inputs.data import encode_file, read_numbered
from str_kernels.inputs.loading import load_model_and_tokenizer
from str_kernels.safety.inference import reading

_log = logging.getLogger("str_kernels")
_LENGTH = 512  # tokens of a sequence


def read_states(
    model: str, data: str | Path | None, rows: int, positions: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return states ``[N, D]``, labels ``[N]``, head ``[V, D]``, fp32; N is at most ``rows``."""
    if data is not None and not Path(data).is_file():
        raise ValueError(f"data={str(data)!r}: no such file.")
    loaded, tokenizer = load_model_and_tokenizer(model, dtype="float32", device="cpu")
    states, labels, found = [], [], 0
    with reading(loaded):
        for ids, targets in _sequences(data, tokenizer):
            outputs = loaded.base_model(input_ids=torch.tensor([ids]), use_cache=False)
            following = torch.tensor((ids if positions == "all" else targets)[1:])
            labelled = following != IGNORED
            states.append(outputs.last_hidden_state[0, :-1][labelled])
            labels.append(following[labelled])
            found += len(labels[-1])
            if found >= rows:
                break
        _tell_of_other_arithmetic(loaded, ids[:8])
    if found < 2:
        raise ValueError(f"data={str(data)!r}: has {found} positions to predict; must have 2.")
    weight = loaded.get_output_embeddings().weight.detach()
    return torch.cat(states)[:rows], torch.cat(labels)[:rows], weight


def _tell_of_other_arithmetic(model: torch.nn.Module, ids: list[int]) -> None:
    """Warn if the model does more to its states than multiply them by the head's weight."""
    outputs = model(input_ids=torch.tensor([ids]), use_cache=False, output_hidden_states=True)
    plain = outputs.hidden_states[-1] @ model.get_output_embeddings().weight.T
    if not torch.allclose(plain, outputs.logits, rtol=1e-3, atol=1e-3):
        _log.warning("the logits' scale, softcap or bias is left out: not every contender has one")


def _sequences(data: str | Path | None, tokenizer: Any) -> Iterator[tuple[list[int], list[int]]]:
    """Yield token ids and labels, a sequence at a time."""
    if data is not None and Path(data).suffix == ".jsonl":
        for row in read_numbered(data):
            encoded = encode_file(data, [row], tokenizer, max_length=_LENGTH).sequences[0]
            yield encoded.input_ids, encoded.labels
        return
    for text in prose(data):
        ids = tokenizer(text)["input_ids"]
        for start in range(0, len(ids), _LENGTH):
            part = ids[start : start + _LENGTH]
            yield part, part


def prose(data: str | Path | None) -> Iterator[str]:
    """Yield the text of a file; None: Python's manual, a subject at a time."""
    if data is not None:
        yield Path(data).read_text(encoding="utf-8")
        return
    from pydoc_data.topics import topics  # half a million characters of English, everywhere

    yield from topics.values()
