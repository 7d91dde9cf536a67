"""Find out which tokens are identified, and how much that depends on what the model is asked.

Stage: aligned model → tokens found with everything, and with halves of templates and of requests →
how many of the K are the same.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from str_kernels.safety.templates import REFUSED_REQUESTS, REJECTION_TEMPLATES
from str_kernels.safety.tokens import SafetyTokens

SHOWN = 32


def identification(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, top_k: int
) -> dict[str, Any]:
    """Return tokens, scores, and the overlap of what two halves find, as plain JSON types."""

    def found(**given: Any) -> SafetyTokens:
        return SafetyTokens.identify(model, tokenizer, top_k=top_k, **given)

    whole = found()
    halves = {
        "templates": [found(templates=REJECTION_TEMPLATES[i::2]) for i in range(2)],
        "requests": [found(prompts=REFUSED_REQUESTS[i::2]) for i in range(2)],
    }
    named = SafetyTokens.from_strings(tokenizer, REJECTION_TEMPLATES)
    return {
        "top_k": top_k,
        "tokens": list(whole.tokens[:SHOWN]),
        "scores": [float(f"{score:.3g}") for score in whole.scores[:SHOWN]],
        "score_share": sum(whole.scores[: top_k // 4]) / sum(whole.scores),
        "overlap": {name: overlap(*pair) for name, pair in halves.items()},
        "in_templates": overlap(whole, named),
    }


def overlap(a: SafetyTokens, b: SafetyTokens) -> float:
    """Return the share of the smaller set's tokens that are in the other."""
    common = set(a.token_ids) & set(b.token_ids)
    return len(common) / min(len(a), len(b))
