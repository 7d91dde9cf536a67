"""What the README says is what runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TEST_COMMAND = 'pip install ".[test]" && pytest -q'


def test_ci_runs_the_readme_command():
    """CI and the README share one test command."""
    assert f"\n{TEST_COMMAND}\n" in README
    assert f"\n{TEST_COMMAND}\n" in (ROOT / ".ci/run").read_text(encoding="utf-8")


def test_example_runs(tiny_model_dir, tmp_path, monkeypatch):
    """The Python example trains a real (tiny) model, as it stands."""
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    rows = [{"input_ids": [5, 6, 7, 8], "labels": [-100, 6, 7, 8]}] * 8
    monkeypatch.chdir(tmp_path)
    example = example.replace("max_steps=100", 'max_steps=2, report_to="none", use_cpu=True')
    exec(compile(example, "README.md", "exec"), {"MODEL": str(tiny_model_dir), "DATASET": rows})
    assert (tmp_path / "adapter/adapter_model.safetensors").is_file()


def test_options_are_those_of_the_code():
    """Every row of the table of settings is a parameter with that default."""
    import inspect

    from str_kernels import patch_model

    parameters = inspect.signature(patch_model).parameters
    table = README.split("| `patch_model(…)`")[1].split("\n\n")[0]
    rows = re.findall(r"^\| `(\w+)` \| `(.+?)` \|", table, re.MULTILINE)
    assert len(rows) == len(set(parameters) - {"model", "verify"})
    for name, default in rows:
        assert repr(parameters[name].default) == default.replace('"', "'")


@pytest.mark.parametrize(
    "command", ["doctor", "tokens", "cache", "train", "evaluate", "bench", "demo"]
)
def test_commands_exist(command):
    """Every command that the README names has a help text."""
    from typer.testing import CliRunner

    from str_kernels.cli.main import app

    assert f"str-kernels {command}" in README
    assert CliRunner().invoke(app, [command, "--help"]).exit_code == 0


def test_readme_is_short():
    """A README that is read: 150 lines at most."""
    assert len(README.splitlines()) <= 150


def test_measured_tables_are_those_of_the_results():
    """What the README says was measured is what the committed results hold."""
    from benchmarks.readme import BEGIN, END, section

    assert README.split(BEGIN)[1].split(END)[0].strip() == section().strip()
