"""Fetch the peers that are missing; one that cannot be had is a note."""

from __future__ import annotations

import subprocess
import sys

from benchmarks.gpu.run import Run
from str_kernels.bench.contenders import CONTENDERS


def install(run: Run) -> None:
    """Ask pip for every peer that is missing, each by itself, so that none holds up another."""
    packages = {c.package for c in CONTENDERS.values() if c.missing() and c.package != "torch"}
    for package in sorted(packages - {None}):
        if not run.todo(package):
            continue
        command = [sys.executable, "-m", "pip", "install", "--quiet", package]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=run.left())
        except subprocess.TimeoutExpired:
            run.add(package, reason="pip was not done in time")
            continue
        lines = done.stderr.strip().splitlines() or [f"pip ended with {done.returncode}"]
        run.add(package, **({} if done.returncode == 0 else {"reason": lines[-1][:300]}))
