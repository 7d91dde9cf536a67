"""The kernels run interpreted, what depends on the CPU runs as on other CPUs, and whole folders."""

from __future__ import annotations

import importlib.util

import pytest

from tests.beside import CPUS, FOLDERS, INTERPRETED, RUNS


def passes(job) -> None:
    """Every test that the job chose passes."""
    done = RUNS[job].result()
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@pytest.mark.parametrize("job", FOLDERS, ids=lambda job: job.name)
def test_folders(job):
    """Of tests that start many processes."""
    passes(job)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("job", INTERPRETED, ids=lambda job: job.name)
def test_interpreted(job):
    """Under ``TRITON_INTERPRET=1``."""
    passes(job)


@pytest.mark.parametrize("job", CPUS, ids=lambda job: job.name)
def test_on_another_cpu(job):
    """With fewer instructions for oneDNN, and where the engine believes in a CPU with more."""
    passes(job)
