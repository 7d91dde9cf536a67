"""Runs some tests in processes of their own, beside the others: all cores are busy.

Some need a setting that a process reads once: Triton asks for ``TRITON_INTERPRET`` when it is
imported, oneDNN for ``ONEDNN_MAX_CPU_ISA`` at its first product. These take a sample of the cases;
``TRITON_INTERPRET=1 pytest tests/triton/interpreted`` takes all. The others are whole folders.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# what depends on the CPU: which products are taken, in which dtype, and how exact they are
# (test_rest.py has the same products, in many more cases)
_BY_CPU = (
    "tests/engine",
    "--ignore=tests/engine/test_rest.py",
    "tests/backends/test_exact.py",
    "tests/backends/test_screen_int8.py",
)


@dataclass(frozen=True)
class Job:
    """Files of tests, what their process finds in its environment, and which share is run."""

    name: str
    files: tuple[str, ...]
    setting: tuple[str, str] | None = None
    one_in: int | None = None

    def run(self) -> subprocess.CompletedProcess:
        """Run them; some have logits of -inf, and numpy warns about the logarithm of 0."""
        options = ("-q", "-p", "no:cacheprovider", "-W", "ignore")
        sample = ("--one-in", str(self.one_in), "--sample", self.name) if self.one_in else ()
        setting = dict([self.setting] if self.setting else ())
        return subprocess.run(
            [*_PATIENT, sys.executable, "-m", "pytest", *options, *sample, *self.files],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", **setting},
            capture_output=True,
            text=True,
        )


_INTERPRETED = tuple(
    str(path.relative_to(ROOT)) for path in (ROOT / "tests/triton/interpreted").glob("test_*.py")
)
INTERPRETED = [
    Job(f"interpreted_{half}", tuple(sorted(_INTERPRETED)[half::2]), ("TRITON_INTERPRET", "1"), 16)
    for half in range(2)
]
CPUS = [
    Job("AVX2", _BY_CPU, ("ONEDNN_MAX_CPU_ISA", "AVX2"), 4),
    # no machine is needed to choose as one with AMX does: tests/cpus.py
    Job("AMX", _BY_CPU, ("STR_KERNELS_TEST_CPU", "bf16,int8,amx"), 4),
]
FOLDERS = [
    Job("distributed", ("tests/distributed",)),
    Job("commands", ("tests/cli", "tests/faults")),
]
RUNS: dict[Job, Future] = {}
# a job for each core, which the session itself comes before: none idles while it waits for them
_POOL = ThreadPoolExecutor(os.cpu_count() or 1)
_PATIENT = ("nice", "-n", "5") if shutil.which("nice") else ()


def elsewhere(items: list[pytest.Item]) -> set[pytest.Item]:
    """Those of these tests that a job runs which is among them."""
    folders = [ROOT / folder for job in _jobs(items) if job in FOLDERS for folder in job.files]
    return {
        item
        for item in items
        if not item.get_closest_marker("slow")
        and any(folder in item.path.parents for folder in folders)
    }


def _jobs(items: list[pytest.Item]) -> list[Job]:
    found = (getattr(item, "callspec", None) and item.callspec.params.get("job") for item in items)
    return [job for job in found if isinstance(job, Job)]


def start(items: list[pytest.Item]) -> None:
    """Start the jobs that ``tests/test_beside.py`` will ask for."""
    for job in _jobs(items):
        RUNS[job] = _POOL.submit(job.run)


def stop() -> None:
    """Start no further job; a session that is interrupted waits for one at most."""
    _POOL.shutdown(wait=False, cancel_futures=True)
