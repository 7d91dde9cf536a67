"""TRL's trainers bring a head of their own: SFTTrainer's is answered by the patch, in any order."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from peft import LoraConfig

from str_kernels.huggingface import patch_model
from str_kernels.huggingface.patch.install import find_patch
from tests.huggingface.models import build
from tests.huggingface.trainers import SAFETY, assert_equal_runs, lora_model, rows, run
from tests.tiny import llama, word_tokenizer

pytestmark = pytest.mark.one_in(2)

trl = pytest.importorskip("trl", minversion="1.15")
Dataset = pytest.importorskip("datasets").Dataset


def settings_for(folder, **settings):
    arguments = {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "seed": 0,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "lr_scheduler_type": "constant",
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "remove_unused_columns": False,
        **settings,
    }
    return trl.SFTConfig(**arguments)


def sft(model, folder, data=None, **settings):
    arguments = settings_for(folder, **settings)
    prepared = data is None

    def collate(examples):
        return {name: torch.tensor([e[name] for e in examples]) for name in examples[0]}

    return trl.SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(rows()) if prepared else data,
        eval_dataset=Dataset.from_list(rows(5)) if prepared else None,
        data_collator=collate if prepared else None,
        processing_class=word_tokenizer(),
    )


def history(trainer) -> list[dict]:
    trainer.train()
    return [log for log in trainer.state.log_history if "loss" in log]


def patched_history(model, folder, first, safety=None, data=None, **settings):
    """Logs of an unmodified SFTTrainer, the model patched before or after it is made."""
    patch = patch_model(model, safety) if first == "patch" else None
    trainer = sft(model, folder, data, **settings)
    patch = patch or patch_model(model, safety)
    return history(trainer), patch


def assert_same_logs(got: list[dict], want: list[dict]) -> None:
    assert len(got) == len(want) == 3
    for a, b in zip(got, want, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
        assert a["entropy"] == pytest.approx(b["entropy"], rel=2e-5)
        assert a["mean_token_accuracy"] == pytest.approx(b["mean_token_accuracy"], abs=1e-6)
        assert a["num_tokens"] == b["num_tokens"]
        assert a.get("aux_loss", 0.0) == pytest.approx(b.get("aux_loss", 0.0), rel=2e-5)


@pytest.mark.parametrize(
    ("first", "settings"),
    [
        ("patch", {}),
        ("trainer", {}),
        ("patch", {"gradient_accumulation_steps": 2}),
        ("trainer", {"loss_type": "dft"}),
        ("patch", {"gradient_checkpointing": True}),
        ("patch", {"average_tokens_across_devices": False}),
    ],
    ids=str,
)
def test_the_numbers_of_sft_trainer(first, settings, tmp_path):
    """Without a constraint: its own losses, gradient norms, entropies, accuracies and counts."""
    want = history(sft(lora_model(), tmp_path, **settings))
    got, patch = patched_history(lora_model(), tmp_path, first, **settings)
    assert patch.last_parts is not None
    assert_same_logs(got, want)


@pytest.mark.parametrize("first", ["patch", "trainer"])
def test_a_router_keeps_its_loss(first, tmp_path):
    """TRL adds the router's loss with a factor of its own; it is not counted twice."""
    settings = {"router_aux_loss_coef": 0.5}
    want = history(sft(build("mixtral"), tmp_path, **settings))
    got, patch = patched_history(build("mixtral"), tmp_path, first, **settings)
    assert patch.last_parts is not None
    assert want[0]["aux_loss"] > 0
    assert_same_logs(got, want)


@pytest.mark.parametrize(
    ("first", "settings"),
    [("patch", {"gradient_accumulation_steps": 2}), ("trainer", {})],
    ids=str,
)
def test_the_constraint_counts(first, settings, tmp_path):
    """Its losses and gradient norms are those of transformers' Trainer on the patched model."""
    model = lora_model()
    with patch_model(model, SAFETY):
        want = run(model, tmp_path, max_steps=3, **settings)
    got, patch = patched_history(lora_model(), tmp_path, first, SAFETY, **settings)
    assert patch.last_parts.penalty > 0
    assert_equal_runs(got, want)
    assert all(log["entropy"] > 0 and 0 <= log["mean_token_accuracy"] <= 1 for log in got)


