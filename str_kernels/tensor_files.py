"""Files of tensors, with a checksum of each that is compared when it is read."""

from __future__ import annotations

import json
import os
import zlib
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from str_kernels.files import replacing

_CHECKSUMS = "crc32"  # the metadata's entry


def save_tensors(
    path: str | os.PathLike, tensors: dict[str, Tensor], metadata: dict[str, str]
) -> None:
    """Write a safetensors file whose metadata also hold each tensor's checksum.

    Raises:
        OSError: the file cannot be written, for instance because the disk is full.
    """
    checksums = json.dumps({name: _checksum(tensor) for name, tensor in tensors.items()})
    with replacing(path) as partial:
        try:
            save_file(tensors, partial, metadata={**metadata, _CHECKSUMS: checksums})
        except SafetensorError as error:
            raise OSError(f"{path}: cannot be written ({error}).") from error


class Described:
    """What files of tensors have in common: ``metadata``, and how errors name them."""

    _name: str
    metadata: dict[str, str]

    def json(self, entry: str) -> Any:
        """Return the JSON value of an entry of the metadata.

        Raises:
            ValueError: there is no such entry, or it is not JSON.
        """
        try:
            return json.loads(self.metadata[entry])
        except (KeyError, ValueError) as error:
            raise ValueError(f"{self._name}: its {entry} is missing or damaged.") from error

    def _changed(self, key: str) -> ValueError:
        return ValueError(f"{self._name}: {key} is not as it was written; make the file again.")


class SavedTensors(Described):
    """The tensors of a safetensors file, each read when it is asked for.

    Args:
        path: the file.
        name: how errors name it, such as ``reference='refs.safetensors'``.

    Raises:
        ValueError: no such file, or no safetensors file.
    """

    def __init__(self, path: str | os.PathLike, name: str) -> None:
        """Open the file and read its header."""
        self._name = name
        if not os.path.isfile(path):
            raise ValueError(f"{name}: no such file.")
        try:
            self._file = _opened(path)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{name}: not a safetensors file ({error}).") from None
        self.metadata: dict[str, str] = self._file.metadata() or {}
        self.names = frozenset(self._file.keys())
        self._checksums = self.json(_CHECKSUMS) if _CHECKSUMS in self.metadata else {}

    def __getitem__(self, key: str) -> Tensor:
        """Return a tensor.

        Raises:
            ValueError: its bytes are not those that were written.
        """
        tensor = self._file.get_tensor(key)
        if self._checksums and self._checksums.get(key) != _checksum(tensor):
            raise self._changed(key)
        return tensor


def _opened(path: str | os.PathLike) -> Any:
    """Open a file; the library opens it twice, for its header and its data, and both must be one.

    Another process may put a new file in its place at any time.
    """
    while True:
        before = os.stat(path)
        file = safe_open(path, framework="pt")
        after = os.stat(path)
        if (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns):
            return file


def _checksum(tensor: Tensor) -> int:
    return zlib.crc32(tensor.contiguous().view(-1).view(torch.uint8).numpy())
