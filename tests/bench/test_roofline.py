"""Predictions from counted work: hand-made stages whose times are known."""

import pytest

from benchmarks.roofline import CHIPS, least_rate, predict

GEMM = 2 * 1000 * 1000 * 1000


def _counted(screen, *stages):
    names = ("stage", "unit", "operations", "loaded", "stored", "added", "memory")
    return {
        "case": "made up",
        "dtype": "bfloat16",
        "rows": 1000,
        "head": "frozen",
        "screen": screen,
        "shape": [1000, 1000, 1000, 2],
        "stages": [dict(zip(names, stage, strict=True)) for stage in stages],
    }


def test_a_stage_takes_the_longer_of_its_operations_and_its_bytes():
    """One bound by operations, one by memory, one by memory only once its atomics spill."""
    chip = CHIPS["A100"]
    found = predict(
        _counted(
            "exact",
            ("screen", "operands", 10 * GEMM, 8, 0, 0, 1),
            ("route", "fp32", 0, 0, 0, 0, 10**9),
            ("refine", "operands", GEMM, 0, 0, 10**9, 1),
        ),
        "A100",
    )
    bound = 11 * GEMM / chip.half / 1e9 + 1 / chip.memory
    assert found["ms"] == pytest.approx(bound)
    spilled = bound - GEMM / chip.half / 1e9 + 2 / chip.memory
    assert found["ms_spilled"] == pytest.approx(spilled, rel=1e-6)
    assert found["product_ms"] == pytest.approx(GEMM / chip.half / 1e9)


def test_eight_bits_pay_only_above_what_else_they_cost():
    """A screen with work of its own beside it pays from a rate above the 16-bit one."""
    exact = predict(_counted("exact", ("screen", "operands", GEMM, 0, 0, 0, 1)), "H100")
    stages = [("screen", "8 bits", GEMM, 0, 0, 0, 1), ("refine", "operands", GEMM // 2, 0, 0, 0, 1)]
    eight = predict(_counted("int8", *stages), "H100")
    assert least_rate(exact, eight) == pytest.approx(2.0)
    assert eight["ms"] == pytest.approx(exact["ms"], rel=1e-3)  # H100's int8 is twice as fast


def test_a_chip_without_the_instruction_has_no_prediction():
    """A100 has no fp8; its int8 screen is predicted."""
    screen = ("screen", "8 bits", GEMM, 0, 0, 0, 1)
    assert predict(_counted("fp8", screen), "A100") is None
    assert predict(_counted("int8", screen), "A100")["ms"] > 0
