import math
from dataclasses import replace

import pytest

from benchmarks.safety.findings import FILE, SCHEMA, kept, mcnemar, paired, read
from benchmarks.safety.methods import (
    CHAINS,
    FLOOR,
    HARSH,
    HARSHEST,
    MIXED,
    MSE,
    PAST,
    PLAIN,
    Plan,
    Run,
    plan_order,
)
from benchmarks.safety.report import write
from str_kernels.bench.report import read_rows, write_rows

ORDER = plan_order()
MADE = {
    "recipe": {"epochs": 2.0, "learning_rate": 1e-4},
    "amounts": {"harmful": 10, "benign": 10, "task": 10, "neutral": 5, "new_tokens": 24},
}
ALIGNED = ["refusal"] * 9 + ["compliance"]


def measured(harmful, right=8):
    return {
        "harmful": harmful,
        "benign": ["compliance"] * 9 + ["refusal"],
        "task": [1] * right + [0] * (10 - right),
        "neutral": 2.5,
    }


def rows_of(folder):
    path = folder / FILE
    return {row["name"]: row for row in (read_rows(path, SCHEMA)[1] if path.exists() else ())}


def write_all(folder, rows):
    write_rows(folder / FILE, {"schema": SCHEMA}, rows.values())


def put(folder, name, row):
    """Write a row, in place of the one of this name."""
    write_all(folder, rows_of(folder) | {name: {"name": name, **row}})


def save(folder, run, harmful, right=8):
    put(folder, run.name, result_of(run, harmful, right))


def result_of(run, harmful, right=8):
    history = {
        name: [1.0, 0.5, 0.25]
        for name in ("cross_entropy", "penalty", "gradient_norm", "seconds", "drift")
    }
    return {
        "run": run.as_dict(),
        "measured": measured(harmful, right),
        "history": history,
        "step_seconds": 2.0,
        "training_peak_mib": 1000,
        **MADE,
        "torch": "2",
    }


@pytest.fixture
def results(tmp_path):
    aligned = {"measured": measured(ALIGNED), "base": {"model": "tiny", "parameters": 3e6}, **MADE}
    put(tmp_path, "aligned--sst2", aligned)
    for seed in range(2):
        save(tmp_path, Run(PLAIN, HARSH, seed), ["refusal"] * 2 + ["compliance"] * 8)
        save(tmp_path, Run(MSE, HARSH, seed), ["refusal"] * 8 + ["partial", "refusal"], right=9)
    return tmp_path


def appendix_of(folder):
    write(folder)
    return (folder / "APPENDIX.md").read_text()


def test_seeds_are_brought_together(results):
    findings = read(results, ORDER)
    mse = findings.find("sst2-harsh", "mse")
    assert [g.method for g in findings.of("sst2-harsh")] == ["plain", "mse"]
    assert (mse.runs, str(mse.rate("harmful", "refusal"))[:18]) == (2, "90.0 % (18 of 20; ")
    assert (mse.rate("task").count, mse.rate("benign", "refusal").count) == (18, 2)
    # 9 of the aligned model's 10 are refusals; of them 8 are kept, and the tenth does not count
    assert kept(mse, findings.aligned) == pytest.approx(8 / 9)
    assert mse.gradient_norm() == (0.5, 1.0)


def test_each_run_is_held_against_the_model_it_started_from(results):
    """A second alignment refuses other prompts: its runs are counted by those, and named."""
    other = {"measured": measured(["refusal"] * 5 + ["compliance"] * 5), "aligned": "ab12", **MADE}
    put(results, "aligned--sst2--ab12", other)
    name = Run(MSE, HARSH, 1).name
    put(results, name, rows_of(results)[name] | {"aligned": "ab12"})
    mse = read(results, ORDER).find("sst2-harsh", "mse")
    # seed 0: 8 of the first model's 9; seed 1: all 5 of the second's 5
    assert kept(mse, read(results, ORDER).aligned) == pytest.approx(13 / 14)
    text = appendix_of(results)
    assert "- `ab12`: sst2-harsh mse 1." in text
    assert "| ab12 | sst2 | 50.0 %" in text


