"""The accuracy check sees what the filter does, and what a planted fault does."""

from __future__ import annotations

from dataclasses import replace

import torch

from str_kernels import VocabularyIndex
from str_kernels.accuracy import check_accuracy
from str_kernels.options import LossOptions
from tests.backends.test_routed import clustered_case


def report_of(index_change=lambda index: index, **options):
    """The check on a clustered head, after a change to its index."""
    case = clustered_case(vocab=4096, n=64, ignored=0.2).to(torch.float32)
    index = index_change(VocabularyIndex.build(case.weight, case.hidden_states))
    chosen = LossOptions(filter_eps=2.0**-7, screen="exact", **options)
    return check_accuracy(case.hidden_states, case.weight, case.labels, chosen, index=index)


def test_a_sound_index_is_acceptable():
    """Both errors stay within the bf16 head's, and the filter did leave something out."""
    report = report_of()
    assert report.acceptable, report
    assert 0 < report.dead_mass < 0.05
    assert 0 < report.gradient_error < report.bf16_gradient_error
    assert "gradient error" in str(report)


def test_a_shuffled_mean_row_is_seen():
    """Mean rows of other tiles, ten times as long: the gradient is off, and it says so."""
    report = report_of(lambda index: replace(index, mean_rows=10 * index.mean_rows.flip(0)))
    assert not report.acceptable


def test_nothing_to_compare():
    """No label, no report."""
    weight = torch.randn(300, 8)
    assert check_accuracy(torch.randn(4, 8), weight, torch.full((4,), -100)) is None


def test_the_exact_path_has_no_error():
    """Under a softcap, with a bias and without a filter both passes are one."""
    case = clustered_case(n=16, bias=True).to(torch.float32)
    options = LossOptions(filter_eps=0.0, softcap=20.0)
    arguments = (case.hidden_states, case.weight, case.labels, options)
    report = check_accuracy(*arguments, bias=3 * case.bias)
    assert report.gradient_error == 0
    assert report.lse_error == 0
    assert 0 < report.bf16_gradient_error < 0.1
