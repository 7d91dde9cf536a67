"""Which tokens are constrained, and to what: the choices that the experiment compares."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from filelock import FileLock
from transformers import PreTrainedTokenizerBase

from benchmarks.safety.methods import Method
from str_kernels.huggingface import build_reference_cache
from str_kernels.huggingface.constraint.references import content_key, reference_unit
from str_kernels.options import SafetyConstraint
from str_kernels.safety.templates import REJECTION_TEMPLATES
from str_kernels.safety.tokens import SafetyTokens
from str_kernels.safety.vocabulary import is_word, token_text

RANDOM_SEED = 1  # draws the control's tokens: the same in every run


def token_ids(
    method: Method, model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, work: Path
) -> tuple[int, ...]:
    """Return the method's K tokens; those that a model had to find are saved in ``work``."""
    if method.tokens == "random":
        words = sorted(tokenizer.get_vocab().values())
        return tuple(random.Random(RANDOM_SEED).sample(words, method.top_k))
    if method.tokens == "templates":
        return commonest(tokenizer, method.top_k)
    path = work / f"tokens-{method.top_k}.json"
    with FileLock(f"{path}.lock"):  # another run may want the same at the same time
        if not path.is_file():
            SafetyTokens.identify(model, tokenizer, top_k=method.top_k).save(path)
    return SafetyTokens.load(path, tokenizer).token_ids


def commonest(tokenizer: PreTrainedTokenizerBase, top_k: int) -> tuple[int, ...]:
    """Return the words that the rejection templates have most often, the commonest first."""
    each = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in REJECTION_TEMPLATES)
    counted = Counter(token for ids in each for token in ids).most_common()
    words = [token for token, _ in counted if is_word(token_text(tokenizer, token))]
    if len(words) < top_k:
        raise ValueError(f"top_k={top_k}: the templates have {len(words)} words.")
    return tuple(words[:top_k])


def context_reference(
    model: torch.nn.Module,
    safety: SafetyConstraint,
    batches: Callable[[], Iterable[dict[str, torch.Tensor]]],
    task: str,
    work: Path,
) -> Path:
    """Compute the aligned model's logits at every position of the task's rows, once."""
    unit = reference_unit(safety).replace(" ", "-")
    path = work / f"reference-{task}-{unit}-{content_key(safety.token_ids)}.safetensors"
    with FileLock(f"{path}.lock"):
        if not path.is_file():
            part = path.with_suffix(".part")
            build_reference_cache(model, batches(), part, safety)
            part.rename(path)
    return path
