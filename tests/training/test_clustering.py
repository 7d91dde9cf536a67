"""Clustering the vocabulary, seconds of silence for a large one, is seen in a run."""

from __future__ import annotations

from str_kernels.huggingface.patch import filtering
from str_kernels.training.callbacks import NoProgress
from str_kernels.training.checks import prepare
from str_kernels.training.run import train
from tests.training.test_run import data_file, make_settings  # noqa: F401  fixtures


class Heard(NoProgress):
    """Stages and steps in their order."""

    def __init__(self) -> None:
        self.stages, self.steps = [], {}

    def stage(self, text: str) -> None:
        self.stages.append(text)

    def step(self, done: int, total: int) -> None:
        self.steps.setdefault(self.stages[-1], []).append((done, total))


def test_clustering_is_a_stage_of_its_own(monkeypatch, make_settings):  # noqa: F811
    """It comes within the training, counts the vocabulary's rows, and hands the bar back."""
    monkeypatch.setattr(filtering, "SMALLEST_VOCABULARY", 1)
    heard = Heard()
    train(prepare(make_settings(method="plain", steps=2)), heard)
    assert heard.stages[-3:] == ["training", "clustering the head's vocabulary", "training"]
    rows = heard.steps["clustering the head's vocabulary"]
    assert rows[0][0] == 0
    assert rows[-1][0] == rows[-1][1]
    assert heard.steps["training"] == [(1, 2), (2, 2)]
