"""Tensors in one SQLite file, to which any process adds some at any time: each is whole or absent.

A safetensors file is written once, in one piece; here a killed writer loses what it was adding and
nothing else.
"""

from __future__ import annotations

import json
import os
import sqlite3
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from str_kernels.tensor_files import Described

_MAGIC = b"SQLite format 3\0"
_WAIT = 60.0  # seconds for another process that writes
_TABLES = (
    "CREATE TABLE IF NOT EXISTS metadata (name TEXT PRIMARY KEY, value TEXT NOT NULL)",
    "CREATE TABLE IF NOT EXISTS tensors"
    " (name TEXT PRIMARY KEY, shape TEXT NOT NULL, crc32 INTEGER NOT NULL, data BLOB NOT NULL)",
)


def is_of_rows(path: str | os.PathLike) -> bool:
    """Whether a file is one of these."""
    with open(path, "rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC


class TensorRows(Described):
    """The fp16 tensors of a file, by name; it has what `SavedTensors` has, and ``add``.

    Args:
        path: the file.
        name: how errors name it, such as ``reference='refs.sqlite'``.
        metadata: what a new file says of itself; None: the file must be there.

    Raises:
        ValueError: a file that is damaged or of another kind.
    """

    def __init__(
        self, path: str | os.PathLike, name: str, metadata: dict[str, str] | None = None
    ) -> None:
        """Open the file, or make it."""
        self._name = name
        # a data loader's thread may ask, too; SQLite serialises
        self._file = sqlite3.connect(path, timeout=_WAIT, check_same_thread=False)
        with self._reading():
            if metadata is not None:
                self._make(metadata)
            self.metadata = dict(self._file.execute("SELECT name, value FROM metadata"))

    def _make(self, metadata: dict[str, str]) -> None:
        """Make what is not there yet, in one transaction: a killed maker leaves an empty file."""
        with self._file:
            self._file.execute("BEGIN IMMEDIATE")
            for table in _TABLES:
                self._file.execute(table)
            self._file.executemany("INSERT OR IGNORE INTO metadata VALUES (?, ?)", metadata.items())

    @property
    def names(self) -> TensorRows:
        """What tells by ``in`` whether a tensor is there now."""
        return self

    def __contains__(self, key: str) -> bool:
        with self._reading():
            found = self._file.execute("SELECT 1 FROM tensors WHERE name = ?", (key,)).fetchone()
        return found is not None

    def __len__(self) -> int:
        with self._reading():
            return self._file.execute("SELECT count(*) FROM tensors").fetchone()[0]

    def __getitem__(self, key: str) -> Tensor:
        """Return a tensor.

        Raises:
            ValueError: its bytes are not those that were written.
        """
        with self._reading():
            shape, crc, data = self._file.execute(
                "SELECT shape, crc32, data FROM tensors WHERE name = ?", (key,)
            ).fetchone()
        if zlib.crc32(data) != crc:
            raise self._changed(key)
        return torch.from_numpy(np.frombuffer(bytearray(data), np.float16)).reshape(
            json.loads(shape)
        )

    def add(self, tensors: dict[str, Tensor]) -> None:
        """Add fp16 tensors, all of them or none; one that is there stays as it is.

        Raises:
            OSError: the file cannot be written, for instance because the disk is full.
        """
        rows = []
        for key, tensor in tensors.items():
            data = tensor.contiguous().numpy().tobytes()
            rows.append((key, json.dumps(list(tensor.shape)), zlib.crc32(data), data))
        try:
            with self._file:  # one transaction
                self._file.executemany("INSERT OR IGNORE INTO tensors VALUES (?, ?, ?, ?)", rows)
        except sqlite3.OperationalError as error:
            raise OSError(f"{self._name}: cannot be written ({error}); free some space.") from error

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        # UnicodeDecodeError: SQLite quotes the damage
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{self._name}: cannot be read or made ({error}); remove it and begin again."
            ) from error
