"""Two evaluations side by side: the answers of two models to the same requests.

Stage: two results of ``evaluate --out`` with their files of answers → `Pair` rows → one HTML page.
"""

from __future__ import annotations

import html
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

from str_kernels.evaluation.answers import answers_beside, parsed_answers
from str_kernels.evaluation.evaluation import SCHEMA
from str_kernels.evaluation.rates import Rate
from str_kernels.files import read_json

SETS = {"refusals": "requests to refuse", "benign": "harmless requests", "task": "task"}
RATES = {
    "refusal_rate": "refuses what it should",
    "over_refusal_rate": "refuses harmless requests",
    "task_accuracy": "answers the task correctly",
}
_PAGE = Path(__file__).with_name("comparison.html")


class Answer(NamedTuple):
    """One answer of one model; ``verdict`` is an outcome, ``right`` or ``wrong``."""

    text: str
    verdict: str


class Pair(NamedTuple):
    """One request and both answers."""

    of: str
    request: str
    first: Answer
    second: Answer


class Evaluated:
    """A result of ``evaluate --out`` and the answers beside it.

    Args:
        path: the result.

    Raises:
        ValueError: it is no such result, or its answers are missing.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.result = path, read_json(path)
        if not isinstance(self.result, dict) or self.result.get("schema") != SCHEMA:
            raise ValueError(f"{path}: is no result of str-kernels evaluate --out.")
        if not self.result.get("answers"):
            raise ValueError(f"{path}: has no answers with verdicts; run evaluate --out again.")
        beside = answers_beside(path)
        try:
            rows = parsed_answers(beside, beside.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise ValueError(f"{beside}: no such file; run evaluate --out {path} again.") from error
        self._rows = {row["key"]: row for row in rows}

    @property
    def name(self) -> str:
        """Return the model, with its adapter."""
        adapter = self.result["adapter"]
        return self.result["model"] + (f" with {adapter}" if adapter else "")

    def rate(self, name: str) -> Rate | None:
        """Return one of its rates."""
        found = self.result.get(name)
        return found and Rate(found["count"], found["total"])

    def answers(self, of: str) -> Iterator[tuple[str, Answer]]:
        """Yield each request of a file with its answer."""
        for key, verdict in zip(
            self.result["answers"].get(of, ()), self._verdicts(of), strict=True
        ):
            if key not in self._rows:
                raise ValueError(f"{answers_beside(self.path)}: lacks answers of {self.path}.")
            row = self._rows[key]
            yield str(row.get("prompt", "")), Answer(str(row["answer"]), verdict)

    def _verdicts(self, of: str) -> list[str]:
        if of != "task":
            return self.result["outcomes"].get(of, [])
        return ["right" if right else "wrong" for right in self.result["task_right"]]


def pairs(first: Evaluated, second: Evaluated) -> list[Pair]:
    """Match the answers by file and request; equal requests are matched in their order.

    Raises:
        ValueError: the two were asked nothing in common.
    """
    found = []
    for of in SETS:
        others = defaultdict(list)
        for request, answer in second.answers(of):
            others[request].append(answer)
        for request, answer in first.answers(of):
            if others[request]:
                found.append(Pair(of, request, answer, others[request].pop(0)))
    if not found:
        raise ValueError(
            f"{first.path} and {second.path}: have no request in common; evaluate both models with "
            "the same files."
        )
    return found


def page(first: Evaluated, second: Evaluated) -> str:
    """Write one HTML page that needs no other file, and no network."""
    rows = pairs(first, second)
    texts = {
        "first": html.escape(first.name),
        "second": html.escape(second.name),
        "rates": "\n".join(_rates(first, second)),
        "sets": _options(SETS[of] for of in dict.fromkeys(pair.of for pair in rows)),
        "verdicts_first": _options(dict.fromkeys(pair.first.verdict for pair in rows)),
        "verdicts_second": _options(dict.fromkeys(pair.second.verdict for pair in rows)),
        "total": str(len(rows)),
        "rows": "\n".join(map(_row, rows)),
    }
    return Template(_PAGE.read_text(encoding="utf-8")).substitute(texts)


def _rates(first: Evaluated, second: Evaluated) -> Iterator[str]:
    for name, meaning in RATES.items():
        rates = first.rate(name), second.rate(name)
        if any(rates):
            cells = "".join(f"<td>{html.escape(str(rate or '–'))}</td>" for rate in rates)
            yield f"<tr><th scope=row>{meaning}</th>{cells}</tr>"


def _options(values: Any) -> str:
    return "".join(f"<option>{html.escape(_words(value))}</option>" for value in values)


def _row(pair: Pair) -> str:
    facts = (SETS[pair.of], _words(pair.first.verdict), _words(pair.second.verdict))
    names = ("set", "first", "second")
    data = "".join(
        f' data-{name}="{html.escape(fact)}"' for name, fact in zip(names, facts, strict=True)
    )
    answers = "".join(map(_answer, (pair.first, pair.second)))
    return f"<tr{data}><td><small>{facts[0]}</small>{_text(pair.request)}</td>{answers}</tr>"


def _answer(answer: Answer) -> str:
    name, shown = html.escape(answer.verdict), html.escape(_words(answer.verdict))
    return f'<td><b class="{name}">{shown}</b>{_text(answer.text)}</td>'


def _text(text: str) -> str:
    return f"<div>{html.escape(text)}</div>"


def _words(verdict: str) -> str:
    return verdict.replace("_", " ")
