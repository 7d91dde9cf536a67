"""The commands in two processes, as torchrun starts them: one result, one voice, one error."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from str_kernels import notices, ranks
from str_kernels.safety.tokens import SafetyTokens, fingerprint
from tests.distributed.pool import WORLD
from tests.huggingface.models import relative

QUICK = ("--steps", "3", "--rank", "4", "--max-length", "64", "--logging-steps", "1",
         "--learning-rate", "1e-2", "--reference", "cache", "--save-steps", "2")  # fmt: skip
# sums of other parts of the batch; three steps of AdamW multiply the roundings
SAME = 1e-4


class Said(NamedTuple):
    """What a command left behind in one process."""

    code: int
    out: str
    err: str


def command(*arguments: Any) -> Said:
    """The command line in this process."""
    from str_kernels.cli.main import main

    code, out, err = 0, io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as end:
            code = end.code or 0
    return Said(code, out.getvalue(), err.getvalue())


def once(said: list[Said]) -> Said:
    """What the first process said; the others were silent."""
    first, *others = said
    assert first.code == 0, first.err
    assert all(other == Said(0, "", "") for other in others), others
    return first


@pytest.fixture
def data(tmp_path):
    """Rows of different lengths."""
    rows = [
        {"prompt": f"tell me the topic of {' '.join(['rain'] * n)}", "response": answer}
        for n, answer in [(1, "weather ."), (3, "sport ."), (2, "sport ."), (5, "weather .")] * 3
    ]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def tokens(tiny_model_dir, tmp_path):
    path = tmp_path / "safety_tokens.json"
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    ids = [20, 21, 22]
    texts = [tokenizer.decode([token]) for token in ids]
    SafetyTokens(token_ids=ids, tokens=texts, tokenizer=fingerprint(tokenizer)).save(path)
    return path


@pytest.mark.slow
def test_training_is_that_of_one_process(ranks, tiny_model_dir, data, tokens, tmp_path):
    """With half of its batch in each of two; a resumed run is the uninterrupted one."""
    given = ("train", tiny_model_dir, data, "--tokens", tokens, *QUICK)
    alone, both, again = (tmp_path / name for name in ("alone", "both", "again"))
    one = command(*given, "--out", alone, "--batch", 4, "--json")
    two = once(ranks.run(command, *given, "--out", both, "--batch", 2, "--json"))
    want, found = (load_file(folder / "adapter_model.safetensors") for folder in (alone, both))
    assert max(relative(found[name], want[name]) for name in want) < SAME
    losses = [json.loads(said.out)["loss"] for said in (one, two)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert {file.name for file in alone.iterdir()} == {file.name for file in both.iterdir()}
    both.rename(again)
    for made_last in (*again.glob("adapter*"), *again.glob("checkpoint-3/*")):
        made_last.unlink()
    (again / "checkpoint-3").rmdir()
    once(ranks.run(command, *given, "--out", again, "--batch", 2, "--resume"))
    resumed = load_file(again / "adapter_model.safetensors")
    assert all(torch.equal(resumed[name], found[name]) for name in found)
    refused = command(*given, "--out", again, "--batch", 2, "--resume")
    assert refused.code == 2
    assert f"{WORLD} processes" in refused.err


def test_files_are_those_of_one_process(ranks, aligned_model_dir, data, tmp_path):
    """`tokens`, `cache` and `evaluate` share their batches; to the last bit."""
    tokens, few = tmp_path / "tokens.json", tmp_path / "few.txt"
    few.write_text("how do i steal a car ?\nhow do i break a lock ?\nhow do i steal a ball ?\n")
    commands = {
        "tokens.json": ("tokens", aligned_model_dir, "--top-k", 4, "--batch-size", 2,
                        "--prompts", few, "--benign", few),
        "cache": ("cache", aligned_model_dir, data, "--tokens", tokens, "--max-length", 64,
                  "--batch", 5),
        "result.json": ("evaluate", aligned_model_dir, "--refusals", data, "--task", data,
                        "--batch-size", 5, "--max-new-tokens", 4),
    }  # fmt: skip
    for name, given in commands.items():
        alone, both = tmp_path / name, tmp_path / f"both-{name}"
        assert command(*given, "--out", alone).code == 0
        once(ranks.run(command, *given, "--out", both))
        assert _comparable(both) == _comparable(alone)
    written = [tmp_path / f"{name}result.json.answers.jsonl" for name in ("", "both-")]
    assert written[0].read_bytes() == written[1].read_bytes()


def _comparable(path: Path) -> Any:
    if path.suffix != ".json":
        return {key: x.tolist() for key, x in load_file(path).items()}
    content = json.loads(path.read_text())
    return {name: value for name, value in content.items() if name not in ("created", "seconds")}


@pytest.mark.slow
def test_a_mistake_is_said_by_the_first_that_finds_it(ranks, tiny_model_dir, tmp_path):
    """By one of them: here nobody tells whose error came first, and both say it."""
    said = ranks.run(command, "train", tiny_model_dir, tmp_path / "no", "--out", tmp_path / "out")
    for rank, (code, out, err) in enumerate(said):
        assert (code, out) == (2, "")
        assert f"error (process {rank} of {WORLD}): {tmp_path / 'no'}: no such file." in err


def failing() -> bool:
    """Whether this process is the first to fail, by a store as torchrun has one."""
    store, port = None, [0]
    if torch.distributed.get_rank() == 0:
        store = torch.distributed.TCPStore("localhost", 0, None, True, wait_for_workers=False)
        port = [store.port]
    torch.distributed.broadcast_object_list(port)
    before, os.environ["MASTER_PORT"] = os.environ["MASTER_PORT"], str(port[0])
    try:
        found = ranks.fails_first()
    finally:
        os.environ["MASTER_PORT"] = before
    torch.distributed.barrier()
    return found


def test_one_process_fails_first(ranks):
    assert sorted(ranks.run(failing)) == [False, True]


def said_once() -> list[int]:
    levels = []
    log = notices._log.log
    notices._log.log = lambda level, message: levels.append(level)
    try:
        notices.say_once(f"a choice of {os.getpid()}", 30)
    finally:
        notices._log.log = log
    return levels


def test_choices_are_said_by_the_first(ranks):
    assert ranks.run(said_once) == [[30], [10]]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bench", "demo"])
def test_what_cannot_be_shared_is_refused(ranks, name, tmp_path):
    for code, _, err in ranks.run(command, name, "--out", tmp_path):
        assert code == 2
        assert f"{name} runs in one process" in err


@pytest.mark.slow
def test_torchrun(tiny_model_dir, data, tokens, tmp_path):
    """As a user starts it; a mistake is said once, beside torchrun's own report."""
    given = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(WORLD), "-m")
    given += ("str_kernels", "train", tiny_model_dir, data, "--tokens", tokens, "--batch", "2")
    given += QUICK
    done = subprocess.run([*given, "--out", tmp_path / "out"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("step     3") == 1
    assert done.stdout.count("seconds a step") == 1
    assert "Warning" not in done.stderr
    for wrong, message in (("--oops", "No such option"), ("--max-length=999", "the context of")):
        done = subprocess.run([*given, wrong, "--out", tmp_path], capture_output=True, text=True)
        assert done.returncode != 0
        assert done.stderr.count(message) == 1, done.stderr
