"""The references of a run's data, computed ahead by `str-kernels cache`.

Stage: `Prepared` and the aligned model → the file that ``patch_model(reference=path)`` reads.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator

import torch

from str_kernels.huggingface import build_reference_cache
from str_kernels.inputs.chat import collate
from str_kernels.inputs.loading import check_adapter, resolve_device
from str_kernels.options import SafetyConstraint
from str_kernels.training.checks import Prepared
from str_kernels.training.reading import Collector, check_vocabulary, read_inputs
from str_kernels.training.settings import TrainSettings


def prepare_cache(settings: TrainSettings, *, adapter: str | None = None) -> Prepared:
    """Check the data and the model of a cache, without reading the model's weights.

    Args:
        settings: the settings of the run; ``tokens`` must be a file.
        adapter: an adapter that belongs to the aligned model.

    Raises:
        Faults: everything that is wrong.
    """
    collector = Collector()
    inputs = read_inputs(collector, settings)
    config, tokenizer, data, anchors, held_out, tokens, context = inputs
    if adapter is not None:
        collector.attempt(check_adapter, adapter)
    if config is not None:
        collector.attempt(check_vocabulary, settings, config, inputs.files, tokens)
    collector.raise_faults()
    return Prepared(settings, tokenizer, data, anchors, held_out, tokens, None, context)


def cache_references(
    model: torch.nn.Module,
    prepared: Prepared,
    safety: SafetyConstraint,
    path: str | os.PathLike,
    advance: Callable[[], None] = lambda: None,
) -> int:
    """Write the references of data and anchors; ``advance`` is called after each forward.

    Returns:
        How many sequences were stored; equal ones are stored once.
    """
    return build_reference_cache(model, _batches(prepared, advance), path, safety)


def batch_count(prepared: Prepared) -> int:
    """Count the forwards of `cache_references`."""
    return math.ceil(len(_features(prepared)) / prepared.settings.batch)


def _features(prepared: Prepared) -> list[dict[str, list[int]]]:
    return [feature for file in prepared.files for feature in file.features()]


def _batches(prepared: Prepared, advance: Callable[[], None]) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the data without labels, sorted by length, on the model's device."""
    features = sorted(_features(prepared), key=lambda feature: len(feature["input_ids"]))
    device, size = resolve_device(prepared.settings.device), prepared.settings.batch
    for start in range(0, len(features), size):
        batch = collate(
            features[start : start + size], pad_token_id=prepared.tokenizer.pad_token_id
        )
        yield {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
        advance()
