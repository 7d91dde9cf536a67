"""`--eval`, `--report-to` and `--device`: what is measured beside training, and where it goes."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from transformers import TrainerCallback

from str_kernels.settings import Faults
from str_kernels.training import checks
from str_kernels.training.callbacks import NoProgress
from str_kernels.training.checks import DESCRIPTION, prepare
from str_kernels.training.run import train
from str_kernels.training.settings import TrainSettings
from tests.training.test_run import ROWS, adapter


class Recorder(NoProgress):
    def __init__(self):
        self.logs = []

    def log(self, values):
        self.logs.append(values)


@pytest.fixture
def make_settings(tiny_model_dir, tmp_path):
    """Settings of a short run on half of the rows; the others are held out, or are anchors."""
    for name, rows in (("data", ROWS[::2]), ("other", ROWS[1::2])):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(text)

    def make(out="out", **changes):
        given = {"steps": 4, "batch": 2, "rank": 4, "top_k": 4, "max_length": 64, **changes}
        paths = {"data": str(tmp_path / "data.jsonl"), "out": str(tmp_path / out)}
        other = {
            name: str(tmp_path / "other.jsonl")
            for name in ("eval", "anchors")
            if given.pop(name, False)
        }
        settings = {"learning_rate": 1e-2, "logging_steps": 2, **given, **other}
        return TrainSettings(model=str(tiny_model_dir), **paths, **settings)

    return make


@pytest.mark.parametrize(
    "reference", [pytest.param("adapter_off", marks=pytest.mark.slow), "cache"]
)
def test_held_out_rows_are_measured_and_not_learned(make_settings, reference):
    """Both terms of rows that no step sees; without dropout the adapter is the same, bit for bit.

    Anchors join no evaluation, though they join every batch of training.
    """
    common = {"reference": reference, "anchors": True}
    plain, measured = make_settings("a", **common), make_settings("b", eval=True, **common)
    seen = Recorder()
    train(prepare(plain))
    result = train(prepare(measured), seen)
    for name, weight in adapter(plain).items():
        assert torch.equal(weight, adapter(measured)[name])
    (last,) = [log for log in seen.logs if "eval_loss" in log]
    assert last["step"] == 4
    terms = last["eval_cross_entropy"] + last["eval_safety_penalty"]
    assert terms == pytest.approx(last["eval_loss"], rel=1e-5)
    assert last["eval_safety_drift"] > 0
    assert result.eval_cross_entropy == last["eval_cross_entropy"]
    described = json.loads((measured.folder / DESCRIPTION).read_text())
    assert described["eval"]["rows"] == 4
    assert "cross-entropy, held out" in (measured.folder / "README.md").read_text()


def test_an_evaluation_has_the_rows_of_its_file_alone(make_settings):
    """The same terms with anchors in training as by hand, at every `eval_steps`."""
    seen, settings = Recorder(), make_settings(eval=True, eval_steps=2, anchors=True, strength=0.0)
    train(prepare(settings), seen)
    assert [log["step"] for log in seen.logs if "eval_loss" in log] == [2, 4]


def test_anchors_alone(make_settings):
    """Two of a file that is given twice join each batch; of the data nothing is held."""
    seen, settings = Recorder(), make_settings(anchors=True, anchors_alone=True)
    twice = replace(settings, anchors=settings.anchors * 2)
    train(prepare(twice), seen)
    assert seen.logs[0]["safety_penalty"] >= 0
    assert seen.logs[-1]["safety_drift"] > 0
    card = (settings.folder / "README.md").read_text()
    assert "at every position of the anchor rows and of no others" in card
    described = json.loads((settings.folder / DESCRIPTION).read_text())
    assert described["settings"]["anchors_alone"] is True
    assert len(described["anchors"]) == 2


def test_reports_get_what_the_patch_logs(make_settings, monkeypatch):
    """The callbacks of other packages come after the one that adds to the logs."""
    reported = []

    class Reports(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            reported.append(dict(logs))

    monkeypatch.setattr(checks, "get_available_reporting_integrations", lambda: ["tensorboard"])
    name = "transformers.trainer.get_reporting_integration_callbacks"
    monkeypatch.setattr(name, lambda names: [Reports] if names == ["tensorboard"] else [])
    train(prepare(make_settings(report_to="tensorboard", steps=2)))
    assert {"safety_drift", "live_share", "cross_entropy"} <= reported[0].keys()


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"report_to": "tensorbored"}, "report_to='tensorbored': .* finds no such package"),
        ({"eval_steps": 3}, "eval_steps=3: nothing is measured without eval"),
        ({"device": "tpu"}, "device='tpu': must be one of auto, cpu, cuda, mps"),
    ],
    ids=lambda x: str(x)[:20],
)
def test_wrong_settings_are_named(make_settings, changes, fault):
    """Before the run, with what is allowed."""
    with pytest.raises(Faults, match=fault):
        prepare(make_settings(**changes))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_named(make_settings):
    """Before the run."""
    with pytest.raises(Faults, match="device='cuda': torch finds no GPU"):
        prepare(make_settings(device="cuda"))
