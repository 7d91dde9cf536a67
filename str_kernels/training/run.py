"""One fine-tuning run: model, safety tokens, adapter, patch, trainer, results.

Stage: `Prepared` → trained adapter in the output folder, with `str_kernels.json` beside it.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import Trainer, TrainingArguments, set_seed

from str_kernels.huggingface import Patch, SafetyLogCallback, patch_model
from str_kernels.huggingface.constraint.anchors import AnchoredCollator
from str_kernels.huggingface.constraint.filling import FillingCache
from str_kernels.huggingface.patch.filtering import watching_index
from str_kernels.inputs.chat import collate
from str_kernels.inputs.loading import resolve_device
from str_kernels.options import SafetyConstraint
from str_kernels.probe.series import Series
from str_kernels.ranks import sharing
from str_kernels.safety.tokens import SafetyTokens
from str_kernels.training.callbacks import (
    Interrupt,
    NoProgress,
    Progress,
    Reporter,
    StepTimer,
    show_clustering,
)
from str_kernels.training.card import CARD, write_card
from str_kernels.training.checkpoints import Sealing, settle
from str_kernels.training.checks import ADAPTER_CONFIG, REFERENCES, WHOLE_REFERENCES, Prepared
from str_kernels.training.lora import add_lora
from str_kernels.training.model import load
from str_kernels.training.notices import data_notices, end_notice
from str_kernels.training.probing import finish_probe, make_probe
from str_kernels.training.reading import TOKENS
from str_kernels.training.result import Result, largest, peak_memory, write_description
from str_kernels.training.settings import TrainSettings

Collator = Callable[[list[dict]], dict[str, torch.Tensor]]


class CountingTrainer(Trainer):
    """A trainer that counts the tokens it has seen, without synchronising.

    Evaluations have ``eval_collator``: no anchors join them.
    """

    def __init__(self, *args: Any, eval_collator: Collator, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self._eval_collator = eval_collator
        self.tokens_seen: torch.Tensor | int = 0

    def get_eval_dataloader(self, *args: Any, **keywords: Any) -> torch.utils.data.DataLoader:
        """Collate held-out rows by themselves."""
        of_training, self.data_collator = self.data_collator, self._eval_collator
        try:
            return super().get_eval_dataloader(*args, **keywords)
        finally:
            self.data_collator = of_training

    def training_step(self, model: torch.nn.Module, inputs: dict, *args: Any, **keywords: Any):
        """Count the tokens of a forward and backward, without padding."""
        self.tokens_seen = inputs["attention_mask"].sum() + self.tokens_seen
        return super().training_step(model, inputs, *args, **keywords)

    def _save_checkpoint(self, *args: Any, **keywords: Any) -> None:
        """Save, and say it in one sentence if that fails: torch's writer raises RuntimeErrors."""
        with _writing(f"checkpoint-{self.state.global_step} in {self.args.output_dir}"):
            super()._save_checkpoint(*args, **keywords)


