"""What is said of the data before anything slow begins."""

import json

import pytest

from str_kernels.settings import Faults
from str_kernels.training.caching import prepare_cache
from str_kernels.training.checks import prepare
from str_kernels.training.model import load
from str_kernels.training.notices import data_notices, end_notice
from str_kernels.training.settings import TrainSettings
from tests.tiny import CHAT_TEMPLATE, llama, word_tokenizer

GOOD = {"prompt": "tell me the topic of rain", "response": "weather ."}
LONG = {"prompt": "rain " * 80, "response": "weather ."}


@pytest.fixture
def prepared(tmp_path, tiny_model_dir):
    """Checks a run, or a cache, over `rows`."""

    def check(rows, *, model=tiny_model_dir, by=prepare, **changes):
        data = tmp_path / "data.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        settings = TrainSettings(
            str(model), str(data), str(tmp_path / "out"), **{"max_length": 64, **changes}
        )
        return by(settings)

    return check


@pytest.mark.parametrize("by", [prepare, prepare_cache])
def test_long_prompts_are_refused_with_a_way_out(prepared, by):
    """Each is named, with their number, the longest, and the option that decides."""
    with pytest.raises(Faults) as caught:
        prepared([GOOD, LONG, GOOD, {**LONG, "prompt": "rain " * 90}], by=by)
    text = str(caught.value)
    assert "data.jsonl:2: the prompt has 82 tokens and leaves no room" in text
    assert "data.jsonl: 2 of 4 prompts leave no room for an answer, and the longest has 92" in text
    assert "raise --max-length (64), or give --long skip" in text


@pytest.mark.parametrize("by", [prepare, prepare_cache])
def test_long_prompts_are_left_out_or_shortened(prepared, by):
    """Both are counted and said; the rows that stay are those of the file, by line."""
    found = prepared([LONG, GOOD], long="skip", by=by)
    facts = found.data.facts()
    assert (facts["rows"], facts["skipped_rows"], found.data.lines) == (1, 1, [2])
    assert any("1 of 2 rows are left out" in text for text in data_notices(found))
    found = prepared([LONG, GOOD], long="truncate", by=by)
    facts = found.data.facts()
    assert (facts["rows"], facts["truncated_prompts"], facts["longest"]) == (2, 1, 64)
    assert any("1 of 2 prompts are read without their middle" in t for t in data_notices(found))
    assert list(data_notices(prepared([GOOD], by=by))) == []


def test_no_row_may_be_left(prepared):
    """A file of long prompts alone cannot be skipped."""
    with pytest.raises(Faults, match=r"all 2 prompts leave no room .* longest prompt has 82"):
        prepared([LONG, LONG], long="skip")
    with pytest.raises(Faults, match="long='cut': must be one of refuse, skip, truncate"):
        prepared([GOOD], long="cut")


def test_unread_keys_and_greetings_are_said_of_every_file(prepared, tmp_path):
    """Anchors too: what is not read, and what is not learned."""
    greeting = {"role": "assistant", "content": "sure"}
    asked = [{"role": "user", "content": "rain ?"}, {"role": "assistant", "content": "weather"}]
    (tmp_path / "anchors.jsonl").write_text(json.dumps({**GOOD, "source": "a"}))
    rows = [{**GOOD, "id": 7}, {"messages": [greeting, *asked]}]
    said = list(data_notices(prepared(rows, anchors=(str(tmp_path / "anchors.jsonl"),))))
    assert len(said) == 3
    assert "data.jsonl: 1 earlier answers are read but not learned" in said[0]
    assert "data.jsonl: nothing reads id (1 rows)" in said[1]
    assert "anchors.jsonl: nothing reads source (1 rows)" in said[2]


@pytest.mark.parametrize("ends", ["none", "tokenizer", "generation config"])
def test_a_template_that_never_ends_an_answer(prepared, tmp_path, ends):
    """Named with the last token and the ends that are known; one end of either kind is enough."""
    tokenizer, model = word_tokenizer(), llama(len(word_tokenizer()))
    tokenizer.chat_template = CHAT_TEMPLATE.replace("<end>", "<user>")
    tokenizer.save_pretrained(tmp_path / "model")
    model.generation_config.eos_token_id = [3, 4]
    if ends == "tokenizer":
        tokenizer.eos_token = "<user>"
        tokenizer.save_pretrained(tmp_path / "model")
    elif ends == "generation config":
        model.generation_config.eos_token_id = [4, 2]
    model.save_pretrained(tmp_path / "model")
    found = prepared([GOOD, GOOD], model=tmp_path / "model")
    said = end_notice(found, load(found.settings))
    if ends != "none":
        assert said is None
        return
    for text in ("2 of 2 rows learn no end token", "last token is '<user>' (2)", "'<end>' (4)",
                 "eos_token_id is [3, 4]"):  # fmt: skip
        assert text in said


def test_an_answer_that_is_cut_has_no_end_anyway(prepared):
    """It is counted as cut, and not as endless."""
    found = prepared([{"prompt": "rain", "response": "wind " * 80}])
    assert end_notice(found, load(found.settings)) is None
    assert any("1 of 1 responses are cut at 64 tokens" in text for text in data_notices(found))


def test_requests_of_the_probe_that_are_trained_on_are_counted(prepared, tmp_path):
    """What is learned, or held as an anchor, tells nothing of what is not."""
    rows = [GOOD, {"prompt": "how to steal a lamp"}, {"prompt": "how to break my ball"}]
    probe, anchors = tmp_path / "probe.jsonl", tmp_path / "anchors.jsonl"
    probe.write_text("".join(json.dumps(row) + "\n" for row in rows))
    anchors.write_text(json.dumps({**rows[1], "response": "No ."}) + "\n")
    found = prepared([GOOD], probe=str(probe), anchors=(str(anchors),))
    assert "2 of 3 requests of the probe are in the data" in " ".join(data_notices(found))