def test_how_unlikely_answers_are_is_told_where_it_was_measured(results):
    """The median over the answers of all seeds that have it; no column where none has."""
    assert "nats a token" not in appendix_of(results)
    name = Run(MSE, HARSH, 1).name
    found = {"surprise": {"nats": [1.0, 2.5, 9.0], "median": 2.5}}
    put(results, name, rows_of(results)[name] | found)
    lines = appendix_of(results).splitlines()
    told = next(i for i, line in enumerate(lines) if "nats a token" in line)
    assert [line.split("|")[-2].strip() for line in lines[told + 2 : told + 4]] == ["", "2.50"]


def test_the_mass_along_a_refusal_is_told_where_it_was_measured(results):
    """The aligned model's first, then each method's, means of the seeds that have it."""
    assert "token 1" not in appendix_of(results)
    for seed, mass in ((0, [0.9, 0.5]), (1, [0.7, 0.3])):
        name = Run(MSE, HARSH, seed).name
        along = {"along": {"mass": mass, "aligned_mass": [1.0, 0.75]}}
        put(results, name, rows_of(results)[name] | {"mass": along})
    text = appendix_of(results)
    assert "| method | token 1 | token 2 |" in text
    assert "| aligned | 1.000 | 0.750 |\n| mse | 0.800 | 0.400 |" in text


def test_a_run_whose_start_was_not_measured_keeps_nothing_known(results):
    write_all(results, {n: row for n, row in rows_of(results).items() if "aligned" not in n})
    findings = read(results, ORDER)
    assert math.isnan(kept(findings.find("sst2-harsh", "mse"), findings.aligned))


def test_methods_are_compared_on_the_seeds_that_both_have(results):
    save(results, Run(MSE, HARSH, 2), ["compliance"] * 10)
    findings = read(results, ORDER)
    plain, mse = (findings.find("sst2-harsh", name) for name in ("plain", "mse"))
    assert paired(mse, plain) == pytest.approx(2 / 2**14)  # 7 rows a seed, all one way
    assert paired(plain, plain) == 1.0
    # another aligned model's run of seed 0 has no counterpart, and changes nothing
    other = Run(MSE, HARSH, 0)
    put(results, f"{other.name}--ab12", result_of(other, ALIGNED) | {"aligned": "ab12"})
    both = read(results, ORDER).find("sst2-harsh", "mse")
    assert (both.runs, paired(both, plain)) == (4, pytest.approx(2 / 2**14))


def test_strange_and_missing_results_are_refused(results, tmp_path):
    save(results, Run(replace(MSE, name="unheard-of"), HARSH, 0), ALIGNED)
    with pytest.raises(ValueError, match=r"in no plan: .*unheard-of"):
        read(results, ORDER)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no result"):
        read(tmp_path / "empty", ORDER)


def test_models_that_were_asked_differently_are_not_mixed(results):
    name = Run(MSE, HARSH, 1).name
    result = rows_of(results)[name]
    result["amounts"]["new_tokens"] = 64
    put(results, name, result)
    with pytest.raises(ValueError, match=r"amounts: aligned--sst2 and .*mse--seed1 differ"):
        read(results, ORDER)


def test_report_states_what_the_results_say(results):
    """A page of the main comparison, and an appendix with every table and picture."""
    save(results, Run(MIXED, HARSHEST, 0), ALIGNED)
    page = write(results).read_text()
    assert "5 runs of tiny, 3 M parameters." in page
    assert "| sst2-harsh | plain | 2 | 20.0 % (8 to 42) | 20, 20 |" in page
    assert "| sst2-harsh | mse |  | 2 | 90.0 % (70 to 97) | 90, 90 |" in page
    assert "| sst2-harshest | safeinstr | refused requests to learn | 1 |" in page
    assert (results / "balance.png").stat().st_size > 1000
    text = (results / "APPENDIX.md").read_text()
    assert "| plain | 2 | 20.0 % (8 to 42) | 20, 20 | 22.2 % |" in text
    assert "| mse | 2 | 90.0 % (70 to 97) | 90, 90 | 88.9 % |" in text
    assert "Plain fine-tuning leaves 20.0 % refused" in text
    assert "`mse` keeps most, 90.0 %, at +10.0 points of task accuracy and +0.0" in text
    assert "| method | refusal | partial | compliance |" in text
    for picture in ("pareto", "curves"):
        assert (results / f"sst2-harsh-{picture}.png").stat().st_size > 1000


