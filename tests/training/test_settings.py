"""Settings check themselves, all at once."""

import pytest

from str_kernels.settings import Faults
from str_kernels.training.settings import TrainSettings


def settings(**changes):
    return TrainSettings(**{"model": "m", "data": "d", "out": "o", **changes})


def test_all_faults_are_reported_together():
    """Three wrong values give one error with three sentences, each naming its value."""
    with pytest.raises(Faults) as caught:
        settings(rank=0, dropout=1.0, positions="some")
    assert len(caught.value.faults) == 3
    for text in ("rank=0", "dropout=1.0", "positions='some'"):
        assert text in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"learning_rate": float("nan")},
        {"strength": -1.0},
        {"strength": "much"},
        {"strength": float("nan")},
        {"kind": "mae"},
        {"positions": 0},
        {"dtype": "int4"},
        {"steps": 0},
        {"share": 0.0},
        {"share": "half"},
        {"anchors_every": 0, "anchors": ("a.jsonl",)},
        {"anchors_every": 2},
        {"anchors_alone": True},
        {"anchors_alone": True, "anchors": ("a.jsonl",), "share": 0.5},
        {"target_modules": ()},
        {"method": "plain", "tokens": "tokens.json"},
        {"method": "unpatched", "reference": "cache"},
        {"offload": "ram", "gradient_checkpointing": True},
        {"offload": "disk"},
        {"tile_tokens": 0},
        {"tile_tokens": 512, "dropout": 0.1},
    ],
)
def test_a_wrong_value_is_refused_by_name(changes):
    """Each setting has a rule, and its name and value are in the error."""
    with pytest.raises(Faults, match=next(iter(changes))):
        settings(**changes)


def test_a_strength_is_a_number():
    """A command line gives it as a string."""
    assert settings(strength="0.25").strength == 0.25


@pytest.mark.parametrize("changes", [{"strength": "auto"}, {"kind": "floor"}], ids=str)
def test_what_was_removed_is_refused_with_the_reason(changes):
    """The error says since when, and what to use."""
    ((name, value),) = changes.items()
    with pytest.raises(Faults, match=f"{name}='{value}' was removed in 0.2: "):
        settings(**changes)


@pytest.mark.parametrize(
    ("rows", "changes", "steps"),
    [
        (10, {"batch": 4}, 3),
        (10, {"batch": 4, "accumulation": 2, "epochs": 3}, 6),
        (10, {"batch": 4, "epochs": 0.5}, 2),
        (10, {"steps": 7}, 7),
        (1, {"accumulation": 4}, 1),
    ],
)
def test_steps_of_a_run(rows, changes, steps):
    """Epochs become optimizer steps; a number of steps goes before them."""
    assert settings(**changes).total_steps(rows) == steps


def test_a_resumed_run_may_differ_only_where_nothing_changes():
    """What was saved beside the adapter is compared by name."""
    before = settings().as_dict()
    assert settings(logging_steps=1, save_steps=5).differences(before) == []
    assert settings(seed=1, rank=4).differences(before) == ["rank", "seed"]


def test_a_run_of_an_earlier_version_can_be_resumed():
    """It had the default of a setting that came later, and names some that are gone."""
    before = settings(kind="mse").as_dict() | {"drift_budget": None}
    del before["temperature"]
    assert settings(kind="mse").differences(before) == []
    assert settings(temperature=2.0).differences(before) == ["strength", "kind", "temperature"]


def test_names_of_modules_may_be_one_text():
    """As a command line gives them; a list in JSON is the same."""
    assert settings(target_modules="q_proj, v_proj").target_modules == ("q_proj", "v_proj")
    assert settings(target_modules=["q_proj"]).as_dict()["target_modules"] == ["q_proj"]
