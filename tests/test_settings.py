"""A setting of the constraint is declared once: everything that a user configures has it."""

import re
from dataclasses import fields

import pytest

from str_kernels.integrations.axolotl_args import StrKernelsArgs
from str_kernels.integrations.settings import PatchSettings
from str_kernels.options import SafetyConstraint
from str_kernels.settings import CONSTRAINT_NAMES, ConstraintSettings, Faults
from str_kernels.training.settings import TrainSettings
from tests.cli.calling import call

OTHER = {
    "strength": 0.25,
    "kind": "kl",
    "temperature": 2.0,
    "positions": "labels",
    "reference": "references.safetensors",
    "share": 0.25,
}


@pytest.mark.parametrize("name", CONSTRAINT_NAMES)
def test_every_field_is_in_every_home(name, capsys):
    """The run's settings, the command's options, a configuration file, and Axolotl's schema."""
    value = OTHER[name]
    assert TrainSettings("m", "d", "o", **{name: value}).as_dict()[name] == value
    assert getattr(PatchSettings.from_config({"tokens": "t", name: value}), name) == value
    assert StrKernelsArgs(str_kernels={"tokens": "t", name: value}).str_kernels[name] == value
    assert f"--{name} " in call(capsys, "train", "--help").out


def test_every_setting_of_a_run_is_an_option_with_its_help(capsys):
    """The option's text is the field's, to the letter."""
    shown = re.sub(r"[\s│]+", "", call(capsys, "train", "--help").out)
    for field in fields(TrainSettings):
        if "help" in field.metadata:
            assert re.sub(r"\s+", "", field.metadata["help"]) in shown


def test_every_field_reaches_the_constraint_or_the_patch():
    """None is dropped on the way."""
    settings = ConstraintSettings(**OTHER)
    safety = settings.constraint((3, 5))
    here = {n: getattr(safety, n) for n in CONSTRAINT_NAMES if hasattr(safety, n)}
    assert here | settings.of_the_patch == OTHER
    assert safety == SafetyConstraint((3, 5), 0.25, "kl", temperature=2.0)


def test_the_constraint_s_own_rules_are_the_rules():
    """All that is wrong is reported together, in the words of ``SafetyConstraint``."""
    with pytest.raises(Faults) as caught:
        ConstraintSettings(strength=-1.0, kind="mae", temperature=0.0, positions=0, share=2.0)
    assert len(caught.value.faults) == 5
    with pytest.raises(Faults, match=r"temperature=2\.0: only kind='kl'"):
        ConstraintSettings(kind="mse", temperature=2.0)
    with pytest.raises(Faults, match=r"kind='floor' was removed in 0\.2"):
        ConstraintSettings(kind="floor")


def test_numbers_may_be_text():
    """As a command line gives them."""
    settings = ConstraintSettings(strength="0.25", positions="3")
    assert (settings.strength, settings.positions) == (0.25, 3)
