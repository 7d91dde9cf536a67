"""The checks of a run; all faults are found and reported together before its slow part.

Stage: settings → files, tokenizer, configuration, tokenised data, a copy of the model without
weights → `Prepared`. No weights are read here.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase
from transformers.integrations import get_available_reporting_integrations

from str_kernels.files import read_json
from str_kernels.huggingface.constraint.references import ReferenceCache
from str_kernels.inputs.data import TrainingData
from str_kernels.inputs.loading import library_reading
from str_kernels.inputs.rows import Row
from str_kernels.inputs.template import DEFAULT_CHAT_TEMPLATE
from str_kernels.ranks import sharing
from str_kernels.safety.tokens import SafetyTokens
from str_kernels.training.checkpoints import newest_checkpoint
from str_kernels.training.lora import add_lora
from str_kernels.training.probing import read_probe
from str_kernels.training.reading import Collector, check_vocabulary, read_inputs
from str_kernels.training.settings import TrainSettings

DESCRIPTION = "str_kernels.json"
REFERENCES = "references.sqlite"
WHOLE_REFERENCES = "references.safetensors"  # of version 0.1
ADAPTER_CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class Prepared:
    """A run that has passed every check.

    Args:
        settings: the settings, as given.
        tokenizer: the model's, with a padding token and a chat template.
        data: the tokenised file.
        anchors: the tokenised files of rows that are constrained and not learned.
        held_out: the tokenised file on which both terms are measured, if there is one.
        tokens: the safety tokens, if a file or an earlier part of this run has them.
        checkpoint: where a resumed run continues.
        context: the longest sequence that the model takes, if its configuration says so.
        probe: the requests by which refusing is probed.
    """

    settings: TrainSettings
    tokenizer: PreTrainedTokenizerBase
    data: TrainingData
    anchors: tuple[TrainingData, ...]
    held_out: TrainingData | None
    tokens: SafetyTokens | None
    checkpoint: Path | None
    context: int | None
    probe: tuple[Row, ...] = ()

    @property
    def files(self) -> tuple[TrainingData, ...]:
        """Return data, anchors and held-out rows: everything that the model reads."""
        return (self.data, *self.anchors, *([self.held_out] if self.held_out else ()))

    @property
    def default_template(self) -> bool:
        """Tell whether the model came without a chat template."""
        return self.tokenizer.chat_template == DEFAULT_CHAT_TEMPLATE


def prepare(settings: TrainSettings, *, resume: bool = False) -> Prepared:
    """Check a whole run without reading the model's weights.

    Args:
        settings: the run.
        resume: continue from the newest checkpoint in ``settings.out``.

    Raises:
        Faults: everything that is wrong.
    """
    collector = Collector()
    attempt = collector.attempt
    checkpoint = attempt(check_output, settings, resume)
    inputs = read_inputs(collector, settings, resume=resume)
    config, tokenizer, data, anchors, held_out, tokens, context = inputs
    attempt(check_reports, settings)
    probe = None if tokenizer is None else attempt(read_probe, settings, tokenizer, context)
    attempt(check_reference_file, settings, tokens, inputs.files)
    if config is not None:
        attempt(check_model, settings, config, inputs.files, tokens)
    if resume and data is not None:
        attempt(check_same_run, settings, inputs.files)
    collector.raise_faults()
    return Prepared(
        settings, tokenizer, data, anchors, held_out, tokens, checkpoint, context, probe
    )


def refuse_other_engines() -> None:
    """Refuse what `accelerate launch` asks for beside DDP, which saves and resumes otherwise.

    Raises:
        ValueError: it asks for FSDP or DeepSpeed.
    """
    for name in ("FSDP", "DEEPSPEED"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() in ("true", "1"):
            raise ValueError(
                f"ACCELERATE_USE_{name}=true: str-kernels train runs DDP alone: start it with "
                "torchrun, or use patch_model in a script of your own (docs/distributed.md)."
            )


def check_output(settings: TrainSettings, resume: bool) -> Path | None:
    """Check that the folder is writable and has no other run; return the checkpoint to resume."""
    folder = settings.folder
    sealed = _seals(folder)
    checkpoint = newest_checkpoint(folder, sealed=sealed)
    foreign = not sealed and any(folder.glob("checkpoint-*"))
    if resume:
        if checkpoint is None:
            raise ValueError(
                f"out={settings.out!r}: has no checkpoint to resume from; leave --resume out."
            )
    elif checkpoint is not None or foreign or (folder / ADAPTER_CONFIG).exists():
        raise ValueError(
            f"out={settings.out!r}: already has a run; resume it, or choose another folder."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder) as probe:
            probe.write(bytes(4096))
            probe.flush()
    except OSError as error:
        raise ValueError(f"out={settings.out!r}: cannot be written; {error.strerror}.") from error
    return checkpoint


def _seals(folder: Path) -> bool:
    """Tell whether a folder has a run that seals its checkpoints; version 0.1 did not."""
    try:
        return _description(folder).get("sealed", False)
    except ValueError:
        return False


def _description(folder: Path) -> dict[str, Any]:
    """Read what a run has written about itself."""
    path = folder / DESCRIPTION
    read = read_json(path)
    if not isinstance(read, dict):
        raise ValueError(f"{path}: is a {type(read).__name__}; must be a JSON object.")
    return read


def check_reference_file(
    settings: TrainSettings, tokens: SafetyTokens | None, files: tuple[TrainingData, ...]
) -> None:
    """Check a reference that names a cache file: its tokens, and that it has every row.

    The rows are those of the data, of the anchors and of ``eval``.
    """
    reference = settings.reference
    if reference in ("adapter_off", "cache"):
        return
    if not Path(reference).is_file():
        raise ValueError(
            f"reference={reference!r}: no such file; give adapter_off, cache, or a file that "
            "str-kernels cache made."
        )
    if tokens is None:
        return
    cache = ReferenceCache(reference, settings.constraint(tokens.token_ids))
    for file in files:
        ids = [sequence.input_ids for sequence in file.sequences]
        missing = [row for row, sequence in enumerate(ids) if not cache.holds(sequence)]
        if missing:
            line, length = file.lines[missing[0]], len(ids[missing[0]])
            raise ValueError(
                f"reference={reference!r}: has no entry for {len(missing)} of {len(ids)} rows of "
                f"{file.source}; make it again, for the file, the chat template or the maximal "
                f"length changed since. The first is line {line}, of {length} tokens."
            )


def check_model(
    settings: TrainSettings,
    config: PretrainedConfig,
    files: tuple[TrainingData, ...],
    tokens: SafetyTokens | None,
) -> None:
    """Check that the head has all ids, the adapter fits the model, and the disk has room."""
    model = check_vocabulary(settings, config, files, tokens)
    with library_reading(f"model={settings.model!r}", "takes no adapter"):
        adapted = add_lora(model, **settings.lora)
    _check_disk(settings, adapted)


def check_reports(settings: TrainSettings) -> None:
    """Check that the packages are there to which the logs go."""
    there = get_available_reporting_integrations()
    for name in settings.report_to:
        if name not in there:
            raise ValueError(
                f"report_to={name!r}: transformers finds no such package here; install it, or give "
                f"{' or '.join(there) or 'nothing'}."
            )


def _check_disk(settings: TrainSettings, model: torch.nn.Module) -> None:
    """Check the room for two checkpoints and the adapter: 7 fp32 copies of its weights."""
    weights = sum(p.numel() for p in model.parameters() if p.requires_grad)
    needed = 7 * 4 * weights
    folder = next(p for p in [settings.folder, *settings.folder.absolute().parents] if p.exists())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(
            f"out={settings.out!r}: {free / 2**20:.0f} MiB are free and the run writes up to "
            f"{needed / 2**20:.0f} MiB; free some space, or choose another folder."
        )


def check_same_run(settings: TrainSettings, files: tuple[TrainingData, ...]) -> None:
    """Check that a resumed run has the settings and the data of its first part."""
    path, before = settings.folder / DESCRIPTION, _description(settings.folder)
    try:
        different = settings.differences(before["settings"])
        earlier = (before["data"], *before["anchors"], before.get("eval"))
        known = {facts["path"]: facts["sha256"] for facts in earlier if facts}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: is damaged ({error}), so nothing can be resumed.") from error
    for file in files:
        if known.get(file.source, file.sha256) != file.sha256:
            different.append(f"the contents of {file.source}")
    processes = before.get("processes", 1)
    if processes != sharing().size:  # each has its own part of a batch and its own random state
        different.append(f"{processes} processes")
    if different:
        raise ValueError(
            f"out={settings.out!r}: was begun with other settings ({', '.join(different)}), as "
            f"{DESCRIPTION} there says; give the same ones to resume it."
        )