def train(prepared: Prepared, progress: Progress | None = None) -> Result:
    """Run what `prepare` checked; inside ``share_work`` all processes train one model, by DDP.

    Returns:
        What was measured; ``interrupted`` means that Ctrl-C ended it, with a checkpoint saved.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    settings, progress, ranks = prepared.settings, progress or NoProgress(), sharing()
    ranks.wait()  # nothing is written before all have checked the folder
    for notice in data_notices(prepared):
        progress.notice(notice)
    progress.stage("loading the model")
    model = load(settings)
    if notice := end_notice(prepared, model):
        progress.notice(notice)
    tokens = _safety_tokens(model, prepared, progress)
    if ranks.first:
        for name in settle(settings.folder, prepared.checkpoint):
            progress.notice(f"{name} was not finished, and is removed.")
        write_description(prepared, tokens, None)
    ranks.wait()
    set_seed(settings.seed)
    model = add_lora(model, **settings.lora)
    probe = make_probe(settings, prepared.probe, prepared.tokenizer, progress)
    trainer, timer, reporter, interrupt = _trainer(model, prepared, progress)
    patch = _patch(model, prepared, tokens)
    with settings.levers.apply(model), patch or nullcontext(), interrupt.installed():
        if patch is not None:
            # before the callbacks that report elsewhere, which report what it adds
            trainer.callback_handler.callbacks.insert(0, SafetyLogCallback(patch))
        trainer.add_callback(reporter)  # after the callback that adds to the logs
        trainer.add_callback(interrupt)
        if probe is not None:
            trainer.add_callback(probe)  # after those that save: it decides what stays
        trainer.add_callback(Sealing())  # after those that add files to a checkpoint
        progress.stage("training")
        with watching_index(partial(show_clustering, progress)):
            trainer.train(resume_from_checkpoint=prepared.checkpoint and str(prepared.checkpoint))
    if reporter.not_finite_at is not None:
        raise FloatingPointError(
            f"the loss is not finite at step {reporter.not_finite_at}; lower the learning rate or "
            f"the strength. Earlier checkpoints are in {settings.out}."
        )
    series = probe and probe.series
    if series is not None:
        finish_probe(settings, series, progress)
    result = _result(prepared, trainer, timer, interrupted=interrupt.asked, series=series)
    if ranks.first:
        _save(model, prepared, tokens, result)
        write_description(prepared, tokens, result)
    ranks.wait()
    return result


@contextmanager
def _writing(name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        raise OSError(f"{name} cannot be written ({error}); free some space.") from error


def _save(
    model: torch.nn.Module, prepared: Prepared, tokens: SafetyTokens | None, result: Result
) -> None:
    """Save tokenizer, adapter and card, the file last that makes the folder an adapter's."""
    folder = prepared.settings.folder
    beside = tempfile.TemporaryDirectory(dir=folder, prefix="saving-")
    with _writing(f"the adapter in {folder}"), beside as name:
        model.save_pretrained(name)
        prepared.tokenizer.save_pretrained(name)
        write_card(Path(name) / CARD, prepared, tokens, result)
        files = sorted(Path(name).iterdir(), key=lambda file: file.name == ADAPTER_CONFIG)
        for file in files:
            os.replace(file, folder / file.name)


def training_arguments(settings: TrainSettings, rows: int) -> TrainingArguments:
    """Return the trainer's settings of a run over ``rows`` sequences."""
    total = settings.total_steps(rows, sharing().size)
    return TrainingArguments(
        output_dir=settings.out,
        per_device_train_batch_size=settings.batch,
        gradient_accumulation_steps=settings.accumulation,
        max_steps=total,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=_schedule(settings, total),
        warmup_steps=settings.warmup_steps(total),
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        bf16=settings.dtype == "mixed-bfloat16",
        fp16=settings.dtype == "mixed-float16",
        use_cpu=resolve_device(settings.device).type == "cpu",
        per_device_eval_batch_size=settings.batch,
        eval_strategy="steps" if settings.eval else "no",
        eval_steps=settings.eval_steps or total,
        prediction_loss_only=True,  # logits would be built in full
        logging_steps=settings.logging_steps,
        logging_nan_inf_filter=False,
        save_strategy="steps" if settings.save_steps else "no",
        save_steps=settings.save_steps or total,
        save_total_limit=2,
        seed=settings.seed,
        remove_unused_columns=False,
        report_to=list(settings.report_to) or "none",
        disable_tqdm=True,
        log_level="error",
    )


def _schedule(settings: TrainSettings, total: int) -> str:
    if settings.schedule == "constant":
        return "constant_with_warmup" if settings.warmup_steps(total) else "constant"
    return settings.schedule


