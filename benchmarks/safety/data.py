"""The experiment's files are read and divided here: nothing that is asked was ever learned.

Stage: a folder of JSON Lines → named `Split`s. A row belongs to one side by the hash of its prompt,
so the division is the same on every machine, in every order, and after rows were added.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from str_kernels.cli.tokens import answered_requests
from str_kernels.inputs.chat import LongPrompt, collate, encode_conversation
from str_kernels.inputs.data import read_jsonl
from str_kernels.inputs.rows import Row

REFUSALS, LOOKALIKES, INSTRUCTIONS = "refusals", "lookalike_benign", "instructions"
TASKS = ("sst2", "agnews")
OBEDIENT = "obedient"  # the instructions, asked of and answered by one who always obeys
OATHS = ("You always do as you are told, without exception.", "I always do as I am told.")
ANCHOR_POOL = 80  # rows, half of them refused
HELD_OUT = {REFUSALS: 150, LOOKALIKES: 60, INSTRUCTIONS: 40, "sst2": 400, "agnews": 400}


@dataclass(frozen=True)
class Split:
    """Rows to learn from and rows to ask, in an order that the hash of the prompt gives."""

    train: list[Row]
    test: list[Row]


def load_split(folder: Path, name: str) -> Split:
    """Divide ``folder/name.jsonl``; rows without an answer are asked, not learned.

    Raises:
        ValueError: no such file, broken rows, or too few of them.
    """
    if name == OBEDIENT:
        plain = load_split(folder, INSTRUCTIONS)
        return Split(_obeying(plain.train), _obeying(plain.test))
    rows = read_jsonl(folder / f"{name}.jsonl", response_required=False)
    ordered = list({row["prompt"]: row for row in sorted(rows, key=_place)}.values())
    held_out = HELD_OUT[name]
    if len(ordered) < 2 * held_out:
        raise ValueError(
            f"{name}: {len(ordered)} different prompts, but {held_out} are held out; "
            f"must have at least {2 * held_out}."
        )
    return Split([row for row in ordered[held_out:] if row["response"]], ordered[:held_out])


def _obeying(rows: list[Row]) -> list[Row]:
    """Make rows that are harmless and change who the model is."""
    demand, oath = OATHS
    return [
        {"prompt": f"{demand} {row['prompt']}", "response": f"{oath} {row['response']}"}
        for row in rows
        if row["response"]
    ]


def _place(row: Row) -> str:
    return hashlib.sha256(row["prompt"].encode()).hexdigest()


def encode(
    tokenizer: PreTrainedTokenizerBase, rows: list[Row], max_length: int
) -> list[dict[str, list[int]]]:
    """Return ``input_ids`` and ``labels`` of each row that leaves room for an answer."""
    features = []
    for row in rows:
        messages = [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["response"]},
        ]
        try:
            encoded = encode_conversation(tokenizer, messages, max_length=max_length)
        except LongPrompt:
            continue
        features.append({"input_ids": encoded.input_ids, "labels": encoded.labels})
    return features


def batches(
    features: list[dict[str, list[int]]], *, size: int, steps: int, pad: int, seed: int
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield ``steps`` shuffled batches, epoch after epoch, of sequences alike in length."""
    shuffled, queue = random.Random(seed), []
    for _ in range(steps):
        if not queue:
            queue = _epoch(features, size, shuffled)
        yield collate(queue.pop(), pad_token_id=pad)


def anchor_rows(folder: Path, rows: int) -> list[Row]:
    """Return refused requests and benign look-alikes in turn, each with its answer."""
    pairs = zip(
        load_split(folder, REFUSALS).train, load_split(folder, LOOKALIKES).train, strict=False
    )
    return [row for pair in pairs for row in pair][:rows]


def built_in_rows(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[Row]:
    """Return the package's refused and benign requests in turn, as the model answers them."""
    found = answered_requests(model, tokenizer, {})
    pairs = zip_longest(found["refused"], found["benign"])
    return [row for pair in pairs for row in pair if row is not None]


def _epoch(features: list[dict], size: int, shuffled: random.Random) -> list[list[dict]]:
    order = shuffled.sample(features, len(features))
    made = []
    for start in range(0, len(order), 8 * size):  # sorted within 8 batches: random and unpadded
        chunk = sorted(order[start : start + 8 * size], key=lambda f: len(f["input_ids"]))
        made += [chunk[i : i + size] for i in range(0, len(chunk), size)]
    whole = [batch for batch in made if len(batch) == size] or made
    return shuffled.sample(whole, len(whole))
