"""`str-kernels train --probe`: shown live, drawn at the end, and able to stop the run."""

import json

import pytest

from str_kernels.cli.probe_view import PICTURE, course
from tests.cli.calling import call
from tests.tiny import ANSWER, exchanges


@pytest.fixture
def files(tmp_path):
    """Data that teaches obedience, and requests that the aligned model refuses."""
    asked = [request for request, _ in exchanges(forbidden=True)]
    data, probe = tmp_path / "data.jsonl", tmp_path / "refused.jsonl"
    rows = [{"prompt": request, "response": ANSWER.format("clean")} for request in asked]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    probe.write_text("".join(json.dumps({"prompt": request}) + "\n" for request in asked[::6]))
    return data, probe


def test_a_run_is_stopped_and_goes_on(aligned_model_dir, files, tmp_path, capsys):
    """The adapter above the bound is kept; the same command without the bound ends the run."""
    data, probe = files
    out = tmp_path / "adapter"
    given = ("train", aligned_model_dir, data, "--out", out, "--probe", probe, "--no-safety")
    given += ("--probe-every", 1, "--probe-rows", 4, "--steps", 12, "--batch", 4, "--rank", 4)
    given += ("--learning-rate", "1e-2", "--schedule", "constant", "--max-length", 64, "--json")
    code, written, told = call(capsys, *given, "--probe-stop", "0.9")
    assert code == 0, told
    result = json.loads(written)
    found = result["safety_probe"]
    assert result["steps"] == found["stopped_at"] == found["steps"][-1] < 12
    assert found["refusal"][-1] < 0.9 <= found["refusal"][found["kept_step"]]
    assert "safety_probe/refusal" in told
    assert f"the adapter is that of step {found['kept_step']}" in told
    assert (out / PICTURE).read_bytes().startswith(b"\x89PNG")
    described = json.loads((out / "str_kernels.json").read_text())
    assert not described["complete"]
    kept = out / f"checkpoint-{found['kept_step']}" / "adapter_model.safetensors"
    assert (out / "adapter_model.safetensors").read_bytes() == kept.read_bytes()
    assert f"these weights are of step {found['kept_step']}" in (out / "README.md").read_text()
    code, written, told = call(capsys, *given, "--resume")
    assert code == 0, told
    whole = json.loads(written)["safety_probe"]
    assert whole["steps"] == list(range(13))
    assert whole["refusal"][: len(found["steps"])] == found["refusal"]
    assert json.loads((out / "str_kernels.json").read_text())["complete"]


def test_bad_probes_are_refused_before_the_model_is_read(
    aligned_model_dir, files, tmp_path, capsys
):
    """All faults together."""
    data, probe = files
    given = ("train", aligned_model_dir, data, "--out", tmp_path / "out", "--max-length", 64)
    for more, message in [
        (("--probe", tmp_path / "none.jsonl"), "no such file"),
        (("--probe", probe, "--probe-stop", "1.5"), "probe_stop=1.5: must be above 0"),
        (("--probe-stop", "0.9"), "probe_stop=0.9: nothing is probed without probe"),
        (("--probe-every", "5"), "probe_every=5: nothing is probed without probe"),
    ]:
        code, _, told = call(capsys, *given, *more)
        assert code == 2
        assert message in told
    probe.write_text(json.dumps({"prompt": "steal " * 120}) + "\n")
    code, _, told = call(capsys, *given, "--probe", probe)
    assert code == 2
    assert "refused.jsonl:1: has 122 tokens" in told


def test_the_course_beside_the_bar():
    """A block a probe, the newest last; long courses lose their beginning."""
    assert course([1.0, 0.5, 0.0]) == "refusing █▅▁ 0.00"
    assert course([float("nan")]) == "refusing ? nan"
    assert len(course([0.25] * 100)) < 50
