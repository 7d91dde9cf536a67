"""Everything that can be wrong with a run, found and reported together before its slow part.

Stage: settings → files, tokenizer, configuration, tokenised data, a weightless copy of the model
→ `Prepared`. The weights are not read here.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerBase

from str_kernels.inputs.chat import DEFAULT_CHAT_TEMPLATE
from str_kernels.inputs.data import TrainingData, encode_file, read_numbered
from str_kernels.inputs.loading import load_config, load_tokenizer, resolve_device
from str_kernels.safety.references import ReferenceCache
from str_kernels.safety.tokens import SafetyTokens
from str_kernels.training.lora import add_lora
from str_kernels.training.settings import Faults, TrainSettings

DESCRIPTION = "str_kernels.json"
TOKENS = "safety_tokens.json"
REFERENCES = "references.safetensors"
ADAPTER = "adapter_model.safetensors"

T = TypeVar("T")


@dataclass(frozen=True)
class Prepared:
    """A run with nothing left to check.

    Args:
        settings: as given.
        tokenizer: of the model, with a padding token and a chat template.
        data: the tokenised file.
        tokens: the safety tokens, if they come from a file or an earlier part of this run.
        checkpoint: where a resumed run goes on.
        context: the longest sequence the model takes; None where it does not say.
    """

    settings: TrainSettings
    tokenizer: PreTrainedTokenizerBase
    data: TrainingData
    tokens: SafetyTokens | None
    checkpoint: Path | None
    context: int | None

    @property
    def default_template(self) -> bool:
        """Whether the model came without a chat template."""
        return self.tokenizer.chat_template == DEFAULT_CHAT_TEMPLATE


class _Collector:
    """Runs checks one after another and keeps what they complain about."""

    def __init__(self) -> None:
        self.faults: list[str] = []

    def attempt(self, check: Callable[..., T], *args: Any, **keywords: Any) -> T | None:
        try:
            return check(*args, **keywords)
        except ValueError as error:
            self.faults.append(str(error))
            return None


def prepare(settings: TrainSettings, *, resume: bool = False) -> Prepared:
    """Check a run from end to end without reading the model's weights.

    Args:
        settings: the run.
        resume: go on from the newest checkpoint in ``settings.out``.

    Raises:
        Faults: whatever is wrong, all of it.
    """
    collector = _Collector()
    attempt = collector.attempt
    checkpoint = attempt(check_output, settings, resume)
    attempt(check_device, settings)
    rows = attempt(read_numbered, settings.data)
    config = attempt(load_config, settings.model)
    tokenizer = attempt(load_tokenizer, settings.model) if config is not None else None
    context = None if config is None else context_length(config)
    attempt(check_length, settings, context)
    data = tokens = None
    if tokenizer is not None:
        tokens = attempt(_tokens, settings, tokenizer, resume)
    attempt(check_reference_file, settings, tokens)
    if tokenizer is not None and rows is not None:
        data = attempt(encode_file, settings.data, rows, tokenizer, max_length=settings.max_length)
    if config is not None:
        attempt(check_model, settings, config, data, tokens)
    if resume and data is not None:
        attempt(check_same_run, settings, data)
    if collector.faults:
        raise Faults(collector.faults)
    return Prepared(settings, tokenizer, data, tokens, checkpoint, context)


def check_output(settings: TrainSettings, resume: bool) -> Path | None:
    """The folder can be written and holds no other run; returns the checkpoint to resume from."""
    folder = settings.folder
    checkpoint = newest_checkpoint(folder)
    if resume:
        if checkpoint is None:
            raise ValueError(f"out={settings.out!r}: holds no checkpoint to resume from.")
    elif checkpoint is not None or (folder / ADAPTER).exists():
        raise ValueError(
            f"out={settings.out!r}: already holds a run; resume it, or choose another folder."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder) as probe:
            probe.write(bytes(4096))
            probe.flush()
    except OSError as error:
        raise ValueError(f"out={settings.out!r}: cannot be written; {error.strerror}.") from error
    return checkpoint


def newest_checkpoint(folder: Path) -> Path | None:
    """The trainer's complete checkpoint with the largest step; None if there is none."""
    found = [path for path in folder.glob("checkpoint-*") if path.name[11:].isdigit()]
    whole = [path for path in found if (path / "trainer_state.json").is_file()]
    return max(whole, key=lambda path: int(path.name[11:]), default=None)


