"""A file is replaced by a whole one, or stays what it was."""

import json
import os

import pytest

from str_kernels.files import replacing, write_json


def test_a_written_file_takes_the_place_of_the_old_one(tmp_path):
    """Nothing lies beside it afterwards, and text stays readable."""
    path = tmp_path / "a.json"
    path.write_text("old")
    write_json(path, {"token": "Straße"})
    assert path.read_text(encoding="utf-8") == '{\n "token": "Straße"\n}\n'
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupted_writer_leaves_the_old_file(tmp_path):
    """Whatever interrupts it; the unfinished file is gone."""
    path = tmp_path / "a.txt"
    path.write_text("old")

    def interrupted():
        with replacing(path) as partial:
            partial.write_text("ne")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_two_writers_do_not_meet(tmp_path):
    """Each writes a file of its own; the last to finish stays."""
    path = tmp_path / "a.json"
    with replacing(path) as mine:
        write_json(path, "theirs")
        mine.write_text("1")
        assert json.loads(path.read_text()) == "theirs"
    assert path.read_text() == "1"


def test_a_value_that_json_cannot_hold_touches_no_file(tmp_path):
    """The text is made before the file."""
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {1, 2})
    assert not list(tmp_path.iterdir())


def test_what_a_killed_writer_left_is_removed_after_an_hour(tmp_path):
    """Files of writers that may still be at work stay, and so does whatever has another name."""
    path = tmp_path / "a[1].json"
    left, at_work, other = (
        tmp_path / name
        for name in ("a[1].json.0a.partial", "a[1].json.0b.partial", "a1.json.0a.partial")
    )
    for file in (left, at_work, other):
        file.write_text("")
    for file in (left, other):
        os.utime(file, (0, 0))
    write_json(path, 1)
    assert sorted(tmp_path.iterdir()) == sorted([path, at_work, other])
