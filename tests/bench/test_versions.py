"""The plan of versions covers every pair, and the docs show the rows that were saved."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks.versions import environment, table
from benchmarks.versions.plan import OLDEST, TOO_OLD, allowed, plan
from str_kernels.bench.report import write_rows

ROOT = Path(__file__).parents[2]
METADATA = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_every_pair_that_pip_installs_is_planned():
    """Pairwise, in far fewer environments than there are combinations."""
    planned = set().union(*(row.pairs() for row in plan()))
    possible = set().union(*(row.pairs() for row in allowed()))
    assert not possible - planned
    assert len(plan()) < len(list(allowed())) / 5


@pytest.mark.parametrize("name", ["python", "torch", "transformers", "peft", "trl"])
def test_the_plan_begins_where_the_metadata_do(name):
    """The oldest of each that is planned is the floor that the metadata promise."""
    rows = [row for row in plan() if row not in TOO_OLD]
    versions = [vars(row)[name] for row in rows if vars(row)[name] is not None]
    lowest = min(versions, key=lambda version: [int(part) for part in version.split(".")])
    floor = rf'"{name}>=([\d.]+)' if name != "python" else r'requires-python = ">=([\d.]+)"'
    assert set(re.findall(floor, METADATA)) == {lowest}


def test_docs_are_those_of_the_rows():
    """Nobody edits the table by hand."""
    assert table.DOCS.read_text(encoding="utf-8") == table.markdown()


def test_what_is_promised_has_passed():
    """Every environment in the file was installed and has no failure, or it is below the floors."""
    rows = [row for row in table.read() if environment.Versions(**row["asked"]) not in TOO_OLD]
    assert len(rows) >= 2
    assert [row for row in rows if row["why"] or row["failed"]] == []


def test_an_environment_that_cannot_be_made_says_why(tmp_path):
    """Nothing is tested, nothing is left, and the table has the reason."""
    row = environment.examine(replace(OLDEST, python="9.9"), tmp_path / "no.whl", tmp_path)
    assert row["installed"] is None
    assert row["why"] == "no python9.9 on PATH"
    assert list(tmp_path.iterdir()) == []


def test_a_failure_is_named_in_the_table(tmp_path, monkeypatch):
    """Counted, and its test named with the versions; an error of a fixture is one too."""
    cases = ElementTree.fromstring(
        "<testsuite><testcase classname='a' name='b'/>"
        "<testcase classname='a' name='c'><failure message='wrong'/></testcase>"
        "<testcase classname='a' name='d'><error>def f():\nE   broken</error></testcase>"
        "<testcase classname='a' name='e'><skipped message='no TRL'/></testcase></testsuite>"
    )
    found = {"passed": 0, "skipped": 0, "failed": 0, "failures": {}}
    for case in cases:
        environment._count(found, case)
    assert found == {
        **{"passed": 1, "skipped": 1, "failed": 2},
        "failures": {"a::c": "wrong", "a::d": "broken"},
    }
    installed = {"python": "3.10.1", "torch": "2.8.0", "transformers": "4.56.2"}
    row = {"asked": vars(OLDEST), "installed": installed, "why": "", **found}
    monkeypatch.setattr(table, "FILE", tmp_path / "rows.jsonl")
    write_rows(table.FILE, {"schema": table.SCHEMA}, [row])
    assert "| 3.10.1 | 2.8.0 | – | 4.56.2 | – | – | – | 1 | 1 | 2 |" in table.markdown()
    assert "`a::c`, `a::d`" in table.markdown()


def test_places_are_left_out():
    """Neither a folder of the machine nor the host of an index gets into the rows."""
    text = "in file '/opt/x/lib/typing.py', from https://index.example/simple/p.whl; a/b 1/2"
    found = environment._placeless(text)
    assert found == "in file '…/typing.py', from …/p.whl; a/b 1/2"
    rows = (ROOT / "benchmarks/results/versions/versions.jsonl").read_text(encoding="utf-8")
    assert not re.search(r"[\s'](/\w+){2}|://", rows)
