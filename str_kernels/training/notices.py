"""What a user should know of the data before the slow work begins: what is cut, left out, unread.

Stage: `Prepared` → sentences. `str-kernels train` and `str-kernels cache` say the same ones.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from str_kernels.inputs.chat import IGNORED, Encoded
from str_kernels.inputs.data import TrainingData
from str_kernels.inputs.unread import sentence
from str_kernels.probe.asked import row_token_ids
from str_kernels.safety.inference import end_tokens
from str_kernels.training.checks import Prepared


def data_notices(prepared: Prepared) -> Iterator[str]:
    """Yield a sentence for everything that happened to the data."""
    limit, longest = prepared.settings.max_length, prepared.data.facts()["longest"]
    for file in prepared.files:
        yield from _file_notices(file, limit)
    widest = max((file.facts()["longest"] for file in prepared.anchors), default=0)
    if widest > longest:
        yield (
            f"anchors of up to {widest} tokens widen every batch that they join, for the data's "
            f"longest row has {longest}: shorten them, or lower max_length."
        )
    if asked := _trained_on(prepared):
        yield (
            f"{prepared.settings.probe}: {asked} of {len(prepared.probe)} requests of the probe "
            "are in the data or the anchors, so that the probe says nothing about others; give "
            "requests that are not trained on."
        )
    if prepared.default_template:
        yield "The tokenizer has no chat template; the default one is used."


def _trained_on(prepared: Prepared) -> int:
    """Count the requests of the probe with which a row of the data or of the anchors begins."""
    requests = [row_token_ids(prepared.tokenizer, row) for row in prepared.probe]
    rows = [s.input_ids for file in (prepared.data, *prepared.anchors) for s in file.sequences]
    return sum(any(row[: len(ids)] == ids for row in rows) for ids in requests)


def _file_notices(file: TrainingData, limit: int) -> Iterator[str]:
    facts = file.facts()
    path, rows = facts["path"], facts["rows"]
    if facts["skipped_rows"]:
        yield (
            f"{path}: {facts['skipped_rows']} of {rows + facts['skipped_rows']} rows are left out, "
            f"for their prompts leave no room for an answer in {limit} tokens."
        )
    if facts["truncated_prompts"]:
        yield (
            f"{path}: {facts['truncated_prompts']} of {rows} prompts are read without their "
            f"middle, for they leave no room for an answer in {limit} tokens."
        )
    if facts["cut_responses"]:
        yield f"{path}: {facts['cut_responses']} of {rows} responses are cut at {limit} tokens."
    if facts["unlearned_turns"]:
        yield (
            f"{path}: {facts['unlearned_turns']} earlier answers are read but not learned: they "
            "begin the conversation, or the chat template rewrites them."
        )
    if file.unread:
        yield sentence(path, file.unread)


def end_notice(prepared: Prepared, model: torch.nn.Module) -> str | None:
    """Say that the answers hold no token at which generation stops, or return None."""
    tokenizer, sequences = prepared.tokenizer, prepared.data.sequences
    ends = end_tokens(model, tokenizer)
    endless = [s for s in sequences if not s.cut and not ends.intersection(s.labels)]
    if not endless:
        return None
    last = _last_learned(endless[0])
    own = model.generation_config.eos_token_id
    return (
        f"{prepared.data.source}: {len(endless)} of {len(sequences)} rows learn no end token, so "
        "that answers may never end: their last token is "
        f"{tokenizer.convert_ids_to_tokens(last)!r} ({last}), the tokenizer's end token is "
        f"{tokenizer.eos_token!r} ({tokenizer.eos_token_id}), and the generation config's "
        f"eos_token_id is {own}. Let the chat template end an answer with one of these, or add "
        "the token that it writes to generation_config.json."
    )


def _last_learned(sequence: Encoded) -> int:
    return [label for label in sequence.labels if label != IGNORED][-1]
