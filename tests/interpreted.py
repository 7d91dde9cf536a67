"""Runs files of interpreted tests in processes, which begin before the other tests of a session."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# the file that takes longest begins
FILES = sorted((ROOT / "tests" / "triton" / "interpreted").glob("test_*.py"), reverse=True)
RUNS: dict[Path, Future] = {}
# one core is left to the session itself
_POOL = ThreadPoolExecutor(max(1, (os.cpu_count() or 1) - 1))
# some tests have logits of -inf, and numpy warns about the logarithm of 0
_OPTIONS = ("-q", "-p", "no:cacheprovider", "-W", "ignore")


def start(items: list[pytest.Item]) -> None:
    """Start the files that ``test_interpreted`` will ask for."""
    for item in items:
        if item.name.startswith("test_interpreted["):
            path = item.callspec.params["path"]
            RUNS[path] = _POOL.submit(_run, path)


def stop() -> None:
    """Start no further file; a session that is interrupted waits for one at most."""
    _POOL.shutdown(wait=False, cancel_futures=True)


def _run(path: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "pytest", *_OPTIONS, path.relative_to(ROOT)],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
