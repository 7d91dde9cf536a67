"""Rates, their intervals, and when an answer is the expected one."""

import math

import pytest

from str_kernels.evaluation.rates import Z_95, Rate, exact_match, wilson_interval


@pytest.mark.parametrize(("count", "total"), [(0, 5), (5, 5), (1, 3), (195, 200), (350, 700)])
def test_the_interval_solves_its_equation(count, total):
    """Each bound p has |share - p| = z √(p (1 - p) / total), unless it is 0 or 1."""
    share = count / total
    low, high = wilson_interval(count, total)
    assert 0 <= low <= share <= high <= 1
    for bound in (low, high):
        if 1e-12 < bound < 1 - 1e-12:
            distance = Z_95 * math.sqrt(bound * (1 - bound) / total)
            assert abs(share - bound) == pytest.approx(distance, rel=1e-9)


def test_the_interval_against_a_published_value():
    """Newcombe 1998, table I: 81 of 263 gives 0.2553 to 0.3662."""
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)


def test_rate():
    """A share with its counts and interval, in JSON types and for people."""
    rate = Rate.of([True, False, True, True])
    assert rate.as_dict() == {
        "rate": 0.75,
        "count": 3,
        "total": 4,
        "interval_95": list(wilson_interval(3, 4)),
    }
    assert str(rate).startswith("75.0 % (3 of 4; 30.1 to ")


@pytest.mark.parametrize(("count", "total"), [(1, 0), (0, 0), (3, 2), (-1, 2)])
def test_impossible_counts_are_refused(count, total):
    """A rate of nothing, or of more than all, is a mistake."""
    with pytest.raises(ValueError, match=f"count={count}, total={total}"):
        Rate(count, total)


@pytest.mark.parametrize(
    ("answer", "expected", "equal"),
    [
        ("Business", "Business", True),
        (" business \n", "Business", True),
        ("Sci/Tech.", "Sci/Tech", True),
        ("one  two", "one two", True),
        ("cafe\u0301", "café", True),
        ("Business news", "Business", False),
        ("Sci", "Sci/Tech", False),
        ("", "World", False),
        ("World\nSports", "World", False),
    ],
)
def test_exact_match(answer, expected, equal):
    """Case, spacing and a final full stop are forgiven; further words are not."""
    assert exact_match(answer, expected) is equal
