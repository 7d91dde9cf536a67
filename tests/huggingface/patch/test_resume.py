"""A resumed run ends in the uninterrupted run's adapter, bit for bit, whatever was learned."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback, set_seed

from str_kernels import SafetyConstraint, VocabularyIndex
from str_kernels.huggingface import SafetyLogCallback, patch_model
from str_kernels.huggingface.patch.learned import decode_order, encode_order
from tests.huggingface.patch.test_filtering import VOCAB, batch, model_of, used_index
from tests.huggingface.trainers import trainer_for

STEPS = 6
# what a run learns: its index is used, dropped for a flat softmax, or left for the exact pass
LEARNED = ["kept", "dropped", "fallen back", "no index"]


class Killed(TrainerCallback):
    """Ends a run in the middle of a step, as an exception or as SIGKILL does."""

    def __init__(self, at: int, how: str) -> None:
        self.at, self.how = at, how

    def on_substep_end(self, args, state, control, **kwargs):
        if state.global_step == self.at:
            if self.how == "SIGKILL":
                os.kill(os.getpid(), 9)
            raise KeyboardInterrupt


def run(
    kind: str, folder: Path, killed: Killed | None = None, resume: int | None = None, **settings
):
    """Train a new model, perhaps up to a kill or from a checkpoint: its adapter, patch and logs."""
    set_seed(5)
    model = model_of(lora=True)
    head = model.base_model.model.lm_head.weight
    options = {}
    with torch.no_grad():
        if kind == "dropped":
            head.mul_(0.05)
    if kind == "fallen back":
        index = VocabularyIndex.build(head)
        index = replace(index, mean_rows=index.mean_rows.flip(0) + 500.0)
        options = {"index": index, "check_accuracy_every": 1}
    elif kind == "no index":
        options = {"index": None}
    rows = torch.randint(0, VOCAB, (12, 8), generator=torch.Generator().manual_seed(4)).tolist()
    with patch_model(model, SafetyConstraint([1, 2], 1.0), verify=False, **options) as patch:
        trainer = trainer_for(
            model,
            folder,
            callbacks=[SafetyLogCallback(patch), *([killed] if killed else [])],
            dataset=[{"input_ids": row, "labels": row} for row in rows],
            max_steps=STEPS,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            lr_scheduler_type="linear",
            logging_steps=4,
            save_strategy="steps",
            save_steps=1,
            disable_tqdm=True,
            **settings,
        )
        path = None if resume is None else str(folder / f"checkpoint-{resume}")
        try:
            trainer.train(resume_from_checkpoint=path)
        except KeyboardInterrupt:
            assert killed is not None
        index = used_index(patch)
    adapter = {n: x.detach().clone() for n, x in model.named_parameters() if x.requires_grad}
    return adapter, index, patch, trainer.state.log_history


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(x, b[name]) for name, x in a.items())


@pytest.mark.filterwarnings("ignore:The filtered loss")
@pytest.mark.parametrize(
    "kind",
    ["kept", *(pytest.param(kind, marks=pytest.mark.slow) for kind in LEARNED if kind != "kept")],
)
def test_killed_and_resumed_is_uninterrupted(kind, tmp_path):
    """The same bits in the adapter, the same index, options and averages in the logs."""
    want, index, patch, logs = run(kind, tmp_path / "whole")
    assert (index is None) == (kind in ("dropped", "no index"))
    assert (patch.options.filter_eps == 0.0) == (kind == "fallen back")
    run(kind, tmp_path / "parts", killed=Killed(3, "exception"))
    got, same, resumed, again = run(kind, tmp_path / "parts", resume=3)
    assert equal(got, want)
    assert resumed.options == patch.options
    assert resumed.guard.state_dict() == patch.guard.state_dict()
    assert index is None or equal(same._tensors(), index._tensors())
    for ours, theirs in zip(logs[:1], again[:1], strict=True):
        for name in ("cross_entropy", "safety_penalty", "token_accuracy", "dead_mass"):
            assert ours[name] == theirs[name], name


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The filtered loss")
@pytest.mark.parametrize("kind", LEARNED)
def test_sigkill(kind, tmp_path):
    """The same, in a process that SIGKILL ends, and on from the checkpoint in this one."""
    script = (
        "import sys, pathlib\n"
        "from tests.huggingface.patch import test_resume as t\n"
        "t.run(sys.argv[1], pathlib.Path(sys.argv[2]), killed=t.Killed(3, 'SIGKILL'))"
    )
    command = [sys.executable, "-c", script, kind, str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    assert subprocess.run(command, env=environment, capture_output=True).returncode == -9
    assert equal(run(kind, tmp_path, resume=3)[0], run(kind, tmp_path / "whole")[0])


def losses(patch, model, count: int) -> list[torch.Tensor]:
    found = []
    for _ in range(count):
        loss = model(**batch()).loss
        loss.backward()
        found.append(loss.detach())
    return found


def test_a_loop_of_ones_own():
    """``state_dict`` is plain JSON; a new patch that loads it evaluates with the old one's index
    before it has trained, and its own state is the same.
    """
    model = model_of()
    with patch_model(model) as patch:
        losses(patch, model, 2)
        state = json.loads(json.dumps(patch.state_dict()))
        index = used_index(patch)
        with torch.no_grad():
            want = model.eval()(**batch()).loss
    model = model_of()
    with patch_model(model) as patch:
        patch.load_state_dict(state)
        assert patch.state_dict() == state
        with torch.no_grad():
            assert torch.equal(model.eval()(**batch()).loss, want)
        assert torch.equal(used_index(patch).mean_rows, index.mean_rows)
        assert patch.state_dict() == state


def test_another_head_gets_an_index_of_its_own(caplog):
    """A checkpoint's index is not used for another weight: built anew, and said."""
    model = model_of()
    with patch_model(model) as patch:
        losses(patch, model, 1)
        state = patch.state_dict()
    model = model_of()
    with torch.no_grad():
        model.base_model.model.lm_head.weight.mul_(1.5)
    with patch_model(model) as patch, caplog.at_level(logging.WARNING):
        patch.load_state_dict(state)
        losses(patch, model, 1)
        index, head = used_index(patch), model.base_model.model.lm_head.weight
    assert "was made for another weight" in caplog.text
    assert torch.equal(index.mean_rows, VocabularyIndex.of_order(head, index.order).mean_rows)


