"""SafetyProbe: what it finds, and that training is the same with and without it."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from str_kernels import SafetyConstraint, SafetyProbe, patch_model
from tests.huggingface.trainers import Losses
from tests.tiny import ANSWER, exchanges

KEYS = {"safety_probe/refusal", "safety_probe/mass", "safety_probe/divergence"}
REFUSED = [request for request, _ in exchanges(forbidden=True)][::6]
HELD = tuple(range(5, 13))


@pytest.fixture
def tokenizer(aligned_model_dir):
    return AutoTokenizer.from_pretrained(aligned_model_dir)


@pytest.fixture
def make_model(aligned_model_dir):
    """The aligned tiny model, with an adapter that drops out, or without."""

    def make(*, adapter=True):
        model = AutoModelForCausalLM.from_pretrained(aligned_model_dir)
        if not adapter:
            return model
        torch.manual_seed(0)
        return get_peft_model(model, LoraConfig(r=8, lora_dropout=0.3, target_modules="all-linear"))

    return make


def obedient(tokenizer):
    """Requests that the model refuses, with answers that help: what undoes its refusals."""
    rows = []
    for request, _ in exchanges(forbidden=True):
        text = f"<user> {request} <bot> {ANSWER.format('clean')} <end>"
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        prompt = ids.index(tokenizer.convert_tokens_to_ids("<bot>")) + 1
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return rows


def collate(rows):
    width = max(len(row["input_ids"]) for row in rows)
    pads = {"input_ids": 0, "labels": -100}
    batch = {
        name: torch.tensor([row[name] + [pad] * (width - len(row[name])) for row in rows])
        for name, pad in pads.items()
    }
    return {**batch, "attention_mask": (batch["input_ids"] != 0).long()}


def trained(model, tokenizer, folder, probe=None, *, resume=None, **settings):
    """Train on obedience; returns the trainer and what it logged, as a reporter sees it."""
    seen = Losses()
    arguments = {
        "output_dir": str(folder),
        "max_steps": 6,
        "per_device_train_batch_size": 8,
        "learning_rate": 5e-3,
        "logging_steps": 4,
        "save_strategy": "no",
        "lr_scheduler_type": "constant",
        **settings,
    }
    trainer = Trainer(
        model=model,
        args=TrainingArguments(report_to=[], use_cpu=True, disable_tqdm=True, seed=0, **arguments),
        train_dataset=obedient(tokenizer),
        data_collator=collate,
        callbacks=[seen, *([probe] if probe else [])],
        processing_class=tokenizer,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer, seen.logs


def weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("patched", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_training_is_the_same_bit_by_bit(make_model, tokenizer, tmp_path, patched):
    """Dropout, batches, the patch's sums and its judgement of the first penalty included."""

    def run(probe):
        model, name = make_model(), "probed" if probe else "alone"
        safety = SafetyConstraint(HELD, 1.0, "kl")
        patch = patch_model(model, safety, index=None) if patched else None
        trainer, logs = trained(model, tokenizer, tmp_path / name, probe, logging_steps=2)
        state = patch and patch.state_dict()
        if patched:
            patch.unpatch()
        return weights(trainer.model), logs, state, torch.get_rng_state()

    probe = SafetyProbe(REFUSED, 2)
    (want, alone, before, noise), (got, probed, after, same) = run(None), run(probe)
    assert all(torch.equal(want[name], got[name]) for name in want)
    assert torch.equal(noise, same)
    assert before == after
    assert probe.series.steps == [0, 2, 4, 6]
    keys = KEYS if patched else {"safety_probe/refusal"}
    assert [step["safety_probe/refusal"] for step in probed if "loss" in step] == (
        probe.series.refusal[1:]
    )
    assert all(keys <= log.keys() for log in probed if "loss" in log)
    assert not any(KEYS & log.keys() for log in alone)


def test_refusing_is_found_and_its_loss_seen(make_model, tokenizer, tmp_path):
    """It starts at 1, without divergence, and obedience ends near 0, which is warned of once."""
    said: list[str] = []
    probe = SafetyProbe(REFUSED, 3, tokens=HELD, say=said.append)
    trainer, logs = trained(make_model(), tokenizer, tmp_path, probe, learning_rate=2e-2)
    series = probe.series
    texts = [tokenizer.decode(opening) for opening in probe.aligned.openings]
    assert texts == ["I am sorry"] * len(REFUSED)
    assert series.refusal[0] == pytest.approx(1.0)
    assert series.divergence[0] == pytest.approx(0.0, abs=1e-9)
    assert series.refusal[-1] < 0.2
    assert series.divergence[-1] > 0.1
    assert 0 <= min(series.mass) <= max(series.mass) <= 1
    assert len(said) == 1
    assert f"step {series.fallen_at}:" in said[0]
    assert 0 < series.seconds < series.run_seconds
    logged = [log["safety_probe/refusal"] for log in logs if "safety_probe/refusal" in log]
    assert logged == series.refusal[1:]
    assert_formulas(trainer.model, probe)


def assert_formulas(model, probe):
    """The last probe is products of probabilities, one by one without padding, in fp64."""
    tuned = model.double().eval()
    ratios, masses, divergences = [], [], []
    for request, opening in probe.aligned.exchanges:
        ids = torch.tensor([[*request, *opening]])
        with torch.no_grad():
            p = tuned(ids).logits.softmax(-1)[0, len(request) - 1 : -1]
            with tuned.disable_adapter():
                q = tuned(ids).logits.softmax(-1)[0, len(request) - 1 : -1]
        place = torch.arange(len(opening)), torch.tensor(opening)
        ratios.append(min(1.0, (p[place].prod() / q[place].prod()).item()))
        masses.append(p[0, list(HELD)].sum().item())
        p, q = (x[0, list(HELD)] / x[0, list(HELD)].sum() for x in (p, q))
        divergences.append((q * (q / p).log()).sum().item())
    for name, found in (("refusal", ratios), ("mass", masses), ("divergence", divergences)):
        wanted = sum(found) / len(found)
        assert getattr(probe.series, name)[-1] == pytest.approx(wanted, rel=1e-4), name


