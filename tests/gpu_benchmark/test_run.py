"""The GPU's minutes, rehearsed on a CPU: steps end by themselves, by force, or with a reason."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import plan, record, supervise
from benchmarks.gpu.report import publish, slug

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(tmp_path):
    """A small run in this process, which interprets no kernel."""
    from benchmarks.gpu.run import Run

    record.begin(tmp_path)
    return Run(tmp_path, plan.SMALL, torch.device("cpu"))


def asked(out: Path, only: list[str]) -> argparse.Namespace:
    """What the command line would give, without a second to measure in."""
    options = {"small": True, "limit": 0.0, "install": False, "again": False}
    return argparse.Namespace(out=out, only=only, **options)


def rehearsed(out: Path, *arguments: str) -> str:
    """What a rehearsal said."""
    command = [sys.executable, "-m", "benchmarks.gpu", "run", "--small", "--out", str(out)]
    names = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *arguments], cwd=ROOT, env=names, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_budgets_fit():
    """All steps together take at most nine minutes."""
    assert sum(plan.BUDGETS.values()) <= 540


@pytest.mark.slow
def test_the_whole_rehearsal(tmp_path):
    """Every step runs through, and every table and plot is made of what it found."""
    said = rehearsed(tmp_path, "--limit", "3000")
    assert "not done: none" in said
    states = record.states(tmp_path)
    assert {step: row["state"] for step, row in states.items()} == dict.fromkeys(
        plan.BUDGETS, "done"
    )
    rows = record.rows_of(tmp_path)
    failed = [row for row in rows if str(row.get("reason", "")).startswith("failed")]
    assert not failed, failed
    written = publish(tmp_path, tmp_path / "report", tmp_path)
    assert {path.suffix for path in written} == {".md", ".jsonl", ".png"}
    text = written[0].read_text()
    for title in ("The head beside", "Stages", "Launch sizes of the screen", "LoRA", "Tests"):
        assert f"## {title}" in text
    assert "refine half: the table's" in text


@pytest.mark.slow
def test_a_short_rehearsal_is_resumed(tmp_path, monkeypatch):
    """A worker of its own runs the steps; what is done is not run again."""
    monkeypatch.setenv("TRITON_INTERPRET", os.environ.get("TRITON_INTERPRET", ""))
    said = rehearsed(tmp_path, "--only", "unit,profile", "--limit", "3000")
    assert "unit: done" in said
    assert "profile: done" in said
    assert supervise.supervise(asked(tmp_path, ["unit", "profile"])) == {}
    text = publish(tmp_path, tmp_path, tmp_path)[0].read_text()
    assert "## The unit" in text
    assert "| N 8, V 200, D 16 |" in text


def test_a_step_that_fails_is_written_down(run, monkeypatch):
    """The error is its reason, with the place; the next step still runs."""
    from benchmarks.gpu import steps

    def broken(run):
        raise KeyError("nobody")

    monkeypatch.setitem(steps.STEPS, "refine", broken)
    monkeypatch.setitem(steps.STEPS, "tests", lambda run: run.add("tests", counts={}, failed=[]))
    assert steps.run_step(run, "refine", 10) == "failed"
    assert steps.run_step(run, "tests", 10) == "done"
    states = record.states(run.out)
    assert states["refine"]["reason"].startswith("KeyError: 'nobody' (broken, line")
    assert states["tests"]["state"] == "done"
    assert "- refine: KeyError" in publish(run.out, run.out, run.out)[0].read_text()


def test_a_step_ends_at_its_limit(run):
    """It stops between two measurements, and keeps what it has."""
    from benchmarks.gpu import steps

    assert steps.run_step(run, "unit", 0.0) == "cut"
    assert "over" in record.states(run.out)["unit"]["reason"]
    assert any(row["name"] == "installed" for row in record.rows_of(run.out))


def done(code: int, out: str = "", err: str = "") -> subprocess.CompletedProcess:
    """A process that ended."""
    return subprocess.CompletedProcess([], code, out, err)


def test_peers_are_asked_for_one_by_one(run, monkeypatch):
    """A package that cannot be had is a note, and does not keep the others away."""
    from benchmarks.gpu import install, steps

    asked_for = []

    def pip(command, **options):
        asked_for.append(command[-1])
        if command[-1] == "quack-kernels":
            raise subprocess.TimeoutExpired(command, 1.0)
        return done(command[-1] == "cut-cross-entropy", err="ERROR: no matching distribution")

    monkeypatch.setattr(install.subprocess, "run", pip)
    monkeypatch.setattr(
        "str_kernels.bench.contenders.versions", lambda name: {name: None}
    )  # nothing is installed
    assert steps.run_step(run, "install", 10) == "done"
    assert {"cut-cross-entropy", "liger-kernel", "quack-kernels"} <= set(asked_for)
    reasons = {row["name"]: row.get("reason") for row in record.rows_of(run.out)}
    assert reasons["cut-cross-entropy"] == "ERROR: no matching distribution"
    assert reasons["quack-kernels"] == "pip was not done in time"
    assert reasons["liger-kernel"] is None


def test_tests_that_take_too_long_are_cut(run, monkeypatch):
    """What had failed until then is kept."""
    from benchmarks.gpu import steps, suite

    def slow(command, **options):
        assert "TRITON_INTERPRET" not in options["env"]
        raise subprocess.TimeoutExpired(command, 1.0, output=b"FAILED a::b\n1 failed in 1s\n")

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(suite.subprocess, "run", slow)
    assert steps.run_step(run, "tests", 10) == "cut"
    row = next(row for row in record.rows_of(run.out) if row["name"] == "tests")
    assert (row["counts"], row["failed"]) == ({"failed": 1}, ["FAILED a::b"])
    monkeypatch.setattr(suite.subprocess, "run", lambda command, **_: done(0, "3 passed in 1s"))
    assert steps.run_step(run, "tests", 10) == "done"


def test_a_worker_that_hangs_is_killed(tmp_path, monkeypatch):
    """Its step says so, and the run ends in time."""
    record.begin(tmp_path)
    monkeypatch.setattr(plan, "GRACE_S", 0.2)  # a worker takes longer to start
    monkeypatch.setenv("TRITON_INTERPRET", os.environ.get("TRITON_INTERPRET", ""))
    assert supervise.supervise(asked(tmp_path, ["unit"])) == {"unit": "killed"}
    assert record.states(tmp_path)["unit"]["state"] == "killed"


def test_another_machine_is_refused(tmp_path, monkeypatch):
    """Figures of two machines are never in one file."""
    record.begin(tmp_path)
    here = record.circumstances_of(tmp_path)
    monkeypatch.setattr(record, "circumstances", lambda: here | {"device": "another"})
    with pytest.raises(ValueError, match=r"device differ.*another folder"):
        record.begin(tmp_path)


def test_the_last_row_of_a_name_counts(tmp_path):
    """A measurement that was made anew replaces the earlier one."""
    record.begin(tmp_path)
    for value in (1, 2):
        record.append(tmp_path, {"step": "unit", "name": "copy", "bytes": value})
    record.append(tmp_path, {"step": "unit", "name": "unit", "N": 1, "V": 2, "D": 3})
    assert [row.get("bytes") for row in record.rows_of(tmp_path)] == [2, None]


def test_folders_of_gpus():
    """A report lies under the chip's own name."""
    assert slug("NVIDIA H200") == "h200"
    assert slug("NVIDIA H100 80GB HBM3") == "h100-80gb-hbm3"
