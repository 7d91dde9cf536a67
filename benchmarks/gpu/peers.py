"""Step 7: the head beside every peer, from few rows to many."""

from __future__ import annotations

from torch import Tensor

from benchmarks.gpu.run import Run, first_line
from str_kernels.bench.contenders import CONTENDERS, Contender
from str_kernels.bench.inputs import Case
from str_kernels.bench.measure import live_share, measure
from str_kernels.bench.truth import Truth, truth_of
from str_kernels.functional import linear_cross_entropy
from str_kernels.vocabulary import VocabularyIndex


def head(run: Run) -> None:
    """Add every contender at every shape; errors are measured at the most rows."""
    for shape in run.sizes.heads:
        for rows in run.sizes.rows:
            case, truth = run.case(rows, shape), None
            if rows == run.sizes.rows[0]:
                truth = truth_of(case)
                if run.todo("inputs", case):
                    run.add("inputs", case, **_inputs(case, truth))
            for contender in (*CONTENDERS.values(), _kept(run.kept_index(shape))):
                if run.todo(contender.name, case):
                    run.add(contender.name, case, **_measured(run, contender, case, truth))
                    run.settle()


def _kept(index: VocabularyIndex) -> Contender:
    """Return ours with W's rows kept in int8, which takes half of W's memory again."""

    def loss(case: Case, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        total, parts = linear_cross_entropy(
            hidden, weight, case.labels, index=index, return_parts=True
        )
        return total, parts.lse

    return Contender("ours-kept", "the index keeps W's rows in int8", loss)


def _inputs(case: Case, truth: Truth) -> dict:
    live, dead_mass = live_share(case, case.index)
    return {**truth.statistics(), "live": live, "dead_mass": dead_mass}


def _measured(run: Run, contender: Contender, case: Case, truth: Truth | None) -> dict:
    try:
        row = measure(contender, case, truth=truth, **run.clock())
    except Exception as error:  # ours too: the peers are measured all the same
        return {"reason": f"failed: {first_line(error)}"}
    return {key: value for key, value in row.items() if key not in case.facts}
