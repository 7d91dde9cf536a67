"""Damage to a file: bytes flipped, cut, repeated or inserted, and JSON values replaced.

A mutation takes a random source and the bytes of a whole file, and returns other bytes. The JSON of
a safetensors file is its header; what follows the header stays.
"""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from typing import Any

Mutation = Callable[[random.Random, bytes], bytes]

DEEP = "[" * 3000 + "]" * 3000
WRONG = (None, True, -1, 0, 3, 10**12, 2**63, 1e308, float("nan"), "", "x", "\ud800", "\0", [], {},
         [None], [[0]], {"a": None}, "../../x", "a" * 5000)  # fmt: skip


def flip(source: random.Random, data: bytes) -> bytes:
    """Flip up to eight bits."""
    changed = bytearray(data)
    for _ in range(source.randint(1, 8)):
        changed[source.randrange(len(changed))] ^= 1 << source.randrange(8)
    return bytes(changed)


def cut(source: random.Random, data: bytes) -> bytes:
    """Keep the beginning, as a write does that was interrupted; perhaps none of it."""
    return data[: source.choice((0, 1, source.randrange(len(data))))]


def drop(source: random.Random, data: bytes) -> bytes:
    """Leave a span out."""
    start = source.randrange(len(data))
    return data[:start] + data[start + source.randint(1, 64) :]


def repeat(source: random.Random, data: bytes) -> bytes:
    """Write a span twice."""
    start = source.randrange(len(data))
    return data[: start + source.randint(1, 64)] + data[start:]


def insert(source: random.Random, data: bytes) -> bytes:
    """Insert random bytes, or zeros, as a file system leaves them after a crash."""
    start, count = source.randrange(len(data)), source.randint(1, 64)
    return data[:start] + source.choice((source.randbytes(count), bytes(count))) + data[start:]


def enlarge(source: random.Random, data: bytes) -> bytes:
    """Write a huge number in place of a digit."""
    digits = [i for i, byte in enumerate(data[:20000]) if chr(byte).isdigit()]
    if not digits:
        return flip(source, data)
    where = source.choice(digits)
    return data[:where] + source.choice((b"99999999999", b"-1", b"1e999")) + data[where + 1 :]


def value(source: random.Random, data: bytes) -> bytes:
    """Replace, remove or rename one value of the JSON in a file."""
    header = _header(data)
    if header is not None:
        text, rest = header
        changed = _changed(source, text)
        return struct.pack("<Q", len(changed)) + changed + rest
    lines = data.splitlines(keepends=True)
    try:
        json.loads(lines[0])  # JSON Lines: one of them
    except ValueError:
        return _changed(source, data)
    where = source.randrange(len(lines))
    lines[where] = _changed(source, lines[where]) + b"\n"
    return b"".join(lines)


BYTES: tuple[Mutation, ...] = (flip, cut, drop, repeat, insert, enlarge)
ALL: tuple[Mutation, ...] = (*BYTES, value, value, value)


def _header(data: bytes) -> tuple[bytes, bytes] | None:
    if len(data) > 8 and data[8:9] == b"{":
        (size,) = struct.unpack("<Q", data[:8])
        if size <= len(data) - 8:
            return data[8 : 8 + size], data[8 + size :]
    return None


def _changed(source: random.Random, text: bytes) -> bytes:
    try:
        root = json.loads(text)
    except ValueError:
        return flip(source, text)
    places = list(_places(root))
    if not places:
        return DEEP.encode()
    inside, key = source.choice(places)
    action = source.random()
    if action < 0.1 and isinstance(inside, dict):
        inside[f"{key}x"] = inside.pop(key)
    elif action < 0.2:
        del inside[key]
    elif action < 0.25:
        inside[key] = "DEEP"
    else:
        inside[key] = source.choice(WRONG)
    return json.dumps(root).replace('"DEEP"', DEEP).encode()


def _places(node: Any):
    """Yield every (list or dict, key) below a JSON value."""
    for key, below in list(node.items() if isinstance(node, dict) else enumerate(node)):
        yield node, key
        if isinstance(below, (dict, list)):
            yield from _places(below)
