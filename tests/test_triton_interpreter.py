"""The kernels run interpreted, each file in a process: Triton reads the setting on import."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "tests" / "triton" / "interpreted").glob("test_*.py"), reverse=True)
# some tests have logits of -inf, and numpy warns about the logarithm of 0
OPTIONS = ("-q", "-p", "no:cacheprovider", "-W", "ignore")


def interpret(path: Path) -> subprocess.CompletedProcess:
    """Run one file's tests."""
    return subprocess.run(
        [sys.executable, "-m", "pytest", *OPTIONS, path.relative_to(ROOT)],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def runs(request):
    """Runs of the chosen files, as many at a time as there are cores; the longest begins."""
    chosen = [item.callspec.params["path"] for item in request.session.items if at_home(item)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {path: pool.submit(interpret, path) for path in chosen}


def at_home(item: pytest.Item) -> bool:
    """Whether the test is one of this file's."""
    return item.path == Path(__file__)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_interpreted(path, runs):
    """Every test of the file passes under ``TRITON_INTERPRET=1``."""
    done = runs[path].result()
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
