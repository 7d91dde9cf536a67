"""Files of tensors: what is read is what was written, or refused."""

import os

import pytest
import torch
from safetensors.torch import save_file

from str_kernels.tensor_files import SavedTensors, save_tensors


def test_tensors_and_metadata_come_back(tmp_path):
    """Of every dtype, empty ones too."""
    dtypes = (torch.float32, torch.bfloat16, torch.int8, torch.int64, torch.float8_e4m3fn)
    tensors = {str(dtype): torch.arange(6).view(2, 3).to(dtype) for dtype in dtypes}
    tensors["empty"] = torch.empty(0, 4)
    save_tensors(tmp_path / "x", tensors, {"unit": "m"})
    saved = SavedTensors(tmp_path / "x", "x")
    assert saved.names == set(tensors)
    assert saved.metadata["unit"] == "m"
    for name, tensor in tensors.items():
        assert saved[name].dtype == tensor.dtype
        assert torch.equal(saved[name].float(), tensor.float())


def test_one_flipped_bit_is_noticed(tmp_path):
    """In any tensor; the others can still be read."""
    path = tmp_path / "x"
    save_tensors(path, {"a": torch.zeros(4), "b": torch.ones(4)}, {})
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    saved = SavedTensors(path, "path='x'")
    assert torch.equal(saved["a"], torch.zeros(4))
    with pytest.raises(ValueError, match="path='x': b is not as it was written"):
        saved["b"]


def test_files_without_checksums_are_read(tmp_path):
    """Those of version 0.1."""
    save_file({"a": torch.ones(3)}, tmp_path / "x", metadata={"schema": "s"})
    assert torch.equal(SavedTensors(tmp_path / "x", "x")["a"], torch.ones(3))


def test_what_is_missing_is_named(tmp_path):
    """No file, not such a file, no entry."""
    with pytest.raises(ValueError, match="x: no such file"):
        SavedTensors(tmp_path / "x", "x")
    (tmp_path / "x").write_bytes(b"abc")
    with pytest.raises(ValueError, match="x: not a safetensors file"):
        SavedTensors(tmp_path / "x", "x")
    save_tensors(tmp_path / "x", {"a": torch.ones(1)}, {"unit": "{"})
    for entry in ("unit", "other"):
        with pytest.raises(ValueError, match=f"x: its {entry} is missing or damaged"):
            SavedTensors(tmp_path / "x", "x").json(entry)


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path):
    """The error is an OSError that names the file, and nothing is left beside it."""
    resource = pytest.importorskip("resource", reason="limits of a process are POSIX's")
    path = tmp_path / "x"
    save_tensors(path, {"a": torch.ones(3)}, {})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10000, before[1]))
    try:
        with pytest.raises(OSError, match=r"x: cannot be written"):
            save_tensors(path, {"a": torch.ones(100000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.listdir(tmp_path) == ["x"]
    assert torch.equal(SavedTensors(path, "x")["a"], torch.ones(3))
