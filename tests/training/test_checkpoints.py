"""Checkpoints: whole ones are found, unfinished ones passed over, changed ones refused by name."""

import pytest

from str_kernels.training.checkpoints import SEAL, newest_checkpoint, seal, settle


def checkpoint(folder, step, *, sealed=True):
    """A checkpoint of two files, one in a folder below."""
    path = folder / f"checkpoint-{step}"
    (path / "below").mkdir(parents=True)
    (path / "trainer_state.json").write_text("{}")
    (path / "below" / "weights").write_bytes(bytes(100))
    if sealed:
        seal(path)
    return path


def test_the_newest_sealed_checkpoint_is_found(tmp_path):
    """By its number, not by its name; one without a seal was interrupted."""
    assert newest_checkpoint(tmp_path) is None
    checkpoint(tmp_path, 9)
    ten = checkpoint(tmp_path, 10)
    unfinished = checkpoint(tmp_path, 11, sealed=False)
    assert newest_checkpoint(tmp_path) == ten
    assert settle(tmp_path, ten) == ["checkpoint-11"]
    assert not unfinished.exists()
    assert newest_checkpoint(tmp_path) == ten


@pytest.mark.parametrize("damage", ["change", "remove", "add"])
def test_a_changed_file_is_refused_by_name(tmp_path, damage):
    """The error names the file, and what to remove."""
    path = checkpoint(tmp_path, 2) / "below" / "weights"
    if damage == "change":
        path.write_bytes(bytes(99) + b"\1")
    elif damage == "remove":
        path.unlink()
    else:
        path = path.with_name("other")
        path.write_text("")
    with pytest.raises(
        ValueError, match=r"is not as it was written; remove .*checkpoint-2"
    ) as told:
        newest_checkpoint(tmp_path)
    assert str(path) in str(told.value)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"sha256": 3}', '{"sha256": {"a": 1}}'])
def test_a_damaged_seal_is_refused(tmp_path, text):
    """Whatever is wrong with it."""
    (checkpoint(tmp_path, 2) / SEAL).write_text(text)
    with pytest.raises(ValueError, match="checkpoint-2 to resume from an earlier checkpoint"):
        newest_checkpoint(tmp_path)


def test_a_checkpoint_of_version_0_1_is_sealed_when_its_run_goes_on(tmp_path):
    """It has no seal, so the trainer's last file tells that it is whole."""
    two = checkpoint(tmp_path, 2, sealed=False)
    (checkpoint(tmp_path, 4, sealed=False) / "trainer_state.json").unlink()
    assert newest_checkpoint(tmp_path, sealed=False) == two
    assert settle(tmp_path, two) == ["checkpoint-4"]
    assert newest_checkpoint(tmp_path) == two