def check_device(settings: TrainSettings) -> None:
    """Half precision needs an accelerator; a run uses one of them."""
    half = settings.dtype in ("float16", "mixed-float16")
    if half and resolve_device("auto").type == "cpu":
        raise ValueError(f"dtype={settings.dtype!r}: needs a GPU; use bfloat16 or float32.")
    visible = torch.cuda.device_count()
    if visible > 1 and "WORLD_SIZE" not in os.environ:  # the trainer would copy the model to all
        raise ValueError(
            f"{visible} GPUs are visible and a run uses one: set CUDA_VISIBLE_DEVICES, or "
            "start one process for each with torchrun."
        )


def check_reference_file(settings: TrainSettings, tokens: SafetyTokens | None) -> None:
    """A reference that is neither of the names is a cache; of these tokens, if they are known."""
    reference = settings.reference
    if reference in ("adapter_off", "cache"):
        return
    if not Path(reference).is_file():
        raise ValueError(
            f"reference={reference!r}: no such file; must be adapter_off, cache or a cache file."
        )
    if tokens is not None:
        ReferenceCache(reference, tokens.constraint(settings.strength, kind=settings.kind))


def check_length(settings: TrainSettings, context: int | None) -> None:
    """Sequences fit the model's positions."""
    if context is not None and settings.max_length > context:
        raise ValueError(
            f"max_length={settings.max_length}: the model's context is {context} tokens; choose "
            "that or less."
        )


def context_length(config: PretrainedConfig) -> int | None:
    """The number of positions a model was made for, if its configuration says so."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def check_model(
    settings: TrainSettings,
    config: PretrainedConfig,
    data: TrainingData | None,
    tokens: SafetyTokens | None,
) -> None:
    """The adapter fits the model, the disk holds it, and all ids are rows of the head.

    A copy of the model without weights ("meta" tensors) answers all three.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(f"model={settings.model!r}: has no output head.")
    rows = head.weight.shape[0]
    _check_ids(
        "data", max((max(s.input_ids) for s in data.sequences), default=0) if data else 0, rows
    )
    _check_ids("tokens", max(tokens.token_ids) if tokens else 0, rows)
    _check_disk(settings, add_lora(model, settings))


def _check_ids(name: str, largest: int, rows: int) -> None:
    if largest >= rows:
        raise ValueError(
            f"{name} holds token id {largest}: the model's head has {rows} rows, 0 to {rows - 1}; "
            "the tokenizer is not the model's."
        )


def _check_disk(settings: TrainSettings, model: torch.nn.Module) -> None:
    """Two checkpoints of adapter and optimizer, and the adapter: 7 fp32 copies of its weights."""
    weights = sum(p.numel() for p in model.parameters() if p.requires_grad)
    needed = 7 * 4 * weights
    folder = next(p for p in [settings.folder, *settings.folder.absolute().parents] if p.exists())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(
            f"out={settings.out!r}: {free / 2**20:.0f} MiB are free and the run writes up to "
            f"{needed / 2**20:.0f} MiB."
        )


def check_same_run(settings: TrainSettings, data: TrainingData) -> None:
    """A resumed run has the settings and the data of its first part."""
    path = settings.folder / DESCRIPTION
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        different = settings.differences(before["settings"])
        if before["data"]["sha256"] != data.sha256:
            different.append("the contents of the data file")
    except (OSError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: cannot be read ({error}), so nothing can be resumed.") from error
    if different:
        raise ValueError(
            f"out={settings.out!r}: was begun with other settings ({', '.join(different)}); give "
            "the same ones to resume it."
        )


def _tokens(
    settings: TrainSettings, tokenizer: PreTrainedTokenizerBase, resume: bool
) -> SafetyTokens | None:
    """From a file, or from the part of this run that went before."""
    if not settings.constrained:
        return None
    earlier = settings.folder / TOKENS
    path = earlier if resume and earlier.is_file() else settings.tokens
    return None if path is None else SafetyTokens.load(path, tokenizer)
