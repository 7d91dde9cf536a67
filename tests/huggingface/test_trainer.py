"""transformers' Trainer on a patched model."""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
import torch
from transformers import Trainer, TrainingArguments

from str_kernels.huggingface import SafetyLogCallback, patch_model
from str_kernels.huggingface.deferred.head import find_patch
from str_kernels.huggingface.patch.callback import PatchLog
from tests.huggingface.models import batch, build
from tests.huggingface.trainers import (
    SAFETY,
    Losses,
    assert_equal_runs,
    lora_model,
    rows,
    run,
    trainer_for,
)

pytestmark = pytest.mark.one_in(2)

LOGGED = {"cross_entropy", "safety_penalty", "safety_drift", "live_share", "token_accuracy"}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
        {"gradient_checkpointing": True},
        {"average_tokens_across_devices": False},
    ],
    ids=str,
)
def test_training_is_the_same(settings, tmp_path):
    """Five steps without a constraint: losses and gradient norms of the unpatched model."""
    want = run(build(), tmp_path, **settings)
    model = build()
    with patch_model(model):
        assert_equal_runs(run(model, tmp_path, **settings), want)


def test_bfloat16_autocast(tmp_path):
    """bf16 mixed precision trains as without the patch, to bf16's rounding."""
    want = run(build(), tmp_path, bf16=True)
    model = build()
    with patch_model(model):
        got = run(model, tmp_path, bf16=True)
    for a, b in zip(got, want, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2**-7)


def test_constraint_lowers_drift(tmp_path):
    """Trained with the constraint, the safety logits stay nearer to the aligned model's."""
    drift = {}
    for strength in (0.0, 2.0):
        model, inputs = lora_model(), batch(rows=8, seed=3)
        with patch_model(model, replace(SAFETY, strength=strength)):
            run(model, tmp_path, max_steps=15)
        model.eval()
        with torch.no_grad():
            logits = model(**inputs).logits[..., SAFETY.token_ids]
            with model.disable_adapter():
                aligned = model(**inputs).logits[..., SAFETY.token_ids]
        drift[strength] = (logits - aligned)[inputs["attention_mask"] == 1].square().mean().item()
    assert drift[2.0] < 0.5 * drift[0.0], drift


def test_callback_logs_both_terms(tmp_path):
    """``cross_entropy + safety_penalty`` is the loss of a step and all its micro-batches."""
    model, seen = lora_model(), Losses()
    patch = patch_model(model, SAFETY)
    trainer = trainer_for(
        model,
        tmp_path,
        callbacks=[SafetyLogCallback(patch), seen],
        gradient_accumulation_steps=2,
        per_device_train_batch_size=2,
        logging_steps=1,
        max_steps=4,
    )
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == 4
    for log in logs:
        assert log["cross_entropy"] + log["safety_penalty"] == pytest.approx(log["loss"], rel=1e-3)
        assert 0 <= log["token_accuracy"] <= 1
        # the weights sum to the labels, and mse without token weights is the drift
        drift = log["safety_penalty"] / SAFETY.strength
        assert log["safety_drift"] == pytest.approx(drift**0.5, rel=1e-4)
    assert logs[-1]["safety_penalty"] > 0
    assert [log["loss"] for log in seen.logs if "loss" in log] == [log["loss"] for log in logs]


def test_compute_metrics_sees_real_logits(tmp_path):
    """Evaluation with metrics: the same numbers as unpatched."""

    def metrics(prediction):
        return {"mean": float(prediction.predictions.mean())}

    model, seen = build(), []
    for patched in (False, True):
        patch = patch_model(model) if patched else None
        trainer = trainer_for(model, tmp_path, per_device_eval_batch_size=2)
        trainer.compute_metrics = metrics
        seen.append(trainer.evaluate())
        if patch is not None:
            patch.unpatch()
    assert seen[1]["eval_mean"] == seen[0]["eval_mean"]
    assert seen[1]["eval_loss"] == pytest.approx(seen[0]["eval_loss"], rel=1e-6)


def test_label_smoothing_of_the_trainer(tmp_path):
    """The trainer keeps the labels to itself: real logits, the same training, said once."""
    want = run(build(), tmp_path, label_smoothing_factor=0.1)
    model = lora_model()
    with (
        patch_model(model, SAFETY),
        pytest.warns(UserWarning, match="takes no part in a loss.*without labels"),
    ):
        run(model, tmp_path, label_smoothing_factor=0.1, max_steps=1)
    model = build()
    with patch_model(model):
        assert_equal_runs(run(model, tmp_path, label_smoothing_factor=0.1), want)


def test_accumulation_equals_one_batch(tmp_path):
    """1 × 8 rows = 2 × 4 rows = 8 × 1 row, the constraint included."""
    runs = []
    for rows_, steps in ((8, 1), (4, 2), (1, 8)):
        model = lora_model()
        with patch_model(model, SAFETY):
            settings = {"per_device_train_batch_size": rows_, "gradient_accumulation_steps": steps}
            runs.append(run(model, tmp_path, max_steps=3, **settings))
    assert_equal_runs(runs[1], runs[0])
    assert_equal_runs(runs[2], runs[0])


def test_peft_training_with_bfloat16_and_checkpointing(tmp_path):
    """The usual set-up, all at once: a weightless constraint changes nothing, a real one counts."""
    # transformers 4 checkpoints reentrantly unless told otherwise, and LoRA learns nothing then
    checkpointing = {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
    }
    settings = {"bf16": True, "gradient_accumulation_steps": 2, **checkpointing}
    want = run(lora_model(), tmp_path, **settings)
    for strength in (0.0, 2.0):
        model = lora_model()
        patch = patch_model(model, replace(SAFETY, strength=strength))
        got = run(model, tmp_path, **settings)
        assert (patch.last_parts.penalty > 0) == (strength > 0)
        if not strength:
            for a, b in zip(got, want, strict=True):
                assert a["loss"] == pytest.approx(b["loss"], rel=2**-7)


def test_a_trainer_logs_without_asking(tmp_path):
    """Made after the patch, before all callbacks that report; an unpatched model's stays silent."""
    from transformers.trainer import DEFAULT_CALLBACKS

    gc.collect()  # patches of other tests
    before, model, seen = list(DEFAULT_CALLBACKS), lora_model(), Losses()
    other = build()
    with patch_model(model, SAFETY):
        trainer = trainer_for(model, tmp_path, callbacks=[seen], max_steps=2, logging_steps=1)
        plain = trainer_for(
            other, tmp_path / "plain", max_steps=2, logging_steps=1, save_strategy="steps"
        )
        trainer.train()
        plain.train()
    first, second = [log for log in seen.logs if "loss" in log]
    assert first.keys() >= LOGGED
    assert first["safety_drift"] == 0 < second["safety_drift"]
    assert not [log for log in plain.state.log_history if LOGGED & log.keys()]
    assert before == DEFAULT_CALLBACKS


def test_a_search_has_a_patch_for_each_model(tmp_path):
    """``model_init`` makes and patches a model for each run; the log is that of the model."""

    def make():
        model = lora_model()
        patch_model(model, SAFETY, verify=False)
        return model

    arguments = TrainingArguments(
        str(tmp_path), max_steps=1, logging_steps=1, report_to=[], use_cpu=True, save_strategy="no"
    )
    trainer = Trainer(model_init=make, args=arguments, train_dataset=rows())
    for _ in range(2):
        trainer.train()
        assert "safety_penalty" in trainer.state.log_history[0]
        (log,) = (c for c in trainer.callback_handler.callbacks if isinstance(c, PatchLog))
        assert log._patch is find_patch(trainer.model)
