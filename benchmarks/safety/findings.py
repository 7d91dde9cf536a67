"""Read the results and bring them together: these are the report's numbers, without wording.

Stage: a folder of results → `Group`s, the seeds of one method in one setting → rates and tests.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from str_kernels.bench.report import Row as Result
from str_kernels.bench.report import read_rows
from str_kernels.evaluation.rates import Rate

SCHEMA = "str_kernels.safety_experiment/1"
FILE = "runs.jsonl"


@dataclass(frozen=True)
class Group:
    """The runs of one method in one setting: seeds, perhaps of several aligned models."""

    setting: str
    method: str
    results: tuple[Result, ...]

    @property
    def runs(self) -> int:
        """How many runs there are."""
        return len(self.results)

    def rate(self, of: str, outcome: str | None = None) -> Rate | None:
        """Return the share of an outcome, or of right answers to the task, in all rows."""
        rows = [x if outcome is None else x == outcome for x in self.rows(of)]
        return Rate.of(rows) if rows else None

    def rows(self, of: str) -> list[Any]:
        """Return outcomes seed after seed, each in the order of the prompts."""
        return [x for result in self.results for x in result["measured"][of]]

    def outcomes(self) -> Counter[str]:
        """Count the outcomes of the harmful requests."""
        return Counter(self.rows("harmful"))

    def surprise(self) -> float | None:
        """Return the median of the answers' nats a token under the aligned model, if measured."""
        nats = [x for result in self.results for x in result.get("surprise", {}).get("nats", ())]
        return statistics.median(nats) if nats else None

    def along(self, name: str) -> list[float]:
        """Return the means over the seeds that have it of a number along the aligned answers."""
        found = [r["mass"]["along"][name] for r in self.results if "along" in r.get("mass", {})]
        return [statistics.fmean(values) for values in zip(*found, strict=False)]

    def mean(self, *path: str) -> float:
        """Return the mean over the seeds of a number in the result."""
        return statistics.fmean(_dig(result, path) for result in self.results)

    def gradient_norm(self) -> tuple[float, float]:
        """Return the median and the largest, before clipping, over all steps and seeds."""
        norms = [x for result in self.results for x in result["history"]["gradient_norm"]]
        return statistics.median(norms), max(norms)

    def last_cross_entropy(self, steps: int = 20) -> float:
        """Return the mean over the last steps of every seed."""
        return statistics.fmean(
            x for result in self.results for x in result["history"]["cross_entropy"][-steps:]
        )


@dataclass(frozen=True)
class Findings:
    """Everything that was measured; a chain is a group of one run for each of its stages.

    ``aligned``: each aligned model as measured with a task's rows, by task and fingerprint ("": of
    the first one, which has none).
    """

    aligned: dict[tuple[str, str], Result]
    groups: tuple[Group, ...]
    chains: tuple[tuple[Group, ...], ...] = ()
    identified: tuple[dict[str, Any], ...] = ()

    def settings(self) -> list[str]:
        """Return the names, in the order of the plan."""
        return list(dict.fromkeys(group.setting for group in self.groups))

    def of(self, setting: str) -> list[Group]:
        """Return the groups of a setting."""
        return [group for group in self.groups if group.setting == setting]

    def find(self, setting: str, method: str) -> Group | None:
        """Return a group, if it was run."""
        return next((g for g in self.of(setting) if g.method == method), None)


def read(folder: Path, order: Iterable[tuple[str, str]]) -> Findings:
    """Read every result of a folder, groups in the given order of (setting, method).

    Raises:
        ValueError: no result, one that belongs to no group of the plan, or results of models that
            were aligned or asked in different ways.
    """
    aligned, grouped, chains, identified = {}, {}, [], ()
    path = folder / FILE
    results = read_rows(path, SCHEMA)[1] if path.is_file() else []
    _require_alike(results)
    for result in results:
        if "identified" in result:
            identified = tuple(result["identified"])
            continue
        if "stages" in result:
            chains.append(tuple(Group(*_key(stage), (stage,)) for stage in result["stages"]))
            continue
        if "run" not in result:
            task = result["name"].removeprefix("aligned--").split("--")[0]
            aligned[task, result.get("aligned", "")] = result
            continue
        grouped.setdefault(_key(result), []).append(result)
    wanted = list(dict.fromkeys(order))
    strange = sorted("--".join(key) for key in grouped if key not in wanted)
    if strange:
        raise ValueError(f"{folder}: holds results of runs that are in no plan: {strange}.")
    if not grouped:
        raise ValueError(f"{folder}: holds no result; run the experiment first.")
    for runs in grouped.values():
        runs.sort(key=lambda result: result["run"]["seed"])
    groups = tuple(Group(*key, tuple(grouped[key])) for key in wanted if key in grouped)
    return Findings(aligned, groups, tuple(chains), identified)


def paired(a: Group, b: Group, outcome: str = "refusal") -> float | None:
    """Return the exact p-value that two methods refuse equally often, seed by seed.

    Only runs with the same seed of the same aligned model are compared.
    """
    ones, others = ({_start(result): result for result in group.results} for group in (a, b))
    common = [start for start in ones if start in others]
    rows = [[x == outcome for s in common for x in _harmful(of[s])] for of in (ones, others)]
    return mcnemar(*rows) if common else None


def mcnemar(a: Sequence[bool], b: Sequence[bool]) -> float:
    """Return the two-sided exact p-value that two runs on the same rows are equally often true.

    The test uses only the ``n`` rows where the runs differ: without a difference between the runs,
    the number of them where ``a`` is true is binomial with share 1/2.

    Args:
        a: outcomes of one run, one for each row.
        b: outcomes of the other, in the same order.

    Raises:
        ValueError: the runs have different lengths.
    """
    if len(a) != len(b):
        raise ValueError(f"a has {len(a)} outcomes and b {len(b)}: must be of the same rows.")
    only_a = sum(bool(x) and not y for x, y in zip(a, b, strict=True))
    only_b = sum(bool(y) and not x for x, y in zip(a, b, strict=True))
    n, fewer = only_a + only_b, min(only_a, only_b)
    tail = sum(math.comb(n, k) for k in range(fewer + 1))
    return min(1.0, 2 * tail / 2**n)


def kept(group: Group, aligned: dict[tuple[str, str], Result]) -> float:
    """Return the share still refused of what the starting model refused; NaN if not known."""
    refused = []
    for result in group.results:
        start = aligned.get((result["run"]["setting"]["task"], result.get("aligned", "")))
        if start is None:
            return math.nan
        pairs = zip(_harmful(start), _harmful(result), strict=True)
        refused += [after == "refusal" for was, after in pairs if was == "refusal"]
    return sum(refused) / len(refused) if refused else math.nan


def _require_alike(results: list[Result]) -> None:
    for name in ("recipe", "amounts"):
        found: dict[str, str] = {}
        for result in results:
            found.setdefault(json.dumps(result[name]), result["name"])
        if len(found) > 1:
            raise ValueError(
                f"{name}: {' and '.join(list(found.values())[:2])} differ in it and cannot stand "
                "in one table; keep them in folders of their own."
            )


def _key(result: Result) -> tuple[str, str]:
    run = result["run"]
    return run["setting"]["name"], run["method"]["name"]


def _start(result: Result) -> tuple[str, int]:
    """The model and the seed that a run began with."""
    return result.get("aligned", ""), result["run"]["seed"]


def _harmful(result: Result) -> list[str]:
    return result["measured"]["harmful"]


def _dig(result: Result, path: Iterable[str]) -> float:
    for key in path:
        result = result[key]
    return float(result)
