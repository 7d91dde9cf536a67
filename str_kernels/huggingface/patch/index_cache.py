"""Vocabulary indices kept between runs, in the user's cache folder.

Stage: ``weight [V, D]``, hidden ``states [n, D]`` → their `VocabularyIndex`, read or built.

A file is named by a digest of what the index is built from, so that a run never depends on what
was run before it. The digest reads only some rows of the weight, which is large. A file is
therefore used only if its mean rows are, bit for bit, those of this weight in its order; checking
that costs a pass over the weight, a tenth of a build. If anything is wrong with a file, the index
is built and written again.

``STR_KERNELS_INDEX_CACHE`` names another folder; ``off`` disables the cache.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from str_kernels.vocabulary import SCHEMA, VocabularyIndex, state_columns, tile_means

_ROWS = 64  # rows of the weight in its digest
_log = logging.getLogger("str_kernels")


def cached_index(
    weight: Tensor,
    states: Tensor,
    folder: Path | None,
    progress: Callable[[int, int], None] | None = None,
) -> VocabularyIndex:
    """``VocabularyIndex.build(weight, states)``, from ``folder`` if it was built before.

    Args:
        weight: ``[V, D]``.
        states: ``[n, D]``.
        folder: is made when it is missing; None: build and keep nothing.
        progress: as of ``VocabularyIndex.build``.
    """
    path = None if folder is None else folder / f"{fingerprint(weight, states)}.safetensors"
    if path is not None and path.exists():
        try:
            index = _read(path, weight, states)
        except (ValueError, OSError) as error:
            _log.warning("the vocabulary index %s is built again: %s", path, error)
        else:
            _log.info("took the vocabulary index %s", path)
            return index
    _log.info("clustering the %d rows of the head, once", len(weight))
    index = VocabularyIndex.build(weight, states, progress=progress)
    if path is not None:
        _write(index, path)
    return index


def fingerprint(weight: Tensor, states: Tensor) -> str:
    """Digest of shapes, dtypes, 64 evenly spaced rows of ``weight [V, D]``, and ``states``."""
    ids = torch.linspace(0, len(weight) - 1, min(_ROWS, len(weight))).long().to(weight.device)
    rows = weight.detach()[ids]
    digest = hashlib.sha256(f"{SCHEMA} {tuple(weight.shape)}".encode())
    for tensor in (rows, states.detach()):
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()[:32]


def _read(path: Path, weight: Tensor, states: Tensor) -> VocabularyIndex:
    """The index in a file, if it is this weight's to the last bit."""
    index = VocabularyIndex.load(path).to(weight.device)
    index.check(weight)
    if not torch.equal(tile_means(weight.detach(), index.order), index.mean_rows):
        raise ValueError("its mean rows are not this weight's")
    if index.columns is None:  # written by 0.1
        index = replace(index, columns=state_columns(states, weight))
    return index


def _write(index: VocabularyIndex, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        index.save(path)
    except (OSError, SafetensorError) as error:
        _log.warning("the vocabulary index is not kept: %s", error)
