"""A whole run: what it learns, what it writes, and that a resumed one is the same run."""

import dataclasses
import importlib.util
import json
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from str_kernels.huggingface.patch import filtering
from str_kernels.settings import Faults
from str_kernels.training.callbacks import NoProgress
from str_kernels.training.checks import DESCRIPTION, REFERENCES, prepare
from str_kernels.training.reading import TOKENS
from str_kernels.training.run import train
from str_kernels.training.settings import TrainSettings

pytestmark = pytest.mark.one_in(2)

ADAPTER = "adapter_model.safetensors"
ROWS = [
    {"prompt": f"tell me the topic of {word}", "response": f"{topic} ."}
    for word, topic in [("rain", "weather"), ("wind", "weather"), ("ball", "sport"),
                        ("team", "sport"), ("song", "music"), ("choir", "music"),
                        ("train", "travel"), ("ticket", "travel")]
]  # fmt: skip


@pytest.fixture
def data_file(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.fixture
def make_settings(tiny_model_dir, data_file, tmp_path):
    """Settings of a short run; `out` is a name below the test's folder."""

    def make(out="out", **changes):
        defaults = {"steps": 6, "batch": 2, "rank": 4, "top_k": 4, "max_length": 64}
        return TrainSettings(
            model=str(tiny_model_dir),
            data=str(data_file),
            out=str(tmp_path / out),
            **{**defaults, "learning_rate": 1e-2, "logging_steps": 2, **changes},
        )

    return make


class CtrlC(NoProgress):
    """Presses Ctrl-C while a given step is reported."""

    def __init__(self, at):
        self.at, self.notices = at, []

    def step(self, done, total):
        if done == self.at:
            os.kill(os.getpid(), signal.SIGINT)

    def notice(self, text):
        self.notices.append(text)


class Recorder(NoProgress):
    def __init__(self):
        self.logs = []

    def log(self, values):
        self.logs.append(values)


def adapter(settings):
    return load_file(settings.folder / ADAPTER)


@pytest.mark.parametrize("method", ["str", pytest.param("unpatched", marks=pytest.mark.slow)])
def test_a_resumed_run_continues_exactly(monkeypatch, make_settings, method):
    """Six steps are the same weights as three, Ctrl-C, and a resume: order of the data, dropout,
    learning rate, optimizer and the vocabulary index's fate all go on where they were.
    """
    monkeypatch.setattr(filtering, "SMALLEST_VOCABULARY", 1)
    shared = {"method": method, "dropout": 0.2, "schedule": "cosine", "accumulation": 2}
    if method == "str":
        shared |= {"gradient_checkpointing": True, "offload": "disk", "reference": "cache"}
    whole = make_settings("whole", **shared)
    unbroken = train(prepare(whole))
    assert not unbroken.interrupted
    parts = make_settings("parts", **shared)
    progress = CtrlC(at=3)
    first = train(prepare(parts), progress)
    assert (first.steps, first.interrupted) == (3, True)
    assert any("Ctrl-C again" in text for text in progress.notices)
    halfway = adapter(parts)
    assert not json.loads((parts.folder / DESCRIPTION).read_text())["complete"]
    second = train(prepare(parts, resume=True))
    assert (second.steps, second.interrupted) == (6, False)
    wanted, got = adapter(whole), adapter(parts)
    assert wanted.keys() == got.keys()
    assert all(torch.equal(wanted[name], got[name]) for name in wanted)
    assert any(not torch.equal(halfway[name], got[name]) for name in got)


def test_a_resume_with_other_settings_is_refused(make_settings, data_file):
    """What differs is named; so is a data file that changed."""
    train(prepare(make_settings(method="unpatched")), CtrlC(at=2))
    with pytest.raises(Faults, match=r"begun with other settings \(rank, seed\)"):
        prepare(make_settings(method="unpatched", rank=8, seed=1), resume=True)
    data_file.write_text(data_file.read_text().replace("weather", "music"))
    with pytest.raises(Faults, match=r"the contents of .*data.jsonl"):
        prepare(make_settings(method="unpatched"), resume=True)


def test_the_two_terms_are_logged_apart(make_settings):
    """Every log holds cross-entropy and penalty, and their sum is the loss."""
    recorder = Recorder()
    result = train(prepare(make_settings(strength=2.0)), recorder)
    assert [log["step"] for log in recorder.logs] == [2, 4, 6]
    for log in recorder.logs:
        # the trainer rounds no more than to float32; two sums of two steps each
        total = log["cross_entropy"] + log["safety_penalty"]
        assert total == pytest.approx(log["loss"], rel=1e-5)
    assert recorder.logs[-1]["safety_penalty"] > 0
    assert result.safety_penalty == recorder.logs[-1]["safety_penalty"]


def test_a_cached_reference_trains_the_same_adapter(make_settings):
    """References computed once are those of the adapter-off pass, but for their fp16 on disk; the
    file serves another run by name, and is refused for other tokens.
    """
    live, cached = make_settings("live"), make_settings("cached", reference="cache")
    train(prepare(live))
    train(prepare(cached))
    file = str(cached.folder / REFERENCES)
    again = make_settings("again", reference=file, tokens=str(cached.folder / TOKENS))
    train(prepare(again))
    for name, wanted in adapter(live).items():
        # fp16 references are off by 2^-11 of logits of about 1, and Adam's steps are 1e-2
        assert (adapter(cached)[name] - wanted).abs().mean() < 1e-3
        assert torch.equal(adapter(cached)[name], adapter(again)[name])
    other = make_settings("other", reference=file, tokens=str(cached.folder / TOKENS), kind="kl")
    prepare(other)  # the same unit, so the same references
    with pytest.raises(Faults, match="logprob"):
        prepare(
            make_settings("o", reference=file, tokens=str(live.folder / TOKENS), kind="logprob")
        )


@pytest.fixture
def anchors(tmp_path):
    """Two files of rows to hold."""
    rows = {
        "refused": [{"prompt": f"how to steal {x}", "response": "no ."} for x in ("it", "cars")],
        "benign": [{"prompt": "how to clean a car", "response": "with water and soap ."}],
    }
    files = []
    for name, held in rows.items():
        files.append(tmp_path / f"{name}.jsonl")
        files[-1].write_text("".join(json.dumps(row) + "\n" for row in held))
    return tuple(map(str, files))


@pytest.mark.slow
def test_anchors_are_held_and_not_learned(make_settings, anchors):
    """With strength 0 they change nothing; else they do, are in a run's own references, and are
    missed in those of a run without them; a resumed run asks for the same ones.
    """
    plain, held = make_settings("plain"), make_settings("held", anchors=anchors)
    silent = [make_settings(f"silent{n}", anchors=a, strength=0.0)
              for n, a in enumerate([(), anchors])]  # fmt: skip
    cached = make_settings("cached", anchors=anchors, reference="cache")
    for settings in (plain, held, *silent, cached):
        train(prepare(settings))
    for name, wanted in adapter(held).items():
        assert (adapter(cached)[name] - wanted).abs().mean() < 1e-3
        assert torch.allclose(adapter(silent[0])[name], adapter(silent[1])[name], atol=1e-4)
    assert any(not torch.equal(a, adapter(plain)[name]) for name, a in adapter(held).items())
    written = json.loads((held.folder / DESCRIPTION).read_text())
    assert [(file["path"], file["rows"]) for file in written["anchors"]] == [
        (anchors[0], 2),
        (anchors[1], 1),
    ]
    own = make_settings("own", reference="cache")
    train(prepare(own))
    file, tokens = str(own.folder / REFERENCES), str(own.folder / TOKENS)
    with pytest.raises(Faults, match=r"has no entry for 2 of 2 rows of .*refused.jsonl"):
        prepare(make_settings("other", anchors=anchors, reference=file, tokens=tokens))


@pytest.mark.parametrize("wide", [False, True])
def test_anchors_that_widen_the_batches_are_told(make_settings, anchors, wide):
    row = ROWS[0] if not wide else {**ROWS[0], "response": "with water and soap . " * 4}
    Path(anchors[0]).write_text(json.dumps(row))
    progress = CtrlC(at=1)
    train(prepare(make_settings(anchors=anchors[:1])), progress)
    assert any("widen every batch" in text for text in progress.notices) == wide


@pytest.mark.slow
def test_anchors_of_a_resumed_run_are_the_same(make_settings, anchors):
    whole = make_settings("whole", anchors=anchors)
    train(prepare(whole))
    parts = make_settings("parts", anchors=anchors)
    assert train(prepare(parts), CtrlC(at=3)).interrupted
    with pytest.raises(Faults, match=r"other settings \(anchors\)"):
        prepare(make_settings("parts", anchors=anchors[:1]), resume=True)
    benign = Path(anchors[1])
    text = benign.read_text()
    benign.write_text(text.replace("soap", "water"))
    with pytest.raises(Faults, match=r"the contents of .*benign.jsonl"):
        prepare(make_settings("parts", anchors=anchors), resume=True)
    benign.write_text(text)
    train(prepare(parts, resume=True))
    assert all(torch.equal(adapter(whole)[name], a) for name, a in adapter(parts).items())


def test_anchors_at_fault_are_named(make_settings, anchors, tmp_path):
    (tmp_path / "broken.jsonl").write_text('{"prompt": "x"}\n')
    with pytest.raises(Faults) as caught:
        prepare(make_settings(anchors=(*anchors, "no.jsonl", str(tmp_path / "broken.jsonl"))))
    assert "no.jsonl: no such file" in str(caught.value)
    assert "broken.jsonl:1:" in str(caught.value)
    for given in ({"anchors": anchors}, {"share": 0.5}):
        with pytest.raises(Faults, match="so tokens, anchors, reference and share have no use"):
            make_settings(**given, method="plain")


def test_plain_fused_training_is_unpatched_training(make_settings):
    """Without safety tokens the fused loss trains the same adapter as the model's own head."""
    fused, dense = make_settings("fused", method="plain"), make_settings("own", method="unpatched")
    train(prepare(fused))
    train(prepare(dense))
    for name, wanted in adapter(dense).items():
        # fp32 rounding through six Adam steps of 1e-2: a gradient's sign may flip where it is 0
        assert (adapter(fused)[name] - wanted).abs().mean() < 1e-4
    losses = [json.loads((s.folder / DESCRIPTION).read_text())["result"]["loss"]
              for s in (fused, dense)]  # fmt: skip
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "bfloat16", "kind": "mse", "positions": 2, "schedule": "constant"},
        {"dtype": "mixed-bfloat16", "kind": "kl", "positions": "labels", "warmup": 2},
        {"dtype": "float32", "kind": "logprob", "epochs": 1.5, "steps": None, "batch": 3},
    ],
)
def test_settings_reach_the_run(make_settings, changes):
    """Precisions, kinds, positions and schedules in company: the loss falls, the penalty is there,
    and the adapter's own weights are fp32 whatever the body's are.
    """
    recorder = Recorder()
    settings = make_settings(logging_steps=1, **changes)
    result = train(prepare(settings), recorder)
    assert result.steps == (6 if settings.steps else 5)  # 8 rows, 3 a step, one and a half times
    losses = [log["cross_entropy"] for log in recorder.logs]
    assert min(losses[-2:]) < losses[0]
    assert max(log["safety_penalty"] for log in recorder.logs) > 0
    assert {weight.dtype for weight in adapter(settings).values()} == {torch.float32}


