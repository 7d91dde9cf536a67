"""Several processes that write the same file at once, and cache folders that cannot be used."""

import logging
import os
import stat
import subprocess
import sys
import threading

import pytest
import torch

from str_kernels import SafetyConstraint, VocabularyIndex
from str_kernels.huggingface.constraint.references import ReferenceCache, save_reference_cache
from str_kernels.huggingface.patch.index_cache import cached_index

BUILD = """
import sys, torch
from pathlib import Path
from str_kernels.huggingface.patch.index_cache import cached_index
source = torch.Generator().manual_seed(0)
weight, states = (torch.randn(n, 16, generator=source) for n in (2000, 64))
print("ready", flush=True)
sys.stdin.readline()
print(cached_index(weight, states, Path(sys.argv[1])).order.sum().item())
"""


def head():
    """The weight and the states of ``BUILD``."""
    source = torch.Generator().manual_seed(0)
    return [torch.randn(n, 16, generator=source) for n in (2000, 64)]


@pytest.mark.slow
def test_processes_that_build_one_index_at_once(tmp_path):
    """Each has the index, one whole file is there, and nothing beside it."""
    start = [sys.executable, "-c", BUILD, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    several = [subprocess.Popen(start, **pipes) for _ in range(3)]
    for process in several:
        assert process.stdout.readline() == "ready\n"
    for process in several:
        process.stdin.write("\n")
        process.stdin.flush()
    sums = {process.communicate()[0] for process in several}
    assert [process.returncode for process in several] == [0, 0, 0]
    assert len(sums) == 1
    (file,) = tmp_path.iterdir()
    assert torch.equal(VocabularyIndex.load(file).order, cached_index(*head(), tmp_path).order)


def test_threads_that_write_one_file_at_once(tmp_path):
    """Whoever reads meanwhile finds a whole cache, of the one writer or of the other."""
    path, safety = tmp_path / "refs.safetensors", SafetyConstraint((1, 2), 1.0)
    rows = [{"k": torch.full((1000, 2), float(i))} for i in range(2)]
    save_reference_cache(path, rows[0], safety)
    stop, faults = threading.Event(), []

    def write(references):
        while not stop.is_set():
            save_reference_cache(path, references, safety)

    def read():
        try:
            for _ in range(50):
                found = ReferenceCache(path, safety)._saved["k"]
                assert found.unique().numel() == 1
        except BaseException as fault:
            faults.append(fault)
        stop.set()

    threads = [threading.Thread(target=write, args=(r,)) for r in rows]
    threads.append(threading.Thread(target=read))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("fault", ["a file", "below a file", "read-only"])
def test_an_index_cache_that_cannot_be_used(tmp_path, caplog, fault):
    """The index is built, and that it is not kept is logged."""
    folder = tmp_path / "cache"
    if fault == "read-only":
        if os.geteuid() == 0:
            pytest.skip("root writes into every folder")
        folder.mkdir()
        folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
    else:
        folder.write_text("")
        folder = folder if fault == "a file" else folder / "below"
    with caplog.at_level(logging.WARNING, logger="str_kernels"):
        index = cached_index(*head(), folder)
    assert torch.equal(index.order, VocabularyIndex.build(*head()).order)
    assert "is not kept" in caplog.text
