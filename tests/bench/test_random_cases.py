"""Random cases agree with fp64, and the instrument finds faults that are planted."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from benchmarks.random_cases import __main__ as command
from benchmarks.random_cases import check as checking
from benchmarks.random_cases.check import check
from benchmarks.random_cases.draw import OPTIONS, draw, draw_options
from str_kernels.constraint import constraint_terms
from str_kernels.engine import finish, penalty

# what `python -m benchmarks.random_cases` does at length
SEEDS = [seed for seed in range(70) if draw_options(seed)["backend"] != "triton"]


def found() -> bool:
    """Whether a case fails; the others are not run then."""
    return any(check(seed)["failed"] for seed in SEEDS)


def test_cases_agree_with_fp64():
    """The first ones of the torch and the dense backend."""
    rows = [check(seed) for seed in SEEDS]
    assert [row for row in rows if row["failed"]] == []


def test_a_case_follows_from_its_seed():
    one, other = draw(7), draw(7)
    assert one.options == other.options
    assert all(torch.equal(one.leaves[name], x) for name, x in other.leaves.items())


def test_every_value_of_every_option_is_drawn():
    """None of them is ruled out by the others."""
    drawn = [draw_options(seed) for seed in range(3000)]
    for name, values in OPTIONS.items():
        found = {repr(options[name]) for options in drawn}
        assert found >= {repr(value) for value in values}, name


def _of_finish(factor: float, name: str):
    real = finish._log_sums

    def wrong(*given):
        sums = real(*given)
        return sums._replace(**{name: getattr(sums, name) * factor})

    return wrong


@pytest.mark.parametrize("factor", [1 + 1e-4, 1 - 1e-4])
@pytest.mark.parametrize("name", ["surprise", "log_sum"])
def test_a_loss_or_gradient_off_by_a_thousandth_of_a_tenth_is_found(monkeypatch, name, factor):
    monkeypatch.setattr(finish, "_log_sums", _of_finish(factor, name))
    assert found()


def test_a_constraint_that_is_off_is_found(monkeypatch):
    def wrong(safety, values, reference):
        terms = constraint_terms(safety, values, reference)
        return terms._replace(value=terms.value * (1 + 1e-4))

    monkeypatch.setattr(penalty, "constraint_terms", wrong)
    assert found()


def test_an_exception_is_a_failure(monkeypatch):
    def broken(**given):
        raise RuntimeError("broken")

    monkeypatch.setattr(checking, "linear_cross_entropy", lambda *given, **more: broken())
    row = check(0)
    assert row["failed"]
    assert row["exception"] == "RuntimeError: broken"


def test_a_run_goes_on_and_is_summed_up(monkeypatch, tmp_path):
    """A line that was cut short is run again; each value of each option has its line."""
    cases = tmp_path / "cases.jsonl"
    command._run_part(cases, SEEDS[:4])
    whole = cases.read_bytes()
    cases.write_bytes(whole[:-20] + b"\n")
    calls = []
    monkeypatch.setattr(command, "check", lambda seed: calls.append(seed) or check(seed))
    command._run_part(cases, SEEDS[:5])
    assert calls == SEEDS[3:5]
    rows = command.read(cases)
    assert sorted(row["seed"] for row in rows) == SEEDS[:5]
    rows[0] |= {"failed": True, "shares": {"loss": 7.0}}
    lines = command.summary(rows)
    assert lines[0] | {"worst_errors": None} == {
        "option": "all",
        "value": None,
        "cases": 5,
        "failures": 1,
        "worst_errors": None,
        "worst_shares": lines[0]["worst_shares"],
    }
    assert lines[0]["worst_shares"]["loss"] == [7.0, rows[0]["seed"]]
    of_dtype = [line for line in lines if line.get("option") == "dtype"]
    assert sum(line["cases"] for line in of_dtype) == 5
    assert lines[-1]["failure"] == rows[0]["seed"]


def test_the_command(monkeypatch, capsys):
    """``--only`` prints what was drawn and what came of it."""
    monkeypatch.setattr(sys, "argv", ["random_cases", "--only", "0"])
    monkeypatch.setattr(command, "quiet_libraries", lambda: None)
    with pytest.raises(SystemExit) as exit_:
        command.main()
    assert exit_.value.code == 0
    assert json.loads(capsys.readouterr().out)["options"] == draw_options(0)


def test_parts_share_all_seeds():
    parts = [command.seeds_of(part, range(200)) for part in ("0/2", "1/2", "triton")]
    assert sorted(seed for part in parts for seed in part) == list(range(200))
    assert {draw_options(seed)["backend"] for seed in parts[2]} == {"triton"}
