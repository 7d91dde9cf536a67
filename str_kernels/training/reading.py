"""What a run and a reference cache both read; faults are collected.

Stage: settings → files, tokenizer, configuration, tokenised data, safety tokens → `Inputs`.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerBase

from str_kernels.inputs.data import TrainingData, encode_file, read_numbered
from str_kernels.inputs.loading import library_reading, load_config, load_tokenizer, resolve_device
from str_kernels.safety.tokens import SafetyTokens
from str_kernels.settings import Faults
from str_kernels.training.settings import TrainSettings

TOKENS = "safety_tokens.json"

T = TypeVar("T")


class Inputs(NamedTuple):
    """What a command reads; None where it is faulty."""

    config: PretrainedConfig | None
    tokenizer: PreTrainedTokenizerBase | None
    data: TrainingData | None
    anchors: tuple[TrainingData, ...]
    held_out: TrainingData | None
    tokens: SafetyTokens | None
    context: int | None

    @property
    def files(self) -> tuple[TrainingData, ...]:
        """Return the data, the anchors and the held-out rows that could be read."""
        return tuple(f for f in (self.data, *self.anchors, self.held_out) if f is not None)


class Collector:
    """Runs checks one after another and collects their errors."""

    def __init__(self) -> None:
        self.faults: list[str] = []

    def attempt(self, check: Callable[..., T], *args: Any, **keywords: Any) -> T | None:
        """Return what the check returns; collect a ValueError and return None."""
        try:
            return check(*args, **keywords)
        except ValueError as error:
            self.faults.append(str(error))
            return None

    def raise_faults(self) -> None:
        """Raise all faults as one error."""
        if self.faults:
            raise Faults(self.faults)


def read_inputs(collector: Collector, settings: TrainSettings, *, resume: bool = False) -> Inputs:
    """Read configuration, tokenizer, data and safety tokens; faults go to the collector."""
    attempt = collector.attempt
    attempt(check_device, settings)
    count = len(settings.anchors)
    files = (settings.data, *settings.anchors, *([settings.eval] if settings.eval else ()))
    rows = [attempt(read_numbered, file) for file in files]
    config = attempt(load_config, settings.model)
    tokenizer = attempt(load_tokenizer, settings.model) if config is not None else None
    context = None if config is None else context_length(config)
    attempt(check_length, settings, context)
    tokens, encoded = None, [None] * len(files)
    if tokenizer is not None:
        tokens = attempt(_tokens, settings, tokenizer, resume)
        encoded = [
            found and attempt(encode_file, file, found, tokenizer, **settings.lengths)
            for file, found in zip(files, rows, strict=True)
        ]
    anchors = tuple(file for file in encoded[1 : 1 + count] if file is not None)
    held_out = encoded[1 + count] if settings.eval else None
    return Inputs(config, tokenizer, encoded[0], anchors, held_out, tokens, context)


def check_device(settings: TrainSettings) -> None:
    """Check that fp16 and an offload have an accelerator, and that the run sees one GPU at most."""
    on_cpu = resolve_device(settings.device).type == "cpu"
    if on_cpu and settings.dtype in ("float16", "mixed-float16"):
        raise ValueError(f"dtype={settings.dtype!r}: needs a GPU; use bfloat16 or float32.")
    if settings.packed and importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(
            f"dtype={settings.dtype!r}: needs bitsandbytes; pip install bitsandbytes, or use "
            "bfloat16."
        )
    if on_cpu and settings.offload == "cpu":
        raise ValueError(
            "offload='cpu': moves checkpoints from a GPU to the CPU, and there is none; use disk."
        )
    visible = 0 if settings.device == "cpu" else torch.cuda.device_count()
    if visible > 1 and "WORLD_SIZE" not in os.environ:  # the trainer would copy the model to all
        raise ValueError(
            f"{visible} GPUs are visible and a run uses one: set CUDA_VISIBLE_DEVICES, or "
            "start one process for each with torchrun."
        )


def check_length(settings: TrainSettings, context: int | None) -> None:
    """Check that sequences fit the model's context."""
    if context is not None and settings.max_length > context:
        raise ValueError(
            f"max_length={settings.max_length}: the context of model={settings.model!r} is "
            f"{context} tokens; choose that or less."
        )


def context_length(config: PretrainedConfig) -> int | None:
    """Return the number of positions of a model, if its configuration says so."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def check_vocabulary(
    settings: TrainSettings,
    config: PretrainedConfig,
    files: Iterable[TrainingData],
    tokens: SafetyTokens | None,
) -> torch.nn.Module:
    """Check that all ids are rows of the head; return the copy without weights ("meta")."""
    reading = library_reading(f"model={settings.model!r}", "its configuration makes no model")
    with reading, torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(
            f"model={settings.model!r}: has no output head; use a causal language model."
        )
    rows = head.weight.shape[0]
    for file in files:
        _check_ids(file.source, max(max(s.input_ids) for s in file.sequences), rows)
    _check_ids("tokens", max(tokens.token_ids) if tokens else 0, rows)
    return model


def _check_ids(name: str, largest: int, rows: int) -> None:
    if largest >= rows:
        raise ValueError(
            f"{name} holds token id {largest}: the model's head has {rows} rows, 0 to {rows - 1}; "
            "the tokenizer is not the model's."
        )


def _tokens(
    settings: TrainSettings, tokenizer: PreTrainedTokenizerBase, resume: bool
) -> SafetyTokens | None:
    """Read the tokens from a file, or from the earlier part of this run."""
    if not settings.constrained:
        return None
    earlier = settings.folder / TOKENS
    path = earlier if resume and earlier.is_file() else settings.tokens
    if path is None:
        return None
    tokens = SafetyTokens.load(path, tokenizer)
    try:
        settings.constraint(tokens.token_ids)
    except ValueError as error:
        raise ValueError(f"tokens={os.fspath(path)!r}: {error}") from error
    return tokens
