"""`str-kernels train` as a user calls it."""

import json
import os
import signal
import subprocess
import sys

import pytest

from tests.cli.calling import call

ROWS = [
    {"prompt": "tell me the topic of rain", "response": "weather ."},
    {"messages": [{"role": "user", "content": "tell me the topic of ball"},
                  {"role": "assistant", "content": "sport ."}]},
]  # fmt: skip


@pytest.fixture
def data_file(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS * 4))
    return path


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "str_kernels.cli.main", *map(str, arguments)],
        capture_output=True,
        text=True,
    )


@pytest.fixture
def run(capsys):
    """Runs the command in this process: exit code, stdout, stderr."""
    return lambda *arguments: call(capsys, *arguments)


QUICK = ("--steps", 3, "--batch", 2, "--rank", 4, "--max-length", 64, "--logging-steps", 1)


def test_a_newcomer_trains_and_gets_numbers(tiny_model_dir, data_file, tmp_path):
    """One command in a fresh process: the two terms on stderr as they come, a table of what was
    measured on stdout, an adapter on disk, and what to do next.
    """
    out = tmp_path / "adapter"
    done = command("train", tiny_model_dir, data_file, "--out", out, "--top-k", 4, *QUICK)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    for text in ("seconds a step", "tokens a second", "peak memory of the process",
                 "cross-entropy", "safety penalty"):  # fmt: skip
        assert text in done.stdout
    logs = [line for line in done.stderr.splitlines() if line.startswith("step ")]
    assert len(logs) == 3
    assert all("cross_entropy" in line and "safety_penalty" in line for line in logs)
    assert "next: str-kernels evaluate" in done.stderr
    assert (out / "adapter_model.safetensors").is_file()
    assert json.loads((out / "str_kernels.json").read_text())["complete"]


@pytest.mark.parametrize("flag", ["--no-safety", "--unpatched"])
def test_without_the_constraint(run, tiny_model_dir, data_file, tmp_path, flag):
    """The fused loss alone and the model's own head report no penalty; stdout is JSON alone."""
    given = ("train", tiny_model_dir, data_file, "--out", tmp_path / "out", flag, "--json")
    code, out, _ = run(*given, *QUICK)
    assert code == 0
    result = json.loads(out)
    assert result["schema"] == "str_kernels.train_result/1"
    assert result["safety_penalty"] is None
    assert result["cross_entropy"] > 0
    assert result["peak_process_mib"] > 0


def test_user_mistakes_are_sentences(run, tiny_model_dir, tmp_path):
    """Everything wrong at once, each with its name, and no stack trace."""
    broken = tmp_path / "broken.jsonl"
    broken.write_text(json.dumps(ROWS[0]) + "\n{oops\n")
    wrong = ("--target-modules", "nothing", "--tokens", tmp_path / "no.json")
    code, out, err = run("train", tiny_model_dir, broken, "--out", "/proc/none/out", *wrong)
    assert (code, out) == (2, "")
    assert "Traceback" not in err
    for text in ("broken.jsonl:2", "/proc/none/out", "target_modules=nothing", "no.json"):
        assert text in err


def test_wrong_values_are_refused_by_name(run, tmp_path):
    """Settings are checked before any file is looked at, and together."""
    code, _, err = run("train", "m", "d", "--out", "o", "--rank", 0, "--positions", "some")
    assert code == 2
    assert "rank=0" in err
    assert "positions='some'" in err
    code, _, err = run("train", "m", "d", "--out", "o", "--no-safety", "--unpatched")
    assert code == 2
    assert "not both" in err


def test_an_existing_run_is_kept(run, tiny_model_dir, data_file, tmp_path):
    """A second run into the same folder is refused, and so is a resume without a checkpoint."""
    given = ("train", tiny_model_dir, data_file, "--out", tmp_path / "out", "--no-safety", *QUICK)
    assert run(*given)[0] == 0
    code, _, err = run(*given)
    assert code == 2
    assert "already has a run" in err
    code, _, err = run(*given, "--resume")
    assert code == 2
    assert "has no checkpoint" in err


def test_ctrl_c_saves_and_resume_finishes(run, tiny_model_dir, data_file, tmp_path, monkeypatch):
    """Stopped by Ctrl-C the command says how to go on and fails; that command then finishes."""
    from str_kernels.cli.training_view import Lines

    given = ("train", tiny_model_dir, data_file, "--out", tmp_path / "out", "--no-safety", *QUICK)
    with monkeypatch.context() as patched:
        patched.setattr(
            Lines, "step", lambda self, done, total: os.kill(os.getpid(), signal.SIGINT)
        )
        code, _, err = run(*given)
    assert code == 1
    assert "the same command with --resume continues" in err
    code, out, err = run(*given, "--resume")
    assert code == 0, err
    assert "3 of 3" in out