def test_what_is_written(make_settings, data_file, tiny_model_dir):
    """The adapter, its tokens and tokenizer, and a description with every setting; PEFT loads it,
    and only it differs from the base model.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    settings = make_settings(target_modules=("q_proj", "v_proj"))
    result = train(prepare(settings))
    description = json.loads((settings.folder / DESCRIPTION).read_text())
    assert description["schema"] == "str_kernels.train/1"
    assert description["complete"]
    assert description["settings"] == settings.as_dict()
    assert description["data"]["rows"] == len(ROWS)
    assert description["result"]["steps"] == result.steps == 6
    saved = json.loads((settings.folder / TOKENS).read_text())["token_ids"]
    assert description["safety_tokens"]["token_ids"] == saved
    assert 1 <= len(saved) <= 4
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    loaded = PeftModel.from_pretrained(base, settings.out)
    assert set(loaded.peft_config["default"].target_modules) == {"q_proj", "v_proj"}
    assert not any("lm_head" in name for name in adapter(settings))


def test_tokens_from_a_file_are_used(make_settings, tmp_path, tiny_model_dir):
    """A file of safety tokens goes before identifying; one of another tokenizer is refused."""
    from transformers import AutoTokenizer

    from str_kernels.safety.tokens import SafetyTokens
    from tests.tiny import word_tokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    path = tmp_path / "tokens.json"
    tokens = SafetyTokens.from_strings(tokenizer, ["sorry", "cannot"])
    tokens.save(path)
    settings = make_settings(tokens=str(path))
    prepared = prepare(settings)
    assert prepared.tokens.token_ids == tokens.token_ids
    SafetyTokens.from_strings(word_tokenizer(["sorry", "other"]), ["sorry"]).save(path)
    with pytest.raises(Faults, match=r"tokens\.json|tokenizer"):
        prepare(settings)


def test_a_loss_that_is_not_finite_stops_the_run(make_settings):
    """Training does not go on with NaN weights, and no adapter is written."""
    settings = make_settings(method="unpatched", learning_rate=1e30, logging_steps=1, steps=50,
                             max_grad_norm=0.0)  # fmt: skip
    with pytest.raises(FloatingPointError, match="not finite at step"):
        train(prepare(settings))
    assert not (settings.folder / ADAPTER).exists()


@pytest.mark.parametrize("dtype", ["nf4", "int8"])
def test_a_body_in_few_bits(make_settings, dtype):
    """It is trained below a bf16 head, its safety tokens found first; a GGUF file is refused."""
    with pytest.raises(Faults, match=f"dtype='{dtype}': a GGUF file is dequantised"):
        dataclasses.replace(make_settings(), dtype=dtype, model="model.gguf")
    settings = make_settings(dtype=dtype, gradient_checkpointing=True, tile_tokens=8)
    if importlib.util.find_spec("bitsandbytes") is None:
        with pytest.raises(Faults, match="pip install bitsandbytes"):
            prepare(settings)
        return
    result = train(prepare(settings))
    assert result.safety_penalty > 0.0
    assert {x.dtype for x in adapter(settings).values()} <= {torch.float32, torch.bfloat16}
