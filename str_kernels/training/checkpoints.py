"""Checkpoints of a run: sealed when they are whole, and found again.

A checkpoint is a folder of many files, which an interruption can leave half written. The seal is
written last, with the SHA-256 of every file. A folder without one was not finished and is not used;
one with a file that differs from its seal is refused by name.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerState, TrainingArguments

from str_kernels.files import sha256_of, write_json

SEAL = "str_kernels_seal.json"
SCHEMA = "str_kernels.seal/1"


class Sealing(TrainerCallback):
    """Seals each checkpoint; must be the last callback, since others may add files."""

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any
    ) -> None:
        """Seal the checkpoint of this step, once every process has written its files."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.barrier()
        if state.is_world_process_zero:
            seal(Path(args.output_dir) / f"checkpoint-{state.global_step}")


def seal(folder: Path) -> None:
    """Write the digests of all files below a folder into it."""
    (folder / SEAL).unlink(missing_ok=True)
    write_json(folder / SEAL, {"schema": SCHEMA, "sha256": _digests(folder)})


def newest_checkpoint(folder: Path, *, sealed: bool = True) -> Path | None:
    """Return the whole checkpoint with the largest step, or None.

    Args:
        folder: the run's.
        sealed: without a seal a checkpoint is not whole; runs of version 0.1 have no seals.

    Raises:
        ValueError: a file of that checkpoint is missing or changed since it was sealed.
    """
    mark = SEAL if sealed else "trainer_state.json"
    whole = [path for path in _checkpoints(folder) if (path / mark).is_file()]
    if not whole:
        return None
    if sealed:
        _check_seal(whole[-1])
    return whole[-1]


def settle(folder: Path, newest: Path | None) -> list[str]:
    """Make ``newest`` the last checkpoint of a run, and return the names of those removed.

    Later ones were not finished. One of version 0.1 is sealed, since the run goes on with seals.
    """
    if newest is not None and not (newest / SEAL).is_file():
        seal(newest)
    found = _checkpoints(folder)
    later = found if newest is None else found[found.index(newest) + 1 :]
    for path in later:
        shutil.rmtree(path)
    return [path.name for path in later]


def _checkpoints(folder: Path) -> list[Path]:
    """List the folders of checkpoints by their step."""
    found = [path for path in folder.glob("checkpoint-*") if path.name[11:].isdecimal()]
    return sorted(found, key=lambda path: int(path.name[11:]))


def _check_seal(folder: Path) -> None:
    remedy = f"remove {folder} to resume from an earlier checkpoint."
    try:
        expected = json.loads((folder / SEAL).read_text(encoding="utf-8"))["sha256"]
        names = set(expected)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / SEAL}: is damaged; {remedy}") from error
    found = _digests(folder)
    for name in sorted(names | found.keys()):
        if found.get(name) != expected.get(name):
            raise ValueError(f"{folder / name}: is not as it was written; {remedy}")


def _digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SEAL)
    return {path.relative_to(folder).as_posix(): sha256_of(path) for path in files}
