"""Evaluations of a trainer: cross-entropy and penalty apart, and references of their own rows."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from str_kernels.huggingface import SafetyLogCallback, build_reference_cache, patch_model
from tests.huggingface.dense import dense_loss
from tests.huggingface.models import batch
from tests.huggingface.trainers import SAFETY, lora_model, rows, trainer_for


def by_hand(model, data: list[dict]) -> tuple[float, float]:
    """Both terms of two rows at a time, each pair's mean per token, averaged over the rows."""
    cross_entropy = penalty = 0.0
    model.eval()
    for start in range(0, len(data), 2):
        inputs = {k: torch.tensor([row[k] for row in data[start : start + 2]]) for k in data[0]}
        arguments = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            logits, labels = model(**arguments).logits[:, :-1], inputs["labels"][:, 1:]
            term = F.cross_entropy(logits.flatten(0, 1), labels.flatten()).item()
            penalty += (dense_loss(model, inputs, SAFETY, "all").item() - term) * len(labels)
        cross_entropy += term * len(labels)
    return cross_entropy / len(data), penalty / len(data)


def test_both_terms_are_logged(tmp_path):
    """Of the evaluation's tokens alone, whatever went through the model before; training's logs
    are not touched, and the best model may be chosen by the cross-entropy.
    """
    model, data = lora_model(), rows(5)
    patch = patch_model(model, SAFETY)
    trainer = trainer_for(
        model,
        tmp_path,
        callbacks=[SafetyLogCallback()],
        per_device_eval_batch_size=2,
        eval_strategy="steps",
        eval_steps=2,
        max_steps=4,
        save_strategy="steps",
        save_steps=2,
        metric_for_best_model="eval_cross_entropy",
        greater_is_better=False,
    )
    trainer.eval_dataset = data
    trainer.train()
    model.eval()
    model(**batch(seed=9))
    found = trainer.evaluate()
    history = trainer.state.log_history
    assert len([log for log in history if "loss" in log]) == 4
    assert all("cross_entropy" in log for log in history if "loss" in log)
    evaluations = [log for log in history if "eval_loss" in log]
    assert len(evaluations) == 3
    for log in evaluations:
        terms = log["eval_cross_entropy"] + log["eval_safety_penalty"]
        assert terms == pytest.approx(log["eval_loss"], rel=1e-5)
    # the last two are of the same model
    for name in ("eval_cross_entropy", "eval_safety_penalty", "eval_safety_drift"):
        assert evaluations[-1][name] == pytest.approx(evaluations[-2][name], rel=1e-6)
        assert found[name] == evaluations[-1][name]
    predicted = trainer.predict(data).metrics
    assert predicted["test_cross_entropy"] == pytest.approx(found["eval_cross_entropy"], rel=1e-6)
    best = min(evaluations, key=lambda log: log["eval_cross_entropy"])
    assert trainer.state.best_metric == best["eval_cross_entropy"]
    patch.unpatch()
    want = by_hand(model, data)
    assert want[1] > 0.002
    assert trainer.evaluate()["eval_loss"] == pytest.approx(want[0], rel=1e-5)
    assert (found["eval_cross_entropy"], found["eval_safety_penalty"]) == pytest.approx(
        want, rel=1e-4
    )


def test_several_sets_and_no_constraint(tmp_path):
    """Each set has its own averages; without a constraint the cross-entropy is the loss."""
    model = lora_model()
    sets = {"short": rows(2), "long": rows(5)}
    trainer = trainer_for(
        model, tmp_path, callbacks=[SafetyLogCallback()], per_device_eval_batch_size=2
    )
    unpatched = trainer.evaluate(sets)
    with patch_model(model):
        found = trainer.evaluate(sets)
    for name in sets:
        want = unpatched[f"eval_{name}_loss"]
        assert found[f"eval_{name}_cross_entropy"] == pytest.approx(want, rel=1e-5)
        assert found[f"eval_{name}_safety_penalty"] == 0
        assert f"eval_{name}_safety_drift" not in found
    assert math.isfinite(found["eval_long_token_accuracy"])


def test_an_unpatched_model_is_evaluated_as_ever(tmp_path):
    """The callback adds nothing there."""
    found = trainer_for(lora_model(), tmp_path, callbacks=[SafetyLogCallback()]).evaluate()
    assert "eval_loss" in found
    assert "eval_cross_entropy" not in found


def test_a_cache_without_the_evaluation_s_rows(tmp_path):
    """The error names the evaluation set and what to do; with its rows in the cache it runs."""
    model, path = lora_model(), tmp_path / "references.safetensors"
    held_out = batch(seed=9)
    data = [{name: x[i].tolist() for name, x in held_out.items()} for i in range(3)]
    training = batch(rows=8, seed=3)
    build_reference_cache(model, [training], path, SAFETY)
    trainer = trainer_for(model, tmp_path, callbacks=[SafetyLogCallback()], max_steps=1)
    trainer.eval_dataset = data
    with patch_model(model, SAFETY, reference=path):
        trainer.train()
        with pytest.raises(ValueError, match=r"make it from training and evaluation rows"):
            trainer.evaluate()
        model.train()
        with pytest.raises(ValueError, match="packing, truncation or the data changed"):
            model(**held_out)
    build_reference_cache(model, [training, held_out], path, SAFETY)
    with patch_model(model, SAFETY, reference=path):
        assert trainer.evaluate()["eval_safety_penalty"] > 0


def _averages(rank: int, folder: str) -> None:
    from tests.huggingface.adapters import wrap
    from tests.huggingface.models import build

    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    with patch_model(wrap(build()), SAFETY) as patch:
        patch.model.eval()
        if rank == 0:  # the other process has no batch at all
            patch.model(**batch())
            patch.model(**batch(rows=1, seed=7))
        alone = patch.evaluation_meter
        torch.save(alone.take(torch.device("cpu")), f"{folder}/{rank}")
        assert alone.take(torch.device("cpu")) == {}
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_processes_agree(tmp_path):
    """Every process gets the averages over the tokens of all, so that all choose one best model."""
    from tests.huggingface.adapters import wrap
    from tests.huggingface.models import build

    torch.multiprocessing.spawn(_averages, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / str(rank), weights_only=True) for rank in (0, 1))
    with patch_model(wrap(build()), SAFETY) as patch:
        patch.model.eval()
        patch.model(**batch())
        patch.model(**batch(rows=1, seed=7))
        assert first == second == pytest.approx(patch.evaluation_meter.take(), rel=1e-6)
