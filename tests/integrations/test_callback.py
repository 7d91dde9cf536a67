"""PatchCallback: any trainer with callbacks trains patched, as LLaMA-Factory's ``run_exp``."""

from __future__ import annotations

import json

import pytest

from str_kernels.huggingface import patch_model
from str_kernels.huggingface.patch.install import find_patch
from str_kernels.integrations import PatchCallback
from str_kernels.safety.tokens import SafetyTokens
from tests.huggingface.models import build
from tests.huggingface.trainers import lora_model
from tests.integrations.programs import llama_factory, logs_of, trainer_of
from tests.tiny import word_tokenizer


@pytest.mark.parametrize("settings", [{}, {"bf16": True}], ids=str)
def test_it_trains_as_if_patched_by_hand(tokens, settings, tmp_path):
    """Losses of a model that was patched before the trainer; afterwards nothing of it is left."""
    model = lora_model()
    safety = SafetyTokens.load(tokens).constraint(3.0)
    with patch_model(model, safety):
        want = logs_of(llama_factory([], tmp_path, model=model, **settings))
    callback = PatchCallback(tokens=tokens, strength=3.0)
    trainer = llama_factory([callback], tmp_path, **settings)
    got = logs_of(trainer)
    rounding = 2**-7 if settings else 1e-6
    assert [a["loss"] for a in got] == pytest.approx([b["loss"] for b in want], rel=rounding)
    assert got[1]["safety_penalty"] > 0
    assert find_patch(trainer.model) is None


def test_a_full_model_in_bfloat16(tmp_path):
    """The trainer has wrapped the forward by then: patched over that, and unwrapped to it."""
    trainer = llama_factory([PatchCallback()], tmp_path, model=build(), bf16=True)
    assert logs_of(trainer)[1]["cross_entropy"] > 0
    assert find_patch(trainer.model) is None
    assert trainer.evaluate(trainer.train_dataset)["eval_loss"] > 0


def test_again_after_an_error(tokens, tmp_path):
    """A training that stopped leaves its patch; the next one begins with a new one."""

    class Stop(Exception):
        pass

    class Stopping(PatchCallback):
        def on_step_begin(self, *args, **kwargs):
            raise Stop

    model, callback = lora_model(), Stopping(tokens=tokens)
    with pytest.raises(Stop):
        llama_factory([callback], tmp_path, model=model)
    first = find_patch(model)
    assert first is not None
    with pytest.raises(Stop):
        llama_factory([callback], tmp_path, model=model)
    assert find_patch(model) not in (None, first)


def test_a_checkpoint_can_make_it_again(tokens, tmp_path):
    """The trainer saves what the callback was made of, and makes it anew on resuming."""
    callback = PatchCallback(tokens=tokens, strength=3.0)
    trainer = llama_factory([callback], tmp_path, save_strategy="steps", save_steps=1)
    path = tmp_path / "checkpoint-1" / "trainer_state.json"
    saved = json.loads(path.read_text())["stateful_callbacks"]["PatchCallback"]
    saved = saved[0] if isinstance(saved, list) else saved
    assert saved["patch"]["meter"].keys() == {"sums", "drift"}
    again = PatchCallback.from_state(saved)
    assert again.state()["args"] == callback.state()["args"]
    resumed = trainer_of(lora_model(), tmp_path)
    resumed.add_callback(PatchCallback(tokens=tokens, strength=3.0))
    resumed.train(resume_from_checkpoint=str(path.parent))
    want = logs_of(trainer)[1]["loss"]
    assert logs_of(resumed)[1]["loss"] == pytest.approx(want, rel=1e-4)


def test_wrong_settings(tokens, tmp_path):
    """What can be known at once is refused at once; another tokenizer when training begins."""
    with pytest.raises(ValueError, match=r"str_kernels\.strenght"):
        PatchCallback(strenght=1.0)
    with pytest.raises(ValueError, match=r"str_kernels\.drift_budget was removed in 0\.2"):
        PatchCallback(tokens=tokens, drift_budget=0.3)
    with pytest.raises(ValueError, match=r"strength='auto' was removed in 0\.2"):
        PatchCallback(tokens=tokens, strength="auto")
    with pytest.raises(ValueError, match=r"missing\.json"):
        PatchCallback(tokens=str(tmp_path / "missing.json"))
    trainer = trainer_of(lora_model(), tmp_path)
    trainer.processing_class = word_tokenizer(["other", "words"])
    trainer.callback_handler.processing_class = trainer.processing_class
    trainer.add_callback(PatchCallback(tokens=tokens))
    with pytest.raises(ValueError, match="tokenizer"):
        trainer.train()
    assert find_patch(trainer.model) is None
