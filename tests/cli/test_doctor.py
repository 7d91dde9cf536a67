"""doctor: what would run here, and whether it computes the right thing."""

import json
import shutil

import pytest
import torch

from str_kernels import version as version_module
from str_kernels.cli import self_check as checking
from tests.cli.calling import call
from tests.cpus import set_cpu


def test_doctor_reports_and_passes(capsys):
    """Versions, devices, choices with their reasons, and a self-check that passed."""
    called = call(capsys, "doctor", "--json")
    assert called.code == 0, called.err
    found = json.loads(called.out)
    assert found["schema"] == "str_kernels.doctor/1"
    assert found["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert "cpu" in found["devices"]
    assert {choice["dtype"] for choice in found["choices"]} == {"float32", "bfloat16"}
    assert all(choice["backend_reason"] and choice["screen_reason"] for choice in found["choices"])
    exact, filtered = (check for check in found["checks"] if check["device"] == "cpu")
    assert exact["passed"]
    assert filtered["passed"]
    assert set(exact["relative_errors"]) == {"loss", "hidden_states", "weight"}


@pytest.mark.parametrize("has", [True, False])
def test_doctor_says_how_bf16_is_multiplied(capsys, monkeypatch, has):
    """A CPU without bf16 instructions multiplies bf16 operands in fp32: said, in both forms."""
    set_cpu(monkeypatch, bf16=has)
    found = json.loads(call(capsys, "doctor", "--json").out)
    products = {c["dtype"]: c["products"] for c in found["choices"] if c["device"] == "cpu"}
    assert products == {"float32": "float32", "bfloat16": "bfloat16" if has else "float32"}


@pytest.mark.parametrize("works", [True, False])
def test_doctor_says_whether_loops_are_compiled(capsys, monkeypatch, works):
    """Where there is no compiler the same numbers come from torch calls: said."""
    loop = (lambda *args: None) if works else None
    monkeypatch.setattr("str_kernels.backends.torch.reduce.compiled", lambda *args: loop)
    found = json.loads(call(capsys, "doctor", "--json").out)
    assert found["devices"]["cpu"].endswith("loops compiled" if works else "loops as torch calls")


def test_doctor_shows_tables(capsys):
    """For people: the errors are printed, and the next command named."""
    called = call(capsys, "doctor")
    assert called.code == 0
    assert "self-check against the oracle" in called.out
    assert "passed" in called.out
    assert "next: str-kernels " in called.err


@pytest.mark.parametrize("fault", ["loss", "gradient", "nan"])
def test_a_wrong_result_fails(capsys, monkeypatch, fault):
    """A loss or gradient off by 2 %, or not a number, is found: exit code 1, and it is said."""
    real = checking.linear_cross_entropy

    def wrong(hidden_states, weight, labels, **options):
        loss = real(hidden_states, weight, labels, **options)
        if options.get("backend") == "dense":
            return loss
        if fault == "loss":
            return loss + 0.02 * loss.detach()
        if fault == "gradient":
            return loss + 0.02 * (loss - loss.detach())
        return loss * float("nan")

    monkeypatch.setattr(checking, "linear_cross_entropy", wrong)
    called = call(capsys, "doctor")
    assert called.code == 1
    assert "FAILED" in called.out
    assert "disagrees with the oracle" in called.err


def test_what_is_missing_is_named_and_harmless(capsys, monkeypatch):
    """Without triton and without a C compiler doctor says so, and still succeeds."""
    real = version_module.version

    def version(name):
        if name == "triton":
            raise version_module.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(version_module, "version", version)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    called = call(capsys, "doctor")
    assert called.code == 0
    assert "missing: triton" in called.err
    assert "missing: a C compiler" in called.err
    assert "not installed" in called.out