@pytest.mark.parametrize("now", [None, "given"])
def test_another_choice_of_index_is_said(now, caplog):
    """The user's argument wins over the checkpoint's automatic index."""
    model = model_of()
    with patch_model(model) as patch:
        losses(patch, model, 1)
        state = patch.state_dict()
    now = VocabularyIndex.build(model.base_model.model.lm_head.weight) if now else None
    with patch_model(model, index=now) as patch, caplog.at_level(logging.WARNING):
        patch.load_state_dict(state)
        assert used_index(patch) is now
    assert "index is not what it was" in caplog.text


def test_a_checkpoint_without_a_state_is_resumed(tmp_path):
    """Checkpoints of version 0.1 have none; the run goes on, and its next checkpoint has one."""
    run("kept", tmp_path, killed=Killed(3, "exception"))
    path = tmp_path / "checkpoint-3" / "trainer_state.json"
    state = json.loads(path.read_text())
    del state["stateful_callbacks"]["SafetyLogCallback"]
    path.write_text(json.dumps(state))
    run("kept", tmp_path, resume=3)
    state = json.loads((tmp_path / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["SafetyLogCallback"]["patch"]["index"]["order"]


def test_orders_as_text():
    """Any order comes back; a damaged text and one of another length are named."""
    order = torch.randperm(5000)
    text = encode_order(order)
    assert torch.equal(decode_order(text, 5000), order)
    with pytest.raises(ValueError, match="has not 4999 rows"):
        decode_order(text, 4999)
    for damaged in (text[:-8], text[:40], "!" + text, ""):
        with pytest.raises(ValueError, match="order of the vocabulary index"):
            decode_order(damaged, 5000)
    with pytest.raises(ValueError, match="no permutation"):
        VocabularyIndex.of_order(torch.zeros(8, 2), torch.zeros(8, dtype=torch.int64))


def test_a_foreign_state_is_refused():
    """What is no state of a patch is named, and so is a damaged one."""
    with patch_model(model_of(), verify=False) as patch:
        good = patch.state_dict()
        for wrong in ({}, {"schema": "str_kernels.patch/9"}, None):
            with pytest.raises(ValueError, match="schema="):
                patch.load_state_dict(wrong)
        for name in good.keys() - {"schema"}:
            for damaged in ({k: x for k, x in good.items() if k != name}, good | {name: 7}):
                if name == "first_penalty_judged" and name in damaged:
                    continue
                if name == "sharing" and name not in damaged:  # as in earlier checkpoints
                    patch.load_state_dict(damaged)
                    continue
                with pytest.raises(ValueError, match="state of a patch: is damaged"):
                    patch.load_state_dict(damaged)
        patch.load_state_dict(good)


@pytest.mark.filterwarnings("ignore:The filtered loss")
def test_back_to_an_earlier_state():
    """A patch that has learned more since goes on from an earlier checkpoint as it did then."""
    model = model_of()
    head = model.base_model.model.lm_head.weight
    index = VocabularyIndex.build(head)
    broken = replace(index, mean_rows=index.mean_rows.flip(0) + 500.0)
    for given in ("auto", broken):
        with patch_model(model, index=given, check_accuracy_every=1) as patch:
            early, options = patch.state_dict(), patch.options
            want = losses(patch, model, 3)
            late = patch.state_dict()
            assert (patch.options == options) == (given == "auto")
            patch.load_state_dict(early)
            assert patch.options == options
            assert patch.state_dict() == early
            assert used_index(patch) is (None if given == "auto" else broken)
            assert all(map(torch.equal, losses(patch, model, 3), want))
            assert patch.state_dict() == late


def test_callbacks_that_the_trainer_makes_again(tmp_path):
    """``restore_callback_states_from_checkpoint`` replaces the callback; the state arrives."""
    want, *_ = run("dropped", tmp_path / "whole")
    run("dropped", tmp_path / "parts", killed=Killed(3, "exception"))
    got, *_ = run(
        "dropped", tmp_path / "parts", resume=3, restore_callback_states_from_checkpoint=True
    )
    assert equal(got, want)
