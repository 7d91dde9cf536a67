"""More ways to train: evaluation alone, compiled, resumed, Accelerate's loop and one's own."""

from __future__ import annotations

import json

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.utils.data import DataLoader

from str_kernels.huggingface import SafetyLogCallback, patch_model
from tests.huggingface.models import relative
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


def both(work, safety=None):
    """The same work on an unpatched and on a patched model."""
    unpatched = work(lora_model())
    model = lora_model()
    with patch_model(model, safety) as patch:
        return unpatched, work(model), patch


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        pytest.param(
            {"torch_compile": True, "torch_compile_backend": "eager", "max_steps": 2},
            marks=pytest.mark.slow,  # dynamo; test_patch.py has a compiled model without a trainer
        ),
        {"eval_strategy": "steps", "eval_steps": 2},
    ],
    ids=["reentrant", "not reentrant", "compiled", "evaluating"],
)
def test_trainer(settings, tmp_path):
    """Losses and gradient norms of the unpatched run, through the fused loss."""

    def work(model):
        model.enable_input_require_grads()
        return run(model, tmp_path, **settings)

    want, got, patch = both(work)
    assert_equal_runs(got, want)
    assert patch.last_parts is not None


def test_prediction_loss_only(tmp_path):
    """``evaluate`` and ``predict`` without logits: the loss, and nothing is built."""

    def work(model):
        trainer = trainer_for(model, tmp_path, prediction_loss_only=True)
        return trainer.evaluate()["eval_loss"], trainer.predict(rows(4)).metrics["test_loss"]

    with torch.no_grad():
        want, got, patch = both(work)
    assert got == pytest.approx(want, rel=1e-6)
    assert not patch.notices._given


def test_resuming(tmp_path):
    """Stopped after two steps and resumed, the constraint included: the steps of one long run."""
    whole, first, rest = Losses(), Losses(), Losses()
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    patches = []
    for folder, seen, steps, resume in (
        ("whole", whole, 4, False),
        ("parts", first, 2, False),
        ("parts", rest, 4, True),
    ):
        model = lora_model()
        patches.append(patch_model(model, SAFETY))
        arguments = {**settings, "max_steps": steps}
        trainer = trainer_for(model, tmp_path / folder, callbacks=[seen], **arguments)
        trainer.train(resume_from_checkpoint=resume)
    logs = [[log for log in seen.logs if "loss" in log] for seen in (whole, first, rest)]
    assert_equal_runs(logs[1] + logs[2], logs[0])
    assert all(patch.last_parts.penalty > 0 for patch in patches)


@pytest.mark.parametrize("restore", [False, True])
def test_a_checkpoint_of_the_version_before(restore, tmp_path):
    """It holds a state of the callback, for a strength that was removed: nobody reads it."""
    settings = {"save_strategy": "steps", "save_steps": 2, "callbacks": [SafetyLogCallback()]}
    settings["restore_callback_states_from_checkpoint"] = restore
    model = lora_model()
    with patch_model(model, SAFETY):
        trainer_for(model, tmp_path, max_steps=2, **settings).train()
    path = tmp_path / "checkpoint-2" / "trainer_state.json"
    state = json.loads(path.read_text())
    saved = {"args": {}, "attributes": {"saved": {"state": [0.0, 1.0, 0.0, 0.0]}}}
    state["stateful_callbacks"]["SafetyLogCallback"] = saved
    path.write_text(json.dumps(state))
    model, settings["callbacks"] = lora_model(), [SafetyLogCallback()]
    with patch_model(model, SAFETY):
        trainer = trainer_for(model, tmp_path, max_steps=3, **settings)
        trainer.train(resume_from_checkpoint=True)
    assert trainer.state.log_history[-2]["safety_drift"] > 0


@pytest.fixture
def accelerator():
    """Accumulates over two batches; its state is global, so it is forgotten before and after."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(cpu=True, gradient_accumulation_steps=2)
    AcceleratorState._reset_state(reset_partial_state=True)


def collate(examples: list[dict]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor([e[name] for e in examples]) for name in examples[0]}


def test_accelerate(accelerator):
    """Accelerate's loop: its prepared model trains as without the patch."""

    def work(model):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
        data = DataLoader(rows(16), batch_size=4, collate_fn=collate)
        model, optimizer, data = accelerator.prepare(model, optimizer, data)
        losses = []
        for inputs in data:
            with accelerator.accumulate(model):
                loss = model(**inputs).loss
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    want, got, patch = both(work)
    assert got == pytest.approx(want, rel=2e-5)
    assert patch.last_parts is not None


@pytest.mark.parametrize("fused", [False, True], ids=["", "fused optimizer"])
def test_plain_pytorch(fused):
    """One's own loop, with a loss of one's own beside the model's."""

    def work(model):
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer, losses = torch.optim.AdamW(trained, 1e-2, fused=fused), []
        for inputs in DataLoader(rows(16), batch_size=4, collate_fn=collate):
            loss = model(**inputs).loss + 1e-3 * sum(p.square().sum() for p in trained)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        return torch.stack(losses)

    want, got, _ = both(work)
    assert relative(got, want) < 2e-5
