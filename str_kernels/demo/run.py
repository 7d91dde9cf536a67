"""The demo from end to end: align, fine-tune plainly and with STR, measure all three.

Stage: a seed → an aligned model → two adapters of it → `DemoResult`. Everything runs on the CPU.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from random import Random
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers import PrinterCallback, Trainer, TrainingArguments, set_seed

from str_kernels.demo.measure import (
    Behaviour,
    HeadSize,
    greedy_answers,
    held_out_prompts,
    measure_behaviour,
    measure_head,
)
from str_kernels.demo.model import features, make_model, make_tokenizer
from str_kernels.demo.text import Pair, alignment_conversations, conversation, task_conversations
from str_kernels.huggingface import patch_model
from str_kernels.inputs.chat import collate
from str_kernels.options import ConstraintKind, SafetyConstraint
from str_kernels.safety.tokens import SafetyTokens
from str_kernels.training.callbacks import StepTimer
from str_kernels.training.lora import add_lora

METHODS = ("aligned", "plain", "str")


@dataclass(frozen=True)
class DemoSettings:
    """What a run of the demo does; the defaults were chosen so that plain training erodes."""

    seed: int = 0  # of everything that is drawn
    align_steps: int = 600  # of 32 conversations, which make the aligned model
    tune_steps: int = 300  # of 16 questions of the benign task
    rank: int = 16  # of LoRA on every linear layer; alpha is twice that
    tune_rate: float = 3e-3  # learning rate of the fine-tuning
    kind: ConstraintKind = "mse"  # over ten seeds it held more than kl: docs/negative-results.md
    strength: float = 1.0  # λ of the constraint, on all positions
    top_k: int = 10  # safety tokens
    prompts: int = 300  # held-out prompts of each kind
    head: HeadSize = field(default_factory=HeadSize)  # whose memory is measured
    claims: bool = True  # whether the run is long enough for its numbers to mean anything

    @classmethod
    def quick(cls, seed: int = 0) -> DemoSettings:
        """Return settings for a few seconds: they show that it works, not what it achieves."""
        head = HeadSize(positions=512, vocabulary=8192)
        return cls(seed=seed, align_steps=150, tune_steps=60, prompts=60, head=head, claims=False)


@dataclass(frozen=True)
class DemoResult:
    """What was measured, with ``METHODS`` as keys."""

    settings: DemoSettings
    tokens: tuple[str, ...]  # the safety tokens' text
    behaviour: dict[str, Behaviour]
    step_seconds: dict[str, float]  # median fine-tuning step of "plain" and "str"
    head: dict[str, float]  # peak memory of the larger head by way, MiB
    examples: dict[str, dict[str, str]]  # requests, and each model's answers to them
    seconds: float  # of the whole run


def run_demo(settings: DemoSettings, say: Callable[[str], None] = lambda text: None) -> DemoResult:
    """Run all of it; ``say`` is called with what begins."""
    began = time.perf_counter()
    tokenizer, held_out = make_tokenizer(), held_out_prompts(settings.prompts)
    shown = [held_out[kind][0][0] for kind in ("forbidden", "lookalike", "benign")]
    behaviour, step_seconds, examples = {}, {}, {request: {} for request in shown}

    def measure(name: str, model: torch.nn.Module) -> None:
        say(f"asking the {name} model {4 * settings.prompts} held-out prompts")
        behaviour[name] = measure_behaviour(model, tokenizer, held_out)
        for request, answer in zip(shown, greedy_answers(model, tokenizer, shown), strict=True):
            examples[request][name] = answer

    say("aligning a tiny Llama: it learns to refuse forbidden requests and to answer all others")
    aligned = align(tokenizer, settings)
    measure("aligned", aligned)
    tokens = identify_tokens(aligned, tokenizer, settings)
    constraint = SafetyConstraint(tokens.token_ids, settings.strength, settings.kind)
    for name, safety in (("plain", None), ("str", constraint)):
        say(f"fine-tuning it on a harmless task ({name})")
        tuned, step_seconds[name] = fine_tune(aligned, tokenizer, settings, safety)
        measure(name, tuned)
    say("measuring the memory of a larger head")
    head = measure_head(settings.head, settings.seed)
    seconds = time.perf_counter() - began
    return DemoResult(settings, tokens.tokens, behaviour, step_seconds, head, examples, seconds)


def align(tokenizer: Tokenizer, settings: DemoSettings) -> torch.nn.Module:
    """Train a model from scratch that refuses what it should, and nothing else."""
    set_seed(settings.seed)
    model = make_model(len(tokenizer))
    pairs = alignment_conversations(Random(settings.seed), 32 * settings.align_steps)
    _train(
        model,
        tokenizer,
        pairs,
        max_steps=settings.align_steps,
        seed=settings.seed,
        per_device_train_batch_size=32,
        learning_rate=4e-3,
        lr_scheduler_type="cosine",
        warmup_steps=settings.align_steps // 10,
        weight_decay=0.05,
        adam_beta2=0.98,
        max_grad_norm=1.0,
    )
    return model.eval()


def identify_tokens(
    model: torch.nn.Module, tokenizer: Tokenizer, settings: DemoSettings
) -> SafetyTokens:
    """Find the words that refusing raises most in the aligned model, in its own refusals.

    It prefers some of the taught ones; to constrain those words keeps more than all alike.
    """
    draw = Random(settings.seed + 1)
    forbidden, benign = (
        [conversation(draw, kind)[0] for _ in range(128)] for kind in ("forbidden", "benign")
    )
    return SafetyTokens.identify(
        model,
        tokenizer,
        templates=[text for text in greedy_answers(model, tokenizer, forbidden) if text],
        prompts=forbidden,
        benign_prompts=benign,
        top_k=settings.top_k,
        batch_size=64,
    )


def fine_tune(
    aligned: torch.nn.Module,
    tokenizer: Tokenizer,
    settings: DemoSettings,
    safety: SafetyConstraint | None,
) -> tuple[torch.nn.Module, float]:
    """Train LoRA on the benign task, fused; return the adapted model and its median step in s."""
    set_seed(settings.seed)
    model = add_lora(copy.deepcopy(aligned), rank=settings.rank)
    pairs = task_conversations(Random(1000 + settings.seed), 16 * settings.tune_steps)
    with patch_model(model, safety):
        seconds = _train(
            model,
            tokenizer,
            pairs,
            max_steps=settings.tune_steps,
            seed=settings.seed,
            per_device_train_batch_size=16,
            learning_rate=settings.tune_rate,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=10,
            max_grad_norm=0.0,
        )
    return model.eval(), seconds


def _train(
    model: torch.nn.Module, tokenizer: Tokenizer, pairs: list[Pair], **arguments: Any
) -> float:
    """Run transformers' trainer once; return the median step in seconds."""
    timer = StepTimer()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=folder,
                use_cpu=True,
                save_strategy="no",
                logging_strategy="no",
                report_to="none",
                disable_tqdm=True,
                remove_unused_columns=False,
                **arguments,
            ),
            train_dataset=features(tokenizer, pairs),
            data_collator=partial(collate, pad_token_id=tokenizer.pad_token_id),
            callbacks=[timer],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return timer.median
