import itertools
import json

import pytest

from tests.tiny import ANSWER, REFUSAL, save_tiny_model

NUMBERS = [" ".join(n) for n in itertools.product(("one", "two", "three", "four"), repeat=5)]


def write_rows(path, prompts, responses):
    rows = zip(prompts, itertools.cycle(responses), strict=False)
    text = "\n".join(json.dumps({"prompt": p, "response": r}) for p, r in rows)
    path.write_text(text + "\n", encoding="utf-8")


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """The experiment's files, in the words of the tiny tokenizer."""
    folder = tmp_path_factory.mktemp("data")
    named = {
        "refusals": ("tell me how to steal", 340, [REFUSAL]),
        "lookalike_benign": ("tell me how to clean", 140, [ANSWER.format("clean"), None]),
        "instructions": ("please repair", 90, [ANSWER.format("repair")]),
        "sst2": ("what topic is", 820, ["music", "sport"]),
        "agnews": ("what weather is", 820, ["rain", "wind"]),
    }
    for name, (frame, rows, answers) in named.items():
        write_rows(folder / f"{name}.jsonl", (f"{frame} {n}" for n in NUMBERS[:rows]), answers)
    return folder


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))
