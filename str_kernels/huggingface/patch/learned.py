"""What a patch has learned in a run, as plain JSON values for a checkpoint.

Stage: an index, a frozen head's weight → strings that tell them again in another process.

An index is kept by its order, its columns' factors and its number of hot tiles, which are no
functions of the weight: they depend on the first training batch as well. All else in an index is
computed from the weight and the order, to the same bits.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

SCHEMA = "str_kernels.patch/1"
_ROWS = 64  # rows of the weight in its digest


def weight_digest(weight: Tensor) -> str:
    """Digest of shape, dtype and 64 evenly spaced rows of ``weight [V, D]``; waits for a device."""
    ids = torch.linspace(0, len(weight) - 1, min(_ROWS, len(weight))).long().to(weight.device)
    return _digest(weight.detach()[ids], f"{tuple(weight.shape)}")


def order_digest(order: Tensor) -> str:
    """Digest of an order ``[V]``."""
    return _digest(order)


def _digest(tensor: Tensor, prefix: str = "") -> str:
    digest = hashlib.sha256(f"{prefix} {tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()[:32]


def encode_order(order: Tensor) -> str:
    """An order ``[V]`` as text, about four bytes a row."""
    values = order.to("cpu", torch.int32).numpy().astype("<i4")
    return base64.b64encode(zlib.compress(values.tobytes())).decode("ascii")


def decode_order(text: str, rows: int) -> Tensor:
    """The order ``[rows]`` int64 in what `encode_order` made.

    Raises:
        ValueError: damaged, or of another number of rows.
    """
    try:
        decompressor = zlib.decompressobj()
        data = decompressor.decompress(base64.b64decode(text, validate=True), 4 * rows + 1)
    except (binascii.Error, zlib.error) as error:
        raise ValueError(f"the order of the vocabulary index is damaged ({error})") from None
    if len(data) != 4 * rows or not decompressor.eof:
        raise ValueError(f"the order of the vocabulary index has not {rows} rows")
    return torch.from_numpy(np.frombuffer(data, "<i4").astype(np.int64))


@contextmanager
def reading_state(state: Any) -> Iterator[None]:
    """In this block the entries of a state are read.

    Raises:
        ValueError: no state of a patch, one of another version, or an entry that is missing or of
            another kind.
    """
    remedy = "give what patch.state_dict() returned"
    found = state.get("schema") if isinstance(state, dict) else type(state).__name__
    if found != SCHEMA:
        raise ValueError(f"state of a patch: schema={found!r}, must be {SCHEMA!r}; {remedy}.")
    try:
        yield
    except (KeyError, TypeError, AttributeError) as error:
        what = f"{type(error).__name__}: {error}"
        raise ValueError(f"state of a patch: is damaged ({what}); {remedy}.") from error
