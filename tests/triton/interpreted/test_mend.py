"""Rows whose 8-bit screen was wrong are computed again on the device, and only these."""

from __future__ import annotations

import logging

import pytest
import torch

from str_kernels import VocabularyIndex, notices, waits
from str_kernels.backends.selection import DEFAULT_EPS
from tests.backends.test_routed import clustered_case
from tests.oracle import assert_close
from tests.triton.interpreted.test_launches import SmallBlocks

LARGE = slice(3, 80, 9)  # rows whose logits are too large for 8 bits


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"softcap": 5000.0, "bias": True}], ids=str)
def test_rows_that_are_off_are_screened_exactly(options, no_waits, caplog, monkeypatch):
    """They have the results of an exact screen, the others those of a call without large rows."""
    monkeypatch.setattr(notices, "_said", set())
    case = clustered_case(80, 300, 32, ignored=0.3, **options).to(torch.float32)
    index = VocabularyIndex.build(case.weight, case.hidden_states)
    given = {"index": index, "filter_eps": DEFAULT_EPS, "backend": SmallBlocks()}
    given["reduction"] = "none"
    upstream = torch.linspace(0.5, 2.0, 80)
    alone = case.run(upstream, screen="int8", **given)
    case.hidden_states[LARGE] *= 300.0
    got = case.run(upstream, screen="int8", **given)
    want = case.run(upstream, screen="exact", **given)
    large = {name: x[LARGE] for name, x in want.items() if name != "weight" and x.shape[0] == 80}
    assert_close({name: got[name][LARGE] for name in large}, large, 1e-4)
    others = torch.ones(80, dtype=torch.bool)
    others[LARGE] = False
    rest = {name: alone[name][others] for name in large}
    assert_close({name: got[name][others] for name in large}, rest, 1e-6)
    with caplog.at_level(logging.WARNING, "str_kernels"):
        waits.judge_arrived()
    assert "too large for the int8 screen" in caplog.text


def test_nothing_is_refined_twice_where_the_screen_is_right(no_waits, dot_flops):
    """The second screen and refinement multiply nothing."""
    case = clustered_case(64, 300, 32, ignored=0.0).to(torch.float32)
    index = VocabularyIndex.build(case.weight, case.hidden_states)
    given = {"index": index, "filter_eps": DEFAULT_EPS, "backend": SmallBlocks()}
    counts = []
    for allowed in (False, True):
        waits.allowed = lambda device, allowed=allowed: allowed  # the fixture restores it
        dot_flops["flops"] = 0
        case.run(screen="int8", **given)
        counts.append(dot_flops["flops"])
    assert counts[0] == counts[1] > 0
