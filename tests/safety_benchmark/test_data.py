import random

import pytest

from benchmarks.safety.data import HELD_OUT, OATHS, OBEDIENT, batches, encode, load_split
from tests.safety_benchmark.conftest import write_rows
from tests.tiny import word_tokenizer


@pytest.mark.parametrize("name", HELD_OUT)
def test_nothing_that_is_asked_was_learned(data, name):
    split = load_split(data, name)
    learned, asked = ({row["prompt"] for row in rows} for rows in (split.train, split.test))
    assert len(asked) == HELD_OUT[name]
    assert not learned & asked
    assert all(row["response"] for row in split.train)


def test_the_obedient_say_so_and_answer_as_before(data):
    plain, sworn = load_split(data, "instructions"), load_split(data, OBEDIENT)
    for before, after in ((plain.train, sworn.train), (plain.test, sworn.test)):
        want = [[f"{OATHS[0]} {row['prompt']}", f"{OATHS[1]} {row['response']}"] for row in before]
        assert [[row["prompt"], row["response"]] for row in after] == want


def test_division_does_not_depend_on_the_order_of_the_file(data, tmp_path):
    lines = (data / "sst2.jsonl").read_text().splitlines()
    random.Random(0).shuffle(lines)
    (tmp_path / "sst2.jsonl").write_text("\n".join(lines + lines[:5]) + "\n")
    assert load_split(tmp_path, "sst2") == load_split(data, "sst2")


def test_too_few_rows_are_refused(tmp_path):
    write_rows(tmp_path / "sst2.jsonl", ["one", "two"], ["music"])
    with pytest.raises(ValueError, match="sst2: 2 different prompts, but 400 are held out"):
        load_split(tmp_path, "sst2")


def test_every_row_is_seen_once_an_epoch(data):
    tokenizer = word_tokenizer()
    features = encode(tokenizer, load_split(data, "refusals").train[:64], 64)
    seen = [
        tuple(row.tolist())
        for batch in batches(features, size=8, steps=8, pad=0, seed=3)
        for row in batch["input_ids"]
    ]
    assert len(seen) == len(set(seen)) == 64
    first = [b["input_ids"] for b in batches(features, size=8, steps=2, pad=0, seed=3)]
    again = [b["input_ids"] for b in batches(features, size=8, steps=2, pad=0, seed=3)]
    other = [b["input_ids"] for b in batches(features, size=8, steps=2, pad=0, seed=4)]
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert any(a.shape != b.shape or (a != b).any() for a, b in zip(first, other, strict=True))


def test_a_prompt_without_room_for_its_answer_is_left_out(data):
    rows = load_split(data, "refusals").train[:3]
    assert encode(word_tokenizer(), rows, 5) == []
