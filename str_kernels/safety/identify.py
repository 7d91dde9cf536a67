"""Which tokens refusing raises most: the score of every token, and the choice of K of them.

Stage: rejection templates after refused requests, and the model's own answers to benign requests
→ mean next-token probabilities ``[V]`` of each group → their difference, word by word → K ids.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from str_kernels.options import MAX_SAFETY_TOKENS
from str_kernels.ranks import sharing
from str_kernels.safety.inference import (
    Prompt,
    check_fits,
    generate_greedy,
    last_logits,
    prompt_token_ids,
    reading,
)
from str_kernels.safety.templates import BENIGN_REQUESTS, REFUSED_REQUESTS, REJECTION_TEMPLATES
from str_kernels.safety.vocabulary import is_word, special_ids, spellings, token_text

ROUNDS = 2  # each template and each prompt is used at least this often, in different pairs
BENIGN_ANSWER_TOKENS = 24  # about the length of a rejection template
RARE_SPELLING = 0.01  # share of the score of a word's best spelling; the model uses none below
CANDIDATES_PER_TOKEN = 8  # words that are compared for each of the K tokens

Exchange = tuple[list[int], list[int]]  # token ids of a prompt and of its answer


def identify(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: dict[str, Sequence[Prompt] | None],
    *,
    top_k: int,
    batch_size: int,
) -> tuple[list[int], list[float]]:
    """Return ids and scores of the ``top_k`` tokens, highest score first.

    `SafetyTokens.identify` describes the arguments; ``texts`` are its three lists by name.
    """
    if isinstance(top_k, bool) or not isinstance(top_k, int) or not 1 <= top_k <= MAX_SAFETY_TOKENS:
        raise ValueError(f"top_k={top_k!r}: must be an integer from 1 to {MAX_SAFETY_TOKENS}.")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size!r}: must be 1 or more.")
    templates = _given(texts, "templates", REJECTION_TEMPLATES)
    refused, benign = (
        [prompt_token_ids(tokenizer, prompt) for prompt in _given(texts, name, default)]
        for name, default in (("prompts", REFUSED_REQUESTS), ("benign_prompts", BENIGN_REQUESTS))
    )
    rejections = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in templates]
    check_fits(model, "prompts", refused, max(map(len, rejections)))
    check_fits(model, "benign_prompts", benign, BENIGN_ANSWER_TOKENS)

    answers = generate_greedy(
        model, tokenizer, benign, max_new_tokens=BENIGN_ANSWER_TOKENS, batch_size=batch_size
    )
    pad = tokenizer.pad_token_id or 0
    raised = mean_probabilities(model, _paired(refused, rejections), pad, batch_size)
    usual = mean_probabilities(model, list(zip(benign, answers, strict=True)), pad, batch_size)
    return select(tokenizer, raised - usual, top_k)


def mean_probabilities(
    model: nn.Module, exchanges: Sequence[Exchange], pad: int, batch_size: int
) -> Tensor:
    """Return the mean next-token distribution along the answers, ``[V]`` fp32 on the CPU.

    All answers have the same weight; an empty one counts by the position where it would begin.
    """
    ordered = sorted(exchanges, key=lambda pair: len(pair[0]) + len(pair[1]))
    batches = (ordered[i : i + batch_size] for i in range(0, len(ordered), batch_size))

    def means(batch: Sequence[Exchange]) -> list[Tensor]:
        lengths = [max(1, len(answer)) for _, answer in batch]
        rows = [prompt + answer[:-1] for prompt, answer in batch]
        logits = last_logits(model, rows, max(lengths), pad)
        return [
            logits[row, -length:].float().softmax(-1).mean(0).cpu()
            for row, length in enumerate(lengths)
        ]

    total: Tensor | None = None
    with reading(model):
        for found in sharing().in_order(batches, means):
            for mean in found:
                total = mean if total is None else total + mean
    return total / len(ordered)


def select(
    tokenizer: PreTrainedTokenizerBase, scores: Tensor, top_k: int
) -> tuple[list[int], list[float]]:
    """Choose the tokens of the words whose spellings together have the highest scores.

    It leaves out a spelling that refusing hardly raises beside the word's best one: capitals and
    spaces that nobody writes would take three quarters of the K places. ``scores`` is ``[V]``, one
    for each row of the head.
    """
    vocabulary = tokenizer.get_vocab()
    left_out = special_ids(tokenizer)
    words: dict[tuple[int, ...], float] = {}
    for token in scores.topk(min(CANDIDATES_PER_TOKEN * top_k, len(scores))).indices.tolist():
        text = token_text(tokenizer, token)
        if token in left_out or not is_word(text):
            continue
        found = set(spellings(tokenizer.convert_ids_to_tokens(token), vocabulary)) | {token}
        usable = tuple(sorted(t for t in found - left_out if t < len(scores)))
        words[usable] = scores[list(usable)].sum().item()
    chosen: list[int] = []
    for usable, score in sorted(words.items(), key=lambda item: -item[1]):
        if score <= 0 or len(chosen) >= top_k:
            break
        best_first = sorted(usable, key=lambda token: -scores[token].item())
        least = RARE_SPELLING * scores[best_first[0]]
        used = [token for token in best_first if scores[token] >= least]
        chosen += used[: top_k - len(chosen)]
    if not chosen:
        raise ValueError("refusing raises no word of this vocabulary: give other prompts.")
    chosen.sort(key=lambda token: -scores[token].item())
    return chosen, [scores[token].item() for token in chosen]


def _paired(prompts: list[list[int]], answers: list[list[int]]) -> list[Exchange]:
    """Pair prompts and answers: each is used at least ``ROUNDS`` times, and no pair twice."""
    longest = max(len(prompts), len(answers))
    pairs = {
        (index % len(prompts), (index + turn) % len(answers))
        for turn in range(ROUNDS)
        for index in range(longest)
    }
    return [(prompts[prompt], answers[answer]) for prompt, answer in sorted(pairs)]


def _given(texts: dict[str, Sequence | None], name: str, default: Sequence) -> list:
    values = default if texts[name] is None else texts[name]
    if isinstance(values, str) or not list(values):
        raise ValueError(f"{name}={values!r}: must be a list with at least one entry.")
    for position, value in enumerate(values):
        if not value or (isinstance(value, str) and not value.strip()):
            raise ValueError(f"{name}[{position}]={value!r}: must contain text.")
    return list(values)
