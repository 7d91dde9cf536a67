"""Every architecture of transformers, tiny: patched it is what it was, and nearly all fuse."""

from __future__ import annotations

import pytest

from benchmarks.architectures.sweep import examine
from benchmarks.architectures.table import FILE, RESULTS, SCHEMA, markdown
from benchmarks.architectures.tiny_configs import TASKS
from str_kernels.bench.report import read_rows

pytestmark = pytest.mark.one_in(2)

# one of each way from the hidden states to the loss, and the usual suspects
SOME = [
    ("causal", name)
    for name in (
        "llama", "qwen3", "mistral", "phi3", "olmo2", "gpt2", "gpt_neox", "opt", "bloom", "falcon",
        "gemma2", "gemma3_text", "cohere", "cohere2", "granite", "nanochat", "mixtral", "gpt_oss",
        "bert", "roberta", "bart", "xlnet", "electra", "mamba", "recurrent_gemma", "musicgen",
    )
] + [("image-text", name) for name in ("llava", "qwen2_vl", "gemma3", "blip-2")]  # fmt: skip
FALLS_BACK = {"musicgen", "musicgen_melody"}  # four heads stacked


@pytest.mark.parametrize(("task", "model_type"), SOME, ids=lambda x: x)
def test_some(task, model_type):
    """Loss, gradients, logits, generation, state dict, unpatching; a dropped scale is noticed."""
    found = examine(model_type, task)
    assert found.outcome == ("falls back" if model_type in FALLS_BACK else "fused"), found
    assert found.fault_seen is (True if found.scaled else None)


@pytest.fixture(scope="module")
def committed():
    """The rows of the last complete sweep."""
    return read_rows(RESULTS / FILE, SCHEMA)[1]


@pytest.mark.parametrize(
    ("task", "entries", "fused"), [("causal", 196, 188), ("image-text", 100, 75)]
)
def test_the_sweep(committed, task, entries, fused):
    """As committed: nearly all fuse, none is wrong or refused, every dropped scale is noticed."""
    rows = [row for row in committed if row["task"] == task]
    outcomes = [row["outcome"] for row in rows]
    assert len(rows) == entries
    assert outcomes.count("fused") >= fused
    assert "wrong" not in outcomes
    refused = [row["reason"] for row in rows if row["outcome"] == "refused"]
    assert all("has no output head" in reason for reason in refused)
    assert all(row["reason"] for row in rows if row["outcome"] != "fused")
    assert all(row["fault_seen"] for row in rows if row["scaled"])


def test_the_table_is_of_these_results():
    """The table is generated, not written."""
    assert (RESULTS / "architectures.md").read_text("utf-8") == markdown()


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_all_again(committed, task):
    """The whole sweep, here and now: nothing that is committed as fused is less than that."""
    for row in committed:
        if row["task"] == task and row["outcome"] in ("fused", "falls back"):
            found = examine(row["model_type"], task)
            assert found.outcome == row["outcome"], found
