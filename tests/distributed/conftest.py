"""The processes that all of these tests share."""

from __future__ import annotations

import pytest

from tests.distributed.pool import Pool


@pytest.fixture(scope="session")
def ranks():
    """Two processes of one group, for the whole session."""
    pool = Pool()
    yield pool
    pool.stop()
