"""A token file for every test here; and what the trainers leave behind is not for the next one."""

from __future__ import annotations

import pytest

from str_kernels.safety.tokens import SafetyTokens
from tests.huggingface.conftest import _own_accelerator_state  # noqa: F401
from tests.tiny import word_tokenizer


@pytest.fixture
def tokens(tmp_path) -> str:
    """A file of safety tokens of the tiny tokenizer."""
    path = tmp_path / "safety_tokens.json"
    SafetyTokens.from_strings(word_tokenizer(), ["sorry", "cannot"]).save(path)
    return str(path)
