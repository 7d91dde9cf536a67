"""Step 7: the head beside every peer, from few rows to many."""

from __future__ import annotations

from benchmarks.gpu.run import Run, first_line
from str_kernels.bench.contenders import CONTENDERS, Contender
from str_kernels.bench.inputs import Case
from str_kernels.bench.measure import live_share, measure
from str_kernels.bench.truth import Truth, truth_of


def head(run: Run) -> None:
    """Add every contender at every shape; errors are measured at the most rows."""
    for shape in run.sizes.heads:
        for rows in run.sizes.rows:
            case, truth = run.case(rows, shape), None
            if rows == run.sizes.rows[0]:
                truth = truth_of(case)
                if run.todo("inputs", case):
                    run.add("inputs", case, **_inputs(case, truth))
            for contender in CONTENDERS.values():
                if run.todo(contender.name, case):
                    run.add(contender.name, case, **_measured(run, contender, case, truth))
                    run.settle()


def _inputs(case: Case, truth: Truth) -> dict:
    live, dead_mass = live_share(case, case.index)
    return {**truth.statistics(), "live": live, "dead_mass": dead_mass}


def _measured(run: Run, contender: Contender, case: Case, truth: Truth | None) -> dict:
    try:
        row = measure(contender, case, truth=truth, **run.clock())
    except Exception as error:  # ours too: the peers are measured all the same
        return {"reason": f"failed: {first_line(error)}"}
    return {key: value for key, value in row.items() if key not in case.facts}
