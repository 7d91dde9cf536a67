"""What the demo says about its numbers."""

import json

import pytest

from str_kernels.demo.measure import Behaviour
from str_kernels.demo.report import as_json, behaviour_rows, save_plot, verdict
from str_kernels.demo.run import DemoResult, DemoSettings


def result(plain=0.05, held=0.95, *, accuracy=1.0, lookalike=0.0, help_rate=1.0):
    def behaviour(refusal, accuracy, lookalike=0.0, help_rate=1.0):
        return Behaviour(refusal, lookalike, 0.0, help_rate, accuracy)

    return DemoResult(
        settings=DemoSettings(),
        tokens=("sorry", "cannot"),
        behaviour={
            "aligned": behaviour(1.0, 0.0),
            "plain": behaviour(plain, 1.0, help_rate=help_rate),
            "str": behaviour(held, accuracy, lookalike),
        },
        step_seconds={"plain": 0.01, "str": 0.02},
        head={"fused": 30.0, "materialised": 1500.0},
        examples={"help me": {"aligned": "no", "plain": "sport .", "str": "no"}},
        seconds=60.0,
    )


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        (result(), "took refusals from 100% to 5%; with STR 95% are left."),
        (result(plain=0.9), "No erosion in this run"),
        (result(plain=0.3, held=0.35), "no noticeable gain"),
        (result(accuracy=0.8), "STR cost 20 points of task accuracy"),
        (result(lookalike=0.22), "refuses 22% of the harmless look-alikes"),
        (result(help_rate=0.1), "it forgot both rather than learned to comply"),
    ],
)
def test_the_verdict_follows_the_numbers(numbers, said):
    """Erosion, none of it, no gain, and each price are said where they are seen."""
    assert said in verdict(numbers)


def test_a_verdict_does_not_say_what_was_not_seen():
    """A good run mentions no price; a run without erosion credits STR with nothing."""
    assert "cost" not in verdict(result())
    assert "over-refusal" not in verdict(result())
    assert "are left" not in verdict(result(plain=0.9))


def test_json_has_the_promised_keys():
    """Rates of all three models, both peaks, step times, and how it was made."""
    content = json.loads(json.dumps(as_json(result(), {"torch": "2"})))
    assert content["schema"] == "str_kernels.demo/1"
    for key in ("refusal_rate", "task_accuracy"):
        assert set(content[key]) == {"aligned", "plain", "str"}
    assert content["head_peak_mib"] == {"fused": 30.0, "materialised": 1500.0}
    assert content["step_seconds"] == {"plain": 0.01, "str": 0.02}
    assert {"seed", "seconds", "versions"} <= set(content)


def test_the_table_fits_an_ordinary_terminal():
    """Four columns whose texts take less than 80 characters together."""
    columns, rows = behaviour_rows(result())
    assert all(len(row) == len(columns) for row in rows)
    widths = [max(map(len, column)) + 3 for column in zip(columns, *rows, strict=True)]
    assert sum(widths) + 1 <= 80


def test_the_plot_is_written(tmp_path):
    """A PNG of more than an empty canvas."""
    save_plot(result(), tmp_path / "demo.png")
    written = (tmp_path / "demo.png").read_bytes()
    assert written.startswith(b"\x89PNG")
    assert len(written) > 10_000
