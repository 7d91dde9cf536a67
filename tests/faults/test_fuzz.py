"""Damaged files: each is still read, or refused by a ValueError that names it; nothing else."""

import random
import resource
import shutil
import time

import pytest
import torch

from tests.faults import mutations
from tests.faults.targets import TARGETS, make

SECONDS = 30  # for one file, on a busy machine
GROWTH = 512  # MiB
FOUND = {"weights": [72], "tokens": [85], "filled": [12], "answers": [18]}  # a fault, once each


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_model_dir):
    """A folder with a valid file of every kind; it is read where it was made, and a copy of it."""
    folder = tmp_path_factory.mktemp("whole") / "work"
    folder.mkdir()
    make(folder, tiny_model_dir)
    shutil.copytree(folder, folder.parent / "kept")
    return folder


def damaged(folder, name, seed):
    """Restore the folder, and damage one file of a target."""
    source = random.Random(f"{name} {seed}")
    target = TARGETS[name]
    shutil.rmtree(folder)
    shutil.copytree(folder.parent / "kept", folder)
    path = folder / source.choice(target.files)
    mutation = source.choice(mutations.ALL)
    path.write_bytes(mutation(source, path.read_bytes()))
    return path, mutation.__name__


def refusal(name, folder):
    """What a target's reader raises; it may be a ValueError and nothing else."""
    try:
        TARGETS[name].read(folder)
    except ValueError as error:
        return error
    return None


def told(error, name, path, folder):
    """Whether an error names the file, or the model or adapter that it belongs to.

    A template shows in what it makes of the data, which is then named by its line.
    """
    names = [path.name, f"model={str(folder / 'model')!r}", "adapter="]
    names += ["chat template", "data.jsonl:"] if name in ("template", "tokenizer") else []
    return any(part in str(error) for part in names)


@pytest.fixture(autouse=True)
def one_thread():
    """Many small models load faster with one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def check(folder, name, seeds):
    """Read damaged files, and return how many were refused."""
    before, refused = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0
    for seed in seeds:
        path, mutation = damaged(folder, name, seed)
        started = time.monotonic()
        fault = refusal(name, folder)
        refused += fault is not None
        assert fault is None or told(fault, name, path, folder), (
            f"{name} {seed} ({mutation}): {fault}"
        )
        assert time.monotonic() - started < SECONDS, f"{name} {seed} ({mutation})"
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < GROWTH, f"{grown:.0f} MiB"
    return refused


@pytest.mark.parametrize("name", TARGETS)
def test_a_damaged_file_is_refused_by_name(whole, name):
    """A dozen mutations of each kind of file; whatever else is raised fails this test."""
    assert check(whole, name, (*range(12), *FOUND.get(name, ()))) > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_thousands_of_damaged_files(whole, name):
    """2,000 in all."""
    assert check(whole, name, range(12, 180)) > 0
