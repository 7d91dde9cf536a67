"""What the package reads, each with the files that can be damaged and the reader of all of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import torch

from str_kernels import SafetyTokens, VocabularyIndex, linear_cross_entropy
from str_kernels.evaluation.answers import AnswerFile
from str_kernels.huggingface.constraint.references import ReferenceCache, save_reference_cache
from str_kernels.huggingface.constraint.sequences import content_key
from str_kernels.inputs.data import read_jsonl
from str_kernels.inputs.loading import load_model_and_tokenizer, load_tokenizer
from str_kernels.training.checks import prepare
from str_kernels.training.run import train
from str_kernels.training.settings import TrainSettings

ROWS = [
    {"prompt": "tell me the topic of rain", "response": "weather ."},
    {"messages": [{"role": "user", "content": "tell me the topic of ball"},
                  {"role": "assistant", "content": "sport ."}]},
]  # fmt: skip
TOKENS = (5, 9, 11)
QUICK = {"steps": 4, "batch": 2, "rank": 2, "max_length": 64, "save_steps": 2, "top_k": 4}


@dataclass(frozen=True)
class Target:
    """Files below the folder that `make` fills, and who reads them."""

    files: tuple[str, ...]
    read: Callable[[Path], object]


def make(folder: Path, model: Path) -> Path:
    """Fill a folder with one valid file of each kind."""
    shutil.copytree(model, folder / "model")
    text = "".join(json.dumps(row) + "\n" for row in ROWS * 3)
    (folder / "data.jsonl").write_text(text)
    tokenizer = load_tokenizer(folder / "model")
    SafetyTokens.from_strings(tokenizer, ["sorry", "cannot", "unable"]).save(folder / "tokens.json")
    weight, states = _head()
    VocabularyIndex.build(weight, states).save(folder / "index.safetensors")
    with redirect_stderr(StringIO()), redirect_stdout(StringIO()):
        train(prepare(_settings(folder, "run", reference="cache", tokens=_tokens_file(folder))))
    _copy_references(folder)
    shutil.rmtree(folder / "run" / "checkpoint-4")
    answers = AnswerFile(folder / "answers.jsonl", {})
    for number in range(4):
        answers.add([number], f"tell {number}", "no")
    answers.close()
    return folder


def _settings(folder: Path, out: str, **more: object) -> TrainSettings:
    model, data = str(folder / "model"), str(folder / "data.jsonl")
    return TrainSettings(model=model, data=data, out=str(folder / out), **QUICK, **more)


def _tokens_file(folder: Path) -> str:
    return str(folder / "tokens.json")


def _head() -> tuple[torch.Tensor, torch.Tensor]:
    source = torch.Generator().manual_seed(0)
    return torch.randn(500, 16, generator=source), torch.randn(64, 16, generator=source)


def _prepare(folder: Path) -> object:
    return prepare(_settings(folder, "new"))


def _prepare_tokens(folder: Path) -> object:
    return prepare(_settings(folder, "new", tokens=_tokens_file(folder)))


def _resume(folder: Path) -> object:
    settings = _settings(folder, "run", reference="cache", tokens=_tokens_file(folder))
    return train(prepare(settings, resume=True))


def _prompts(folder: Path) -> object:
    return read_jsonl(folder / "data.jsonl", response_required=False)


def _model(folder: Path) -> object:
    return load_model_and_tokenizer(folder / "model", device="cpu")


def _adapter(folder: Path) -> object:
    return load_model_and_tokenizer(folder / "model", adapter=folder / "run", device="cpu")


def _index(folder: Path) -> object:
    weight, states = _head()
    index = VocabularyIndex.load(folder / "index.safetensors")
    labels = torch.zeros(len(states), dtype=torch.long)
    return linear_cross_entropy(states, weight, labels, vocabulary_index=index)


def _copy_references(folder: Path) -> None:
    """Keep what a run has filled in both forms: rows of SQLite, and one file of safetensors."""
    filled = folder / "references.sqlite"
    shutil.copy(folder / "run" / filled.name, filled)
    constraint = SafetyTokens.load(folder / "tokens.json").constraint()
    cache = ReferenceCache(filled, constraint)
    found = {
        content_key(row.input_ids): cache.lookup(torch.tensor([row.input_ids]))[0]
        for row in _rows(folder)
    }
    save_reference_cache(filled.with_suffix(".safetensors"), found, constraint)


def _rows(folder: Path) -> Sequence:
    return prepare(_settings(folder, "new")).data.sequences


def _references(name: str) -> Callable[[Path], object]:
    def look_up(folder: Path) -> object:
        constraint = SafetyTokens.load(folder / "tokens.json").constraint()
        cache = ReferenceCache(folder / name, constraint)
        held = [row.input_ids for row in _rows(folder) if cache.holds(row.input_ids)]
        return [cache.lookup(torch.tensor([ids])) for ids in held]

    return look_up


def _answers(folder: Path) -> object:
    AnswerFile(folder / "answers.jsonl", {}).close()
    return None


CHECKPOINT = "run/checkpoint-2"
TARGETS = {
    "data": Target(("data.jsonl",), _prepare),
    "prompts": Target(("data.jsonl",), _prompts),
    "config": Target(("model/config.json",), _prepare),
    "tokenizer": Target(("model/tokenizer.json", "model/tokenizer_config.json"), _prepare),
    "template": Target(("model/chat_template.jinja",), _prepare),
    "weights": Target(("model/model.safetensors", "model/config.json"), _model),
    "adapter": Target(("run/adapter_config.json", "run/adapter_model.safetensors"), _adapter),
    "tokens": Target(("tokens.json",), _prepare_tokens),
    "index": Target(("index.safetensors",), _index),
    "references": Target(("references.safetensors",), _references("references.safetensors")),
    "filled": Target(("references.sqlite",), _references("references.sqlite")),
    "answers": Target(("answers.jsonl",), _answers),
    "run": Target(
        (
            "run/str_kernels.json",
            "run/safety_tokens.json",
            "run/references.sqlite",
            *(f"{CHECKPOINT}/{name}" for name in (
                "trainer_state.json", "adapter_model.safetensors", "adapter_config.json",
                "optimizer.pt", "scheduler.pt", "rng_state.pth",
            )),
        ),
        _resume,
    ),
}  # fmt: skip