def test_what_people_concluded_is_in_the_report(results):
    (results / "conclusions.md").write_text("## What we take from it\n\nHold every position.\n")
    (results / "notes.md").write_text("## Notes\n\nSeeds differ.\n")
    text = write(results).read_text()
    assert text.index("Hold every position.") < text.index("## Limits")
    text = (results / "APPENDIX.md").read_text()
    assert text.index("Seeds differ.") < text.index("## The aligned model")


def test_fine_tunings_in_a_row_are_told_stage_by_stage(results):
    chain = CHAINS[1]
    asked = (["refusal"] * 10, ["refusal"] * 7 + ["partial"] * 3, ["compliance"] * 10)
    stages = [result_of(run, rows) for run, rows in zip(chain.runs, asked, strict=True)]
    put(results, chain.name, {"stages": stages, **MADE})
    text = appendix_of(results)
    assert "| mse | 1. sst2-harsh | 100.0 % (72 to 100) |" in text
    assert "| mse | 2. agnews-harsh | 70.0 % (40 to 89) |" in text
    assert "| mse | 3. instructions-harsh | 0.0 % (0 to 28) |" in text


def test_found_tokens_are_shown(results):
    found = {
        "top_k": 4,
        "tokens": [" sorry", " cannot"],
        "scores": [0.5, 0.25],
        "score_share": 0.5,
        "overlap": {"templates": 0.75, "requests": 1.0},
        "in_templates": 0.25,
    }
    put(results, "tokens", {"identified": [found], **MADE})
    text = appendix_of(results)
    assert "| 4 | 75 % | 100 % | 25 % | 50 % |" in text
    assert "The first of them: ' sorry', ' cannot'." in text


def test_past_methods_are_reported_but_not_run(results):
    save(results, Run(replace(MSE, name=FLOOR.name), HARSH, 0), ["compliance"] * 10)
    assert "| floor | 1 | 0.0 % (0 to 28) |" in appendix_of(results)
    assert not {run.method for run in Plan().runs} & set(PAST)


def test_seeds_stand_in_their_order_whatever_was_done_first(results):
    write_all(results, dict(reversed(rows_of(results).items())))
    found = read(results, ORDER).find("sst2-harsh", "mse").results
    assert [result["run"]["seed"] for result in found] == [0, 1]


@pytest.mark.parametrize(
    ("only_a", "only_b", "p"),
    [
        (0, 0, 1.0),  # nothing differs
        (1, 1, 1.0),
        (3, 3, 1.0),  # twice the tail is more than 1
        (5, 0, 2 / 32),
        (6, 0, 2 / 64),
        (1, 9, 2 * (1 + 10) / 1024),
        (2, 8, 2 * (1 + 10 + 45) / 1024),
    ],
)
def test_mcnemar_by_hand(only_a, only_b, p):
    """Twice the binomial tail of the rows that differ; those that agree change nothing."""
    a = [True] * only_a + [False] * only_b + [True, False] * 20
    b = [False] * only_a + [True] * only_b + [True, False] * 20
    assert mcnemar(a, b) == mcnemar(b, a) == pytest.approx(p, rel=1e-12)


def test_mcnemar_wants_pairs():
    """Runs on different rows cannot be compared."""
    with pytest.raises(ValueError, match="a has 2 outcomes and b 1"):
        mcnemar([True, False], [True])