def test_bfloat16_of_the_whole_model(tmp_path):
    """Accelerate wraps the forward once more, and the patch still stands before TRL's."""
    model = build()
    want = history(sft(model, tmp_path, bf16=True))
    got, patch = patched_history(build(), tmp_path, "patch", bf16=True)
    assert patch.last_parts is not None
    for a, b in zip(got, want, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2**-7)
        assert a["entropy"] == pytest.approx(b["entropy"], rel=2**-7)


def test_the_adapter_may_come_from_the_trainer(tmp_path):
    """``peft_config``: the trainer wraps the patched model itself."""
    model = build()
    patch = patch_model(model, SAFETY)
    torch.manual_seed(2)
    trainer = trl.SFTTrainer(
        model=model,
        args=settings_for(tmp_path, dataset_kwargs=None, remove_unused_columns=True),
        train_dataset=words(),
        processing_class=word_tokenizer(),
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
    )
    assert len(history(trainer)) == 3
    assert patch.last_parts.penalty > 0


def test_a_second_trainer(tmp_path):
    """Another trainer of the same model covers the first one's forward: answered as well."""
    model = lora_model()
    patch = patch_model(model, SAFETY)
    sft(model, tmp_path).train()
    patch.last_parts = None
    sft(model, tmp_path).train()
    assert patch.last_parts.penalty > 0
    patch.unpatch()
    assert "train" not in patch.model.__dict__
    assert len(history(sft(model, tmp_path))) == 3


def test_a_filtered_loss_keeps_the_entropy_exact(tmp_path):
    """Where the loss leaves logits out, the entropy is of all of them."""
    want = history(sft(llama(1024), tmp_path, max_steps=1))
    model = llama(1024)
    patch = patch_model(model, filter_eps=0.5, screen="bf16")
    got = history(sft(model, tmp_path, max_steps=1))
    assert patch.last_parts.dead_mass.max() > 0
    assert got[0]["entropy"] == pytest.approx(want[0]["entropy"], rel=2e-5)


def words() -> Dataset:
    """Sequences of several lengths, for TRL to prepare."""
    lengths = (5, 9, 7, 6, 8, 5, 9, 7)
    return Dataset.from_list(
        [{"input_ids": list(range(3 + i, 3 + i + n))} for i, n in enumerate(lengths)]
    )


@pytest.mark.parametrize("safety", [None, SAFETY], ids=["plain", "constrained"])
@pytest.mark.parametrize("packing", [False, True], ids=["padding-free", "packed"])
def test_rows_without_padding(packing, safety, tmp_path):
    """Sequences one after another in a row, told apart by position ids: SFTTrainer's losses."""
    settings = {
        "packing": packing, "padding_free": True, "dataset_kwargs": None,
        "max_length": 16 if packing else None, "remove_unused_columns": True,
        "per_device_train_batch_size": 2
    }  # fmt: skip
    want = history(sft(lora_model(), tmp_path, words(), **settings))
    got, patch = patched_history(lora_model(), tmp_path, "patch", safety, words(), **settings)
    if safety is None:
        assert_same_logs(got, want)
    else:  # the adapter begins at nothing, so the first penalty is nothing too
        assert got[0]["loss"] == pytest.approx(want[0]["loss"], rel=2e-5)
        assert patch.last_parts.penalty > 0


@pytest.mark.parametrize("first", ["patch", "trainer"])
def test_weighted_losses_are_refused(first, tmp_path):
    """``dft`` would weigh the penalty by the label's probability."""
    with pytest.raises(ValueError, match=r"exp was asked.*loss_type must be 'nll'"):
        patched_history(lora_model(), tmp_path, first, SAFETY, loss_type="dft")


def test_label_smoothing_is_said(tmp_path):
    """TRL smooths the real logits itself, without labels: the constraint has no part, said."""
    settings = {"label_smoothing_factor": 0.1}
    want = history(sft(lora_model(), tmp_path, **settings))
    with pytest.warns(UserWarning, match="takes no part in a loss.*without labels"):
        got, _ = patched_history(lora_model(), tmp_path, "patch", SAFETY, **settings)
    for a, b in zip(got, want, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-5)
        assert a["entropy"] == pytest.approx(b["entropy"], rel=2e-5)