def _trainer(
    model: torch.nn.Module, prepared: Prepared, progress: Progress
) -> tuple[CountingTrainer, StepTimer, Reporter, Interrupt]:
    from transformers import PrinterCallback

    settings, timer = prepared.settings, StepTimer()
    reporter, interrupt = Reporter(progress), Interrupt(progress)
    features = prepared.data.features()
    trainer = CountingTrainer(
        model=model,
        args=training_arguments(settings, len(features)),
        train_dataset=features,
        eval_dataset=prepared.held_out and prepared.held_out.features(),
        data_collator=_collator(prepared),
        eval_collator=_plain_collator(prepared),
        callbacks=[timer],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer, timer, reporter, interrupt


def _plain_collator(prepared: Prepared) -> Collator:
    return partial(collate, pad_token_id=prepared.tokenizer.pad_token_id)


def _collator(prepared: Prepared) -> Collator:
    settings, pad = prepared.settings, prepared.tokenizer.pad_token_id
    plain = _plain_collator(prepared)
    if not prepared.anchors:
        return plain
    pools = [file.features() for file in prepared.anchors]
    return AnchoredCollator(
        plain,
        *pools,
        pad_token_id=pad,
        positions=settings.positions,
        alone=settings.anchors_alone,
        every=settings.anchors_every,
        seed=settings.seed,
    )


def _safety_tokens(
    model: torch.nn.Module, prepared: Prepared, progress: Progress
) -> SafetyTokens | None:
    if not prepared.settings.constrained:
        return None
    tokens = prepared.tokens
    if tokens is None:
        progress.stage("identifying safety tokens")
        tokens = SafetyTokens.identify(model, prepared.tokenizer, top_k=prepared.settings.top_k)
    if sharing().first:
        tokens.save(prepared.settings.folder / TOKENS)
    return tokens


def _patch(model: torch.nn.Module, prepared: Prepared, tokens: SafetyTokens | None) -> Patch | None:
    settings = prepared.settings
    if settings.method == "unpatched":
        return None
    if tokens is None:
        return patch_model(model)
    safety, arguments = settings.constraint(tokens.token_ids), settings.of_the_patch
    if settings.reference == "cache":
        arguments["reference"] = _cache(prepared, safety)
    return patch_model(model, safety, **arguments, share_seed=settings.seed)


def _cache(prepared: Prepared, safety: SafetyConstraint) -> Path | FillingCache:
    """Return the cache of a run: one that fills itself, or the whole one of version 0.1."""
    folder, resumed = prepared.settings.folder, prepared.checkpoint is not None
    path, whole = folder / REFERENCES, folder / WHOLE_REFERENCES
    if resumed and whole.is_file():
        return whole
    if not resumed and sharing().first:
        path.unlink(missing_ok=True)  # it may be of another model
    sharing().wait()
    return FillingCache(path, safety)


def _result(
    prepared: Prepared,
    trainer: CountingTrainer,
    timer: StepTimer,
    *,
    interrupted: bool,
    series: Series | None,
) -> Result:
    logs = [log for log in trainer.state.log_history if "loss" in log]
    held_out = next((log for log in reversed(trainer.state.log_history) if "eval_loss" in log), {})
    measured = sharing().gathered((int(trainer.tokens_seen), peak_memory()))
    seen, seconds = sum(tokens for tokens, _ in measured), sum(timer.seconds)
    last = logs[-1] if logs else {}
    return Result(
        steps=trainer.state.global_step,
        total_steps=trainer.state.max_steps,
        interrupted=interrupted and trainer.state.global_step < trainer.state.max_steps,
        step_seconds=timer.median,
        tokens_per_second=seen / seconds if seconds else 0.0,
        loss=last.get("loss"),
        cross_entropy=last.get("cross_entropy", last.get("loss")),
        safety_penalty=last.get("safety_penalty") if prepared.settings.constrained else None,
        safety_probe=series and {**series.as_dict(), "time_share": series.time_share},
        eval_cross_entropy=held_out.get("eval_cross_entropy", held_out.get("eval_loss")),
        **largest(peaks for _, peaks in measured),
    )
