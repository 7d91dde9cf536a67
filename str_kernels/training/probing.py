"""The probe of a run: its requests, checked before the slow work, and its callback.

Stage: ``--probe`` file → rows → `SafetyProbe` → its series, and what a user should know of it.
"""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from str_kernels.inputs.data import check_prompts, read_numbered
from str_kernels.inputs.rows import Row
from str_kernels.probe.aligned import LONGEST
from str_kernels.probe.asked import row_token_ids
from str_kernels.probe.callback import SafetyProbe
from str_kernels.probe.series import Series
from str_kernels.ranks import sharing
from str_kernels.training.callbacks import Progress
from str_kernels.training.checkpoints import settle
from str_kernels.training.settings import TrainSettings

_MUCH_TIME = 0.02


def read_probe(
    settings: TrainSettings, tokenizer: PreTrainedTokenizerBase, context: int | None
) -> tuple[Row, ...]:
    """Read the requests of the probe, none without one.

    Raises:
        ValueError: the file is missing or has a faulty row, or a request does not fit the context.
    """
    if settings.probe is None:
        return ()
    numbered = read_numbered(settings.probe, response_required=False)[: settings.probe_rows]
    check_prompts(settings.probe, numbered, tokenizer)
    for line, row in numbered:
        length = len(row_token_ids(tokenizer, row))
        if context is not None and length + LONGEST > context:
            raise ValueError(
                f"{settings.probe}:{line}: has {length} tokens, and {LONGEST} of an answer do not "
                f"fit into the model's context of {context}; shorten it."
            )
    return tuple(row for _, row in numbered)


def make_probe(
    settings: TrainSettings,
    rows: tuple[Row, ...],
    tokenizer: PreTrainedTokenizerBase,
    progress: Progress,
) -> SafetyProbe | None:
    """Return the callback; make it before the trainer."""
    if not rows:
        return None
    return SafetyProbe(
        rows,
        settings.probe_every,
        tokenizer=tokenizer,
        stop_below=settings.probe_stop,
        say=progress.notice,
    )


def finish_probe(settings: TrainSettings, series: Series, progress: Progress) -> None:
    """Make a kept checkpoint the newest one, where a resumed run continues; tell of much time."""
    if series.stopped_at is not None and sharing().first:
        settle(settings.folder, settings.folder / f"checkpoint-{series.kept_step}")
    if series.time_share > _MUCH_TIME:
        progress.notice(
            f"The probe took {100 * series.time_share:.1f} % of the time: a larger --probe-every "
            f"than {settings.probe_every} costs less."
        )