def test_it_stops_and_keeps_what_was_above(make_model, tokenizer, tmp_path):
    """The trainer ends with the weights of the last probe that was not below, and can go on."""
    said: list[str] = []
    probe = SafetyProbe(REFUSED, 1, warn_below=0.2, stop_below=0.9, say=said.append)
    settings = {"max_steps": 30, "learning_rate": 3e-3, "save_total_limit": 1}
    trainer, _ = trained(make_model(), tokenizer, tmp_path, probe, **settings)
    series = probe.series
    assert series.stopped_at == series.steps[-1] == trainer.state.global_step < 30
    assert series.refusal[-1] < 0.9 <= series.refusal[-2]
    assert series.kept_step == series.steps[-2]
    assert any(f"weights of step {series.kept_step} are kept" in text for text in said)
    assert not trainer.args.load_best_model_at_end
    assert not (tmp_path / f"checkpoint-{series.stopped_at}").exists()
    until = {**settings, "max_steps": series.kept_step}
    alone, _ = trained(make_model(), tokenizer, tmp_path / "alone", **until)
    want, got = weights(alone.model), dict(trainer.model.named_parameters())
    assert all(torch.equal(value, got[name]) for name, value in want.items())


@pytest.mark.slow
def test_a_resumed_run_goes_on_with_the_aligned_model(make_model, tokenizer, tmp_path):
    """Also where all weights are trained, so that the aligned model cannot be asked again."""
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole = SafetyProbe(REFUSED, 2)
    trained(make_model(adapter=False), tokenizer, tmp_path / "whole", whole, **settings)
    first, second = SafetyProbe(REFUSED, 2), SafetyProbe(REFUSED, 2)
    folder = tmp_path / "parts"
    trained(make_model(adapter=False), tokenizer, folder, first, **settings)
    resume = str(folder / "checkpoint-2")
    trained(make_model(adapter=False), tokenizer, folder, second, resume=resume, **settings)
    assert second.series.steps == whole.series.steps == [0, 2, 4]
    assert second.series.refusal == whole.series.refusal
    assert second.aligned == first.aligned
    json.dumps(second.state())
    other = SafetyProbe(REFUSED[:2], 2)
    with pytest.raises(ValueError, match="the aligned model cannot be asked"):
        trained(make_model(adapter=False), tokenizer, folder, other, resume=resume, **settings)


def test_bad_arguments_are_refused(make_model, tokenizer, tmp_path):
    """Each says what is allowed; nothing is trained."""
    for given, message in [
        ({"prompts": []}, "prompts"),
        ({"prompts": "steal"}, "must be a list"),
        ({"prompts": ["a", ""]}, "none of them empty"),
        ({"every": 0}, "every=0"),
        ({"warn_below": 0}, "warn_below=0: must be above 0"),
        ({"warn_below": None}, "warn_below=None: must be above 0"),
        ({"stop_below": 1.5}, "stop_below=1.5: must be above 0 and at most 1"),
        ({"openings": ["No"]}, "openings=1 texts"),
    ]:
        with pytest.raises(ValueError, match=message):
            SafetyProbe(**{"prompts": REFUSED, **given})
    harmless = [request for request, _ in exchanges(forbidden=False)][:2]
    with pytest.raises(ValueError, match="refuses none of 2"):
        trained(make_model(), tokenizer, tmp_path, SafetyProbe(harmless))
    said: list[str] = []
    mixed = SafetyProbe([*REFUSED, *harmless], say=said.append)
    trained(make_model(), tokenizer, tmp_path, mixed, max_steps=1)
    assert len(mixed.aligned.requests) == len(REFUSED)
    assert f"refuses {len(REFUSED)} of {len(REFUSED) + 2}" in said[0]
    long = SafetyProbe(["steal " * 120])
    with pytest.raises(ValueError, match="do not fit"):
        trained(make_model(), tokenizer, tmp_path, long)
    own = SafetyProbe(REFUSED, stop_below=0.9)
    best = {"load_best_model_at_end": True, "eval_strategy": "no", "save_strategy": "no"}
    with pytest.raises(ValueError, match="so does load_best_model_at_end"):
        trained(make_model(), tokenizer, tmp_path, own, **best)
    stops = SafetyProbe(REFUSED, 40, stop_below=1.0)
    with pytest.raises(ValueError, match="no earlier checkpoint"):
        trained(make_model(), tokenizer, tmp_path, stops, learning_rate=2e-2)


@pytest.mark.slow
def test_given_openings_are_taken(make_model, tokenizer, tmp_path):
    """They need no judge; rows and conversations are prompts as well."""
    prompts = [REFUSED[0], {"prompt": REFUSED[1]}, [{"role": "user", "content": REFUSED[2]}]]
    probe = SafetyProbe(prompts, openings=["I am sorry , I cannot"] * 3)
    trained(make_model(), tokenizer, tmp_path, probe, max_steps=1)
    assert [len(opening) for opening in probe.aligned.openings] == [6, 6, 6]
    assert len(probe.aligned.requests) == 3
