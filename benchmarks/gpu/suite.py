"""Step 8: the tests that need a GPU."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

from benchmarks.gpu.run import OutOfTime, Run

_ROOT = Path(__file__).parents[2]
_SIDE_BY_SIDE = "6"  # processes: most of the time is compilation on the host


def tests(run: Run) -> None:
    """Run ``pytest -m gpu``, and add how many passed and what failed."""
    run.forget()
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-rf", "-p", "no:cacheprovider"]
    command.append("tests/triton/test_gpu.py")
    if run.device.type == "cuda" and importlib.util.find_spec("xdist") is not None:
        command += ["-n", _SIDE_BY_SIDE]
    names = {key: x for key, x in os.environ.items() if key != "TRITON_INTERPRET"}
    try:
        done = subprocess.run(
            command, cwd=_ROOT, env=names, capture_output=True, text=True, timeout=run.left()
        )
    except subprocess.TimeoutExpired as error:
        output = error.stdout or b""  # bytes, whatever was asked for
        output = output.decode(errors="replace") if isinstance(output, bytes) else output
        run.add("tests", **read(output), reason="not done in time", last=output[-300:])
        raise OutOfTime from error
    run.add("tests", code=done.returncode, **read(done.stdout), errors=done.stderr[-1000:])


def read(output: str) -> dict:
    """Read the counts of pytest's last line, and the lines that name what failed."""
    lines = output.strip().splitlines()
    counts = re.findall(r"(\d+) (passed|failed|skipped|error)", lines[-1]) if lines else []
    failed = [line[:300] for line in lines if line.startswith(("FAILED", "ERROR"))]
    return {"counts": {name: int(number) for number, name in counts}, "failed": failed}
