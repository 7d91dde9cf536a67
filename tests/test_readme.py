"""What the README says is what runs: every block as it is printed, on a tiny model."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from statistics import fmean

import pytest

from benchmarks.common import RESULTS
from benchmarks.readme import BEGIN, END, section
from benchmarks.safety.findings import read
from benchmarks.safety.methods import HARSH, plan_order
from tests.cli.calling import call
from tests.docs.reading import Block, blocks, commands, furnish, shorter

ROOT = Path(__file__).parents[1]
FILE = ROOT / "README.md"
README = FILE.read_text(encoding="utf-8")
TEST_COMMAND = 'pip install ".[test]" && pytest -q'
DEMO_COMMAND = "pip install . && str-kernels demo"


def test_ci_runs_the_readme_command():
    """CI and the README share one test command."""
    assert f"\n{TEST_COMMAND}\n" in README
    assert f"\n{TEST_COMMAND}\n" in (ROOT / ".ci/run").read_text(encoding="utf-8")
    assert f"\n{DEMO_COMMAND}\n" in README  # tests/cli/test_demo.py runs the demo


def test_its_blocks_run_one_after_another(aligned_model_dir, tmp_path, monkeypatch, capsys):
    """A TRL run whose logs have the constraint's keys, both evaluations, and the page."""
    pytest.importorskip("trl", minversion="1.15")
    datasets = pytest.importorskip("datasets")
    furnish(tmp_path, aligned_model_dir)
    monkeypatch.chdir(tmp_path)
    chats = str(tmp_path / "chats.jsonl")
    load = datasets.load_dataset
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name, split: load("json", data_files=chats, split=split)
    )
    (program,) = [block for block in blocks(FILE, "python") if "SFTTrainer" in block.text]
    known: dict = {"__name__": "__main__"}
    text = re.sub(r"logging_steps=\d+, max_length=\d+", "logging_steps=1", shorter(program.text))
    with warnings.catch_warnings():
        exec(compile(text, "README.md", "exec"), known)
    logged = known["trainer"].state.log_history[0].keys()
    assert log_line().keys() <= logged
    run_commands(capsys)
    assert (tmp_path / "compare.html").read_text().count("<tr data-set=") == 32


def run_commands(capsys) -> None:
    """Run the package's commands; the demo and the installation have tests of their own."""
    for block in blocks(FILE, "sh"):
        for words in commands(Block(block.language, block.text, block.line)):
            if words[0] == "str-kernels":
                called = call(capsys, *words[1:], *short(words))
                assert called.code == 0, called.err


def short(words: list[str]) -> list[str]:
    return [] if "--compare" in words else ["--max-new-tokens", "4"]


def log_line() -> dict[str, float]:
    """The log line that the README explains."""
    (line,) = re.findall(r"^\{'loss'.*\}$", README, re.MULTILINE)
    return {name: float(value) for name, value in re.findall(r"'(\w+)': '?([-\d.e]+)'?", line)}


def test_the_log_line_adds_up():
    """The loss is both terms, and every key is on the page about logs."""
    log = log_line()
    assert log["loss"] == pytest.approx(log["cross_entropy"] + log["safety_penalty"], rel=0.02)
    page = (ROOT / "docs/logs.md").read_text(encoding="utf-8")
    assert [name for name in log if f"`{name}`" not in page] == []


def test_the_log_line_is_the_end_of_a_run():
    """Means over its last ten steps, as the trainer logs them."""
    runs = read(RESULTS / "safety", plan_order()).find(HARSH.name, "kl").results
    history = {name: values[-10:] for name, values in runs[0]["history"].items() if values}
    log, mean = log_line(), {name: fmean(values) for name, values in history.items()}
    assert log["cross_entropy"] == pytest.approx(mean["cross_entropy"], abs=1e-4)
    assert log["safety_penalty"] == pytest.approx(mean["penalty"], abs=1e-4)
    assert log["safety_drift"] == pytest.approx(mean["drift"] ** 0.5, abs=1e-4)


@pytest.mark.parametrize(
    "command", ["doctor", "plan", "tokens", "cache", "train", "evaluate", "bench"]
)
def test_commands_exist(command):
    """Every command that the README names has a help text."""
    from typer.testing import CliRunner

    from str_kernels.cli.main import app

    assert f"`{command}`" in README or f"`str-kernels {command}`" in README
    assert CliRunner().invoke(app, [command, "--help"]).exit_code == 0


def test_its_links_lead_to_files():
    """And to headings that are there."""
    for name, anchor in re.findall(r"\]\(((?!http)[^)#]+)(#[^)]*)?\)", README):
        path = ROOT / name
        assert path.is_file(), name
        if anchor:
            titles = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
            assert anchor[1:] in slugs, name + anchor


def test_readme_is_short():
    """A README that is read: 120 lines at most."""
    assert len(README.splitlines()) <= 120


def test_measured_tables_are_those_of_the_results():
    """What the README says was measured is what the committed results hold."""
    assert README.split(BEGIN)[1].split(END)[0].strip() == section().strip()
