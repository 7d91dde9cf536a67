"""The probe of a run changes nothing of it, and is written into what the run leaves."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from str_kernels.training.checks import DESCRIPTION, prepare
from str_kernels.training.run import train
from str_kernels.training.settings import TrainSettings
from tests.tiny import exchanges


@pytest.mark.slow
def test_the_adapter_is_the_same_with_a_probe(aligned_model_dir, tmp_path):
    """Dropout, accumulation, the cache that fills itself and the constraint included."""
    files = {"data": exchanges(forbidden=False)[::4], "probe": exchanges(forbidden=True)[::9]}
    for name, pairs in files.items():
        rows = [json.dumps({"prompt": q, "response": a}) + "\n" for q, a in pairs]
        (tmp_path / f"{name}.jsonl").write_text("".join(rows))

    def run(out, **probe):
        settings = TrainSettings(
            *(str(aligned_model_dir), str(tmp_path / "data.jsonl"), str(tmp_path / out)),
            **{"steps": 4, "batch": 2, "accumulation": 2, "rank": 4, "max_length": 64},
            **{"dropout": 0.2, "top_k": 4, "reference": "cache", "logging_steps": 2, **probe},
        )
        result = train(prepare(settings))
        return load_file(settings.folder / "adapter_model.safetensors"), result, settings.folder

    want, alone, folder = run("alone")
    got, probed, beside = run("probed", probe=str(tmp_path / "probe.jsonl"), probe_every=2)
    assert all(torch.equal(want[name], got[name]) for name in want)
    assert probed.loss == alone.loss
    assert probed.safety_penalty == alone.safety_penalty
    assert alone.safety_probe is None
    assert probed.safety_probe["steps"] == [0, 2, 4]
    assert len(probed.safety_probe["mass"]) == 3
    kept = json.loads((beside / DESCRIPTION).read_text())["result"]["safety_probe"]
    assert kept == probed.safety_probe
    assert "probability of refusing" in (beside / "README.md").read_text()
    assert (folder / "references.sqlite").read_bytes()
    assert probed.whole