@pytest.mark.parametrize("first", ["patch", "trainer"])
def test_evaluation(first, tmp_path):
    """``evaluate`` alone, before any step: TRL's numbers; with ``compute_metrics`` too."""
    data = Dataset.from_list(rows(4))
    want = sft(lora_model(), tmp_path).evaluate(data)
    model = lora_model()
    patch = patch_model(model) if first == "patch" else None
    trainer = sft(model, tmp_path)
    patch = patch or patch_model(model)
    got = trainer.evaluate(data)
    assert patch.last_parts is not None
    for name in ("eval_loss", "eval_entropy", "eval_mean_token_accuracy"):
        assert got[name] == pytest.approx(want[name], rel=2e-5)
    trainer.compute_metrics = lambda seen: {"mean": float(seen.predictions.mean())}
    assert torch.isfinite(torch.tensor(trainer.evaluate(data)["eval_mean"]))


def test_a_loop_without_train(tmp_path):
    """A call that the patch could not get in front of is refused, and says what is missing."""
    model = lora_model()
    patch_model(model, SAFETY)
    trainer = sft(model, tmp_path)
    inputs = {name: torch.tensor([row[name] for row in rows(2)]) for name in rows(1)[0]}
    model.training = True
    model.get_base_model().training = True
    with pytest.raises(ValueError, match=r"call model\.train\(\) after"):
        trainer.compute_loss(model, dict(inputs))
    model.train()
    assert trainer.compute_loss(model, dict(inputs)).isfinite()


def test_a_copy_answers_for_itself(tmp_path):
    """``copy.deepcopy`` of a trained model: its own patch, its own forward."""
    model = lora_model()
    patch_model(model, SAFETY)
    sft(model, tmp_path).train()
    copied = copy.deepcopy(model)
    front, train = (copied.get_base_model().__dict__[name] for name in ("forward", "train"))
    assert front.model is copied.get_base_model() is train.__self__
    assert find_patch(copied) is not find_patch(model)


def test_without_trl_no_method_is_replaced(monkeypatch):
    """``model.train`` is left alone in a process that has not imported TRL."""
    monkeypatch.delitem(sys.modules, "trl")
    model = build()
    with patch_model(model):
        assert "train" not in model.__dict__


def test_preferences_are_refused_by_name(tmp_path):
    """DPO has no cross-entropy to hold: an error with a constraint, its own way without."""
    data = Dataset.from_dict({"prompt": ["a b"] * 4, "chosen": ["c d"] * 4, "rejected": ["e"] * 4})
    arguments = trl.DPOConfig(
        output_dir=str(tmp_path), max_steps=1, report_to=[], save_strategy="no", use_cpu=True,
        bf16=False, per_device_train_batch_size=2,
    )  # fmt: skip
    for safety in (None, SAFETY):
        model = lora_model()
        patch_model(model, safety)
        trainer = trl.DPOTrainer(
            model=model, args=arguments, train_dataset=data, processing_class=word_tokenizer()
        )
        if safety is None:
            with pytest.warns(UserWarning, match="computes its loss past it"):
                trainer.train()
        else:
            with pytest.raises(ValueError, match="DPO, GRPO and KTO"):
                trainer.train()


def test_evaluations_tell_the_terms_apart(tmp_path):
    """Cross-entropy and penalty make up SFTTrainer's evaluation loss; the first is the loss that it
    computes without the patch.
    """
    model = lora_model()
    with patch_model(model, SAFETY):  # a trainer made now logs by itself
        trainer = sft(model, tmp_path, per_device_eval_batch_size=2)
        trainer.train()
        found = trainer.evaluate()
    terms = found["eval_cross_entropy"], found["eval_safety_penalty"]
    assert terms[1] > 1e-4
    assert sum(terms) == pytest.approx(found["eval_loss"], rel=1e-5)
    assert terms[0] == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-5)
    assert trainer.state.log_history[-2]["eval_cross_entropy"] == terms[0]
