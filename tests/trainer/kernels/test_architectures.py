"""The loss on every architecture of transformers is transformers' own, or the model is refused by name."""

from __future__ import annotations

import pytest

from tests.trainer.architectures import VOCABULARY, WIDTH, tiny


@pytest.mark.parametrize("model_type", ["llama", "falcon", "mixtral", "falcon_h1"])
def test_tiny_models_are_tiny_and_reproducible(model_type: str) -> None:
    first, second = tiny(model_type), tiny(model_type)
    assert (first.config.vocab_size, first.config.hidden_size) == (VOCABULARY, WIDTH)
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert one.equal(other)
