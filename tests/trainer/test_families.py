"""The table of model families in docs/models.md is what trying gives."""

from __future__ import annotations

import pytest

from tests.trainer.architectures import model_types
from tests.trainer.families import PAGE, abilities, row, rows_of

pytestmark = pytest.mark.slow

SAMPLE = ("llama", "qwen2", "gpt2", "bloom")
"""`make families` tries all."""


@pytest.mark.parametrize("family", SAMPLE)
def test_the_table_states_what_trying_a_family_gives(family: str) -> None:
    assert row(family, abilities(family)) == rows_of(PAGE.read_text(encoding="utf-8"))[family]


def test_the_table_lists_every_family_of_the_installed_transformers() -> None:
    assert sorted(rows_of(PAGE.read_text(encoding="utf-8"))) == model_types()
