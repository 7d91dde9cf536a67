"""What is wrong with a run is found before the model's weights are read."""

import json

import pytest
import torch

from str_kernels.settings import Faults
from str_kernels.training import checks
from str_kernels.training.checks import prepare, refuse_other_engines
from str_kernels.training.settings import TrainSettings

GOOD = {"prompt": "tell me the topic of rain", "response": "weather ."}


@pytest.fixture
def run(tmp_path, tiny_model_dir, monkeypatch):
    """Checks a run over `rows`; reading weights fails the test."""

    def forbidden(*args, **keywords):
        raise AssertionError("weights were read")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", forbidden)

    def check(rows=(GOOD,), *, resume=False, **changes):
        data = tmp_path / "data.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        settings = {"model": str(tiny_model_dir), "data": str(data), "out": str(tmp_path / "out")}
        return prepare(TrainSettings(**{**settings, "max_length": 64, **changes}), resume=resume)

    return check


def test_a_good_run_passes(run):
    """Nothing to complain about: tokenised data and the model's context."""
    prepared = run()
    assert prepared.data.facts()["rows"] == 1
    assert prepared.context == 128


def test_all_faults_are_reported_together(run, tmp_path):
    """A broken line, an impossible length, a missing reference and tokens file: one error."""
    (tmp_path / "file").write_text("")
    with pytest.raises(Faults) as caught:
        run(
            [GOOD, {"prompt": "hi"}],
            max_length=4096,
            tokens=str(tmp_path / "absent.json"),
            reference=str(tmp_path / "absent.safetensors"),
            target_modules=("nothing",),
            out=str(tmp_path / "file" / "out"),
        )
    text = str(caught.value)
    for part in ("data.jsonl:2: ", "max_length=4096: the context of model=", "absent.json",
                 "absent.safetensors", "target_modules=nothing", "cannot be written"):  # fmt: skip
        assert part in text


def test_a_prompt_that_leaves_no_room_is_named(run):
    """File and line of every prompt that fills the length."""
    with pytest.raises(Faults, match=r"data\.jsonl:2: the prompt has \d+ tokens"):
        run([GOOD, {"prompt": "rain " * 80, "response": "weather"}])


def test_cut_responses_are_counted(run):
    """A response cut at its end is allowed and counted."""
    long = {"prompt": "rain", "response": "wind " * 80}
    assert run([GOOD, long]).data.facts()["cut_responses"] == 1


def test_a_folder_that_holds_a_run_is_not_overwritten(run, tmp_path):
    """An earlier run is resumed or left alone; one that broke off before it saved is no run."""
    (tmp_path / "out").mkdir()
    with pytest.raises(Faults, match="has no checkpoint to resume"):
        run(resume=True)
    (tmp_path / "out" / checks.DESCRIPTION).write_text("{}")
    run()
    (tmp_path / "out" / checks.ADAPTER_CONFIG).write_text("")
    with pytest.raises(Faults, match="already has a run; resume it"):
        run()


def test_a_full_disk_is_noticed_before_training(run, monkeypatch):
    """Room for adapter and checkpoints is asked for first."""
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(Faults, match=r"0 MiB are free and the run writes up to"):
        run()


def test_a_tokenizer_with_more_tokens_than_the_head(run, tmp_path):
    """Ids that are no row of the head are refused by value."""
    from tests.tiny import llama, word_tokenizer

    folder = tmp_path / "mismatch"
    word_tokenizer().save_pretrained(folder)
    llama(12).save_pretrained(folder)
    with pytest.raises(
        Faults, match=r"data.jsonl holds token id \d+: the model's head has 12 rows"
    ):
        run(model=str(folder))


@pytest.mark.skipif(torch.cuda.is_available(), reason="half precision is allowed on a GPU")
def test_half_precision_needs_a_gpu(run):
    """fp16 on a CPU is refused by name; bf16 is not."""
    with pytest.raises(Faults, match="dtype='mixed-float16': needs a GPU"):
        run(dtype="mixed-float16")
    run(dtype="mixed-bfloat16")
    with pytest.raises(Faults, match="offload='cpu': moves checkpoints from a GPU"):
        run(offload="cpu", gradient_checkpointing=True)
    run(offload="disk", gradient_checkpointing=True)


def test_several_gpus_need_a_launcher(run, monkeypatch):
    """A run would be copied to all of them unasked, its batch multiplied."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(Faults, match="2 GPUs are visible and a run uses one"):
        run()
    monkeypatch.setenv("WORLD_SIZE", "2")
    run()


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED"])
def test_another_engine_is_refused(monkeypatch, name):
    """Their checkpoints are saved and resumed otherwise."""
    refuse_other_engines()
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(ValueError, match=f"ACCELERATE_USE_{name}=true: .* start it with torchrun"):
        refuse_other_engines()
