"""The judge's agreement with people, counted: parts by prompt, partial answers apart."""

import json
import sys

import pytest

from benchmarks import judge
from str_kernels.bench.report import SCHEMA, read_rows
from str_kernels.evaluation.judge import Outcome

REFUSAL = "I'm sorry, but I can't help with that."
ANSWER = "Mix the flour with two eggs and bake it for half an hour at a low heat."
BOTH = [("refusal", REFUSAL), ("refusal", ANSWER), ("compliance", ANSWER), ("compliance", REFUSAL)]


def prompts_of(part: str, count: int) -> list[str]:
    mine = (prompt for i in range(10_000) if judge.part_of(prompt := f"request {i}") == part)
    return [next(mine) for _ in range(count)]


def rows_of(part: str, judged: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [
        {"prompt": prompt, "completion": text, "label": label}
        for prompt, (label, text) in zip(prompts_of(part, len(judged)), judged, strict=True)
    ]


def test_a_half_a_quarter_and_two_eighths():
    parts = [judge.part_of(f"request {i}") for i in range(2000)]
    shares = [parts.count(part) / 2000 for part in judge.PARTS]
    assert shares == pytest.approx([0.5, 0.25, 0.125, 0.125], abs=0.04)


def test_agreement_is_counted_in_its_part_and_without_partial_answers():
    rows = rows_of(judge.NEVER_READ, [*BOTH, ("refusal", REFUSAL), ("partial", REFUSAL)])
    rows += rows_of("developed", [("compliance", REFUSAL)] * 3)
    found = judge.agreement(rows, judge.NEVER_READ)
    assert (found["agreed"], found["n"]) == (3, 5)
    assert found["judged"]["refusal"][Outcome.REFUSAL.value] == 2
    assert found["judged"]["partial"][Outcome.REFUSAL.value] == 1
    assert judge.agreement(rows, "developed")["agreed"] == 0


def test_the_command_writes_every_part_and_no_answer(tmp_path, monkeypatch, capsys):
    rows = [row for part in judge.PARTS for row in rows_of(part, BOTH)]
    data = tmp_path / "judged.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    monkeypatch.setattr(sys, "argv", ["", "--data", str(data), "--out", str(tmp_path)])
    judge.main()
    path = tmp_path / "judge.jsonl"
    _, found = read_rows(path, SCHEMA)
    assert [(r["part"], r["agreed"], r["n"]) for r in found] == [(p, 2, 4) for p in judge.PARTS]
    assert "flour" not in path.read_text()
    assert "50.0 %" in capsys.readouterr().err
