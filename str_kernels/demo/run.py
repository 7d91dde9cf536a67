"""The whole demo: align, fine-tune plainly and with STR, measure all three models.

Stage: a seed → an aligned model → two adapters → `DemoResult`. Everything runs on the CPU.
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
from transformers import (
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)

from str_kernels.demo.measure import (
    Behaviour,
    HeadPeaks,
    HeadSize,
    HeldOut,
    greedy_answers,
    measure_behaviour,
    measure_head,
)
from str_kernels.demo.model import features, make_model, make_tokenizer
from str_kernels.demo.text import (
    Pair,
    alignment_conversations,
    conversation,
    task_conversations,
)
from str_kernels.huggingface import patch_model
from str_kernels.inputs.chat import collate
from str_kernels.options import SafetyConstraint
from str_kernels.safety.tokens import SafetyTokens
from str_kernels.training.callbacks import StepTimer
from str_kernels.training.lora import add_lora

METHODS = ("aligned", "plain", "str")


@dataclass(frozen=True)
class DemoSettings:
    """Settings of the demo; with the defaults plain training erodes the refusals.

    Args:
        seed: the seed of everything that is random.
        align_steps: steps of 32 conversations that make the aligned model.
        tune_steps: steps of 16 questions of the benign task.
        rank: rank of LoRA on every linear layer; alpha is twice the rank.
        tune_rate: learning rate of the fine-tuning.
        strength: λ of the constraint (mse, all positions).
        top_k: number of safety tokens.
        prompts: held-out prompts of each kind.
        head: the head whose memory is measured.
    """

    seed: int = 0
    align_steps: int = 600
    tune_steps: int = 300
    rank: int = 16
    tune_rate: float = 3e-3
    strength: float = 1.0
    top_k: int = 10
    prompts: int = 300
    head: HeadSize = field(default_factory=HeadSize)

    @classmethod
    def quick(cls, seed: int = 0) -> DemoSettings:
        """Return settings for a few seconds, which show that it works, not what it achieves."""
        head = HeadSize(positions=512, vocabulary=8192)
        return cls(seed=seed, align_steps=150, tune_steps=60, prompts=60, head=head)


@dataclass(frozen=True)
class DemoResult:
    """The result of the demo.

    Args:
        settings: the settings of the run.
        tokens: the text of the safety tokens.
        behaviour: the behaviour of ``"aligned"``, ``"plain"`` and ``"str"``.
        step_seconds: the median fine-tuning step of ``"plain"`` and ``"str"``.
        head: the peak memory of a larger head.
        examples: requests, and each model's answers to them.
        seconds: the time of the whole run.
    """

    settings: DemoSettings
    tokens: tuple[str, ...]
    behaviour: dict[str, Behaviour]
    step_seconds: dict[str, float]
    head: HeadPeaks
    examples: dict[str, dict[str, str]]
    seconds: float


def run_demo(settings: DemoSettings, say: Callable[[str], None] = lambda text: None) -> DemoResult:
    """Run the demo; ``say`` is called with what begins."""
    began = time.perf_counter()
    tokenizer, held_out = make_tokenizer(), HeldOut.drawn(settings.prompts)
    shown = [pairs[0][0] for pairs in (held_out.forbidden, held_out.lookalike, held_out.benign)]
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
    for name, safety in (("plain", None), ("str", constraint(tokens, settings))):
        say(f"fine-tuning it on a harmless task ({name})")
        tuned, step_seconds[name] = fine_tune(aligned, tokenizer, settings, safety)
        measure(name, tuned)
    say("measuring the memory of a larger head")
    head = measure_head(settings.head, settings.seed)
    seconds = time.perf_counter() - began
    return DemoResult(settings, tokens.tokens, behaviour, step_seconds, head, examples, seconds)


def align(tokenizer: PreTrainedTokenizerBase, settings: DemoSettings) -> torch.nn.Module:
    """Train a model from scratch that refuses what it should, and nothing else."""
    set_seed(settings.seed)
    model = make_model(len(tokenizer))
    pairs = alignment_conversations(Random(settings.seed), 32 * settings.align_steps)
    arguments = {
        "max_steps": settings.align_steps,
        "seed": settings.seed,
        "per_device_train_batch_size": 32,
        "learning_rate": 4e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": settings.align_steps // 10,
        "weight_decay": 0.05,
        "adam_beta2": 0.98,
        "max_grad_norm": 1.0,
    }
    _train(model, tokenizer, pairs, arguments)
    return model.eval()


def identify_tokens(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, settings: DemoSettings
) -> SafetyTokens:
    """Identify the tokens that refusing raises most, in the refusals that the model really gives.

    The model prefers some of the taught refusals; to hold their words keeps more than to hold all.
    """
    draw = Random(settings.seed + 1)

    def requests(kind: str) -> list[str]:
        return [conversation(draw, kind)[0] for _ in range(128)]

    forbidden = requests("forbidden")
    return SafetyTokens.identify(
        model,
        tokenizer,
        templates=[text for text in greedy_answers(model, tokenizer, forbidden) if text],
        prompts=forbidden,
        benign_prompts=requests("benign"),
        top_k=settings.top_k,
        batch_size=64,
    )


def constraint(tokens: SafetyTokens, settings: DemoSettings) -> SafetyConstraint:
    """Make the constraint on these tokens."""
    return SafetyConstraint(tokens.token_ids, settings.strength, "mse")


def fine_tune(
    aligned: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    settings: DemoSettings,
    safety: SafetyConstraint | None,
) -> tuple[torch.nn.Module, float]:
    """Train LoRA on the benign task; return the adapted model and its median step in seconds."""
    set_seed(settings.seed)
    model = add_lora(copy.deepcopy(aligned), rank=settings.rank)
    pairs = task_conversations(Random(1000 + settings.seed), 16 * settings.tune_steps)
    arguments = {
        "max_steps": settings.tune_steps,
        "seed": settings.seed,
        "per_device_train_batch_size": 16,
        "learning_rate": settings.tune_rate,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 10,
        "max_grad_norm": 0.0,
    }
    with patch_model(model, safety):
        seconds = _train(model, tokenizer, pairs, arguments)
    return model.eval(), seconds


def _train(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    pairs: list[Pair],
    arguments: dict[str, Any],
) -> float:
    """Run transformers' trainer with these arguments; return the median step in seconds."""
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
