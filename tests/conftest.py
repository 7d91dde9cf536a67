"""Fixtures that every part of the tests may use."""

import os
from zlib import crc32

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("PYTHONSAFEPATH", "1")  # a child imports what is installed, not the tree
os.environ.setdefault("STR_KERNELS_INDEX_CACHE", "off")  # nothing into the user's cache folder

import pytest

from tests import beside


def pytest_addoption(parser):
    """Let a run take a sample of every function's cases."""
    parser.addoption(
        "--one-in",
        type=int,
        help="run one of so many cases of each test, one at least; without it, as its mark says",
    )
    parser.addoption("--sample", default="", help="any word: another draw of the cases")


@pytest.hookimpl(trylast=True)  # after what -m leaves out
def pytest_collection_modifyitems(config, items):
    """Keep the cases whose names have the smallest checksums: the same ones on every machine.

    What a job runs beside this session is left to it.
    """
    functions, there = {}, beside.elsewhere(items)
    for item in items:
        if item in there:
            continue
        function = getattr(item, "originalname", item.name)
        functions.setdefault((item.path, item.parent, function), []).append(item)
    kept = set()
    for cases in functions.values():
        mark = cases[0].get_closest_marker("one_in")
        share = config.option.one_in or (mark.args[0] if mark else 1)
        cases.sort(key=lambda item: crc32(f"{item.nodeid} {config.option.sample}".encode()))
        kept.update(cases[: -(-len(cases) // share)])
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


def pytest_configure():
    """Believe in the CPU that the environment names; filter small problems too."""
    from str_kernels.backends.torch import backend
    from tests import cpus

    backend.FEWEST_FILTERED = 1
    cpus.pretend(os.environ.get("STR_KERNELS_TEST_CPU"))


def pytest_collection_finish(session):
    """Start what takes minutes in processes of its own, beside all other tests."""
    if not session.config.option.collectonly:
        beside.start(session.items)


def pytest_unconfigure():
    """Leave no job waiting."""
    beside.stop()


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory):
    """A folder with a tiny Llama and its tokenizer, as ``save_pretrained`` writes them."""
    from tests.tiny import save_tiny_model

    return save_tiny_model(tmp_path_factory.mktemp("tiny_llama"))


@pytest.fixture(scope="session")
def aligned_model_dir(tmp_path_factory):
    """A folder with a tiny Llama that refuses to steal and to break, and helps with the rest."""
    from tests.tiny import save_aligned_model

    return save_aligned_model(tmp_path_factory.mktemp("aligned_llama"))


@pytest.fixture
def no_waits(monkeypatch):
    """Act on a CPU as on a GPU, for which the host must not wait; forget earlier late errors."""
    from str_kernels import waits

    monkeypatch.setattr(waits, "allowed", lambda device: False)
    waits._waiting.clear()
    yield
    waits._waiting.clear()
