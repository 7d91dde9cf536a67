"""The fastest screen of a CPU that no table knows, measured at first use and kept.

Each screen that may be faster than the products of the operands' own dtype screens one small
problem. The seconds go to ``screens.json`` in the cache folder, under all that they depend on, so
that later processes choose alike. A screen by name is never measured.
"""

from __future__ import annotations

import json
import logging
import os
import time
from functools import cache
from pathlib import Path

import torch

from str_kernels.backends.torch.screen import screen_tiles
from str_kernels.engine.contract import Block, Head, Tiles
from str_kernels.engine.cpu import processor_field, this_cpu
from str_kernels.files import cache_folder, write_json
from str_kernels.notices import say_once
from str_kernels.options import LossOptions
from str_kernels.vocabulary import tile_means

# A block of a real screen has about as many rows and logits; one product takes some 10 ms a core.
_ROWS, _VOCAB, _DIM = 512, 2048, 1024
_REPEATS = 3
_log = logging.getLogger("str_kernels")


@cache
def fastest_screen(dtype: torch.dtype) -> str:
    """Return the fastest screen of operands of this dtype on this CPU."""
    seconds = _kept_or_measured(dtype)
    chosen = min(seconds, key=seconds.__getitem__)
    figures = ", ".join(f"{name} {1e3 * s:.1f}" for name, s in seconds.items())
    say_once(f"str_kernels: screen={chosen} for {dtype} was the fastest here (ms: {figures})")
    return chosen


def _kept_or_measured(dtype: torch.dtype) -> dict[str, float]:
    """Read the seconds of each screen, or measure and write them."""
    candidates, folder, key = _candidates(dtype), cache_folder(), _key(dtype)
    path = None if folder is None else folder / "screens.json"
    found = _read(path).get(key, {})
    if found.keys() == set(candidates):
        return found
    found = {screen: _seconds(screen, dtype) for screen in candidates}
    if path is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(path, {**_read(path), key: found})
        except OSError as error:  # a folder that cannot be written to
            _log.info("the measured screen is not kept: %s", error)
    return found


def _candidates(dtype: torch.dtype) -> list[str]:
    cpu = this_cpu()
    faster = {"bf16": cpu.bf16 and dtype == torch.float32, "int8": cpu.int8}
    return ["exact", *(name for name, may_be in faster.items() if may_be)]


def _key(dtype: torch.dtype) -> str:
    """Name all that the seconds depend on, but for the load of the machine."""
    model = processor_field("model name") or processor_field("CPU part") or "unknown"
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper()
    capability = torch.backends.cpu.get_cpu_capability()
    threads = torch.get_num_threads()
    return f"{model}; {capability}; {limit}; torch {torch.__version__}; {threads} threads; {dtype}"


def _read(path: Path | None) -> dict[str, dict[str, float]]:
    """Read the file; nothing if it is missing or not what was written."""
    if path is None:
        return {}
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(read, dict):
        return {}
    return {key: seconds for key, seconds in read.items() if _are_seconds(seconds)}


def _are_seconds(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(x, float) for x in value.values())


def _seconds(screen: str, dtype: torch.dtype) -> float:
    """Screen a small problem; the least seconds of a few repeats after a first one."""
    make = torch.Generator().manual_seed(0)
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        hidden, weight = (
            torch.randn(rows, _DIM, generator=make, dtype=torch.float32, device="cpu").to(dtype)
            for rows in (_ROWS, _VOCAB)
        )
        labels = torch.zeros(_ROWS, dtype=torch.int64, device="cpu")
        tiles = Tiles(None, None, tile_means(weight, None))
        block = Block(Head(hidden / _DIM**0.5, weight, None), labels, tiles, LossOptions())
        taken = []
        for _ in range(1 + _REPEATS):
            start = time.perf_counter()
            screen_tiles(block, screen, _VOCAB)
            taken.append(time.perf_counter() - start)
    return min(taken[1:])
