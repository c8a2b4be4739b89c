"""A tokenizer whose words are the tiny models' token ids."""

import pytest
from trainers.tiny import word_tokenizer


@pytest.fixture
def tokenizer():
    return word_tokenizer()
