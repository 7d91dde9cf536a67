"""What the README says is what is run."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[1]
TEST_COMMAND = 'pip install -e ".[test]" && pytest -q'


def test_ci_runs_the_readme_command():
    """CI and the README share one test command."""
    assert f"\n{TEST_COMMAND}\n" in (ROOT / "README.md").read_text()
    assert f"\n{TEST_COMMAND}\n" in (ROOT / ".ci/run").read_text()
