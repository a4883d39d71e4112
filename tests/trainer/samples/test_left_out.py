"""What data sets and held-out sets leave out, or may not be meant, is counted, reported and bound."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagecoach_api.conversation import Loss, Template, TemplateName, TooLong
from stagecoach_api.references import Format, NamedSource
from stagecoach_trainer.data.notes import one_class_warnings, warnings_of
from stagecoach_trainer.loop.job import HeldOutSet
from stagecoach_trainer.runtime.context import StageContext
from stagecoach_trainer.runtime.errors import UserError
from stagecoach_trainer.samples.datasets import conversation_held_out, conversation_shard, text_held_out, text_shard
from stagecoach_trainer.samples.groups import check_left_out
from stagecoach_trainer.samples.preferences import Grouping, group_shard
from stagecoach_trainer.samples.prompts import read_prompts
from stagecoach_trainer.text.templates import apply_template
from tests.trainer.data.makers import make_context, write_jsonl
from tests.trainer.models.makers import make_tokenizer

LENGTH = 96


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    made = make_tokenizer()
    apply_template(made, Template(name=TemplateName.ALPACA))
    return made


def source(folder: Path, values: list[dict[str, Any]], **fields: Any) -> NamedSource:
    return NamedSource(uri=str(write_jsonl(folder / "in" / "a.jsonl", values)), name="talks", **fields)


def talks(num_short: int, num_long: int) -> list[dict[str, Any]]:
    """Conversations, the long ones first."""
    values = [{"instruction": "Add 1 to 2.", "output": "three " * 200} for _ in range(num_long)]
    return values + [{"instruction": "Add 1 to 2.", "output": "three"} for _ in range(num_short)]


def held_out(context: StageContext, data: NamedSource, tokenizer: Any, share: float, most: int = 4096) -> HeldOutSet:
    return conversation_held_out(context, data, tokenizer, Loss(), LENGTH, most, share)


def test_conversations_left_out_of_a_held_out_set_are_counted_and_reported(tmp_path: Path, tokenizer: Any) -> None:
    """lm-eval#3421: 1 of 10 conversations was measured and shown as the set's figure."""
    context = make_context(tmp_path)
    found = held_out(context, source(tmp_path, talks(8, 2)), tokenizer, 0.2)
    assert (found.counts["samples"], found.counts["tooLong"]) == (8, 2)
    (warning,) = context.progress.warnings
    assert warning.startswith("heldOut talks: 2 of 10 samples are left out (records 10, samples 8, tooLong 2)")


def test_a_held_out_set_that_leaves_out_too_much_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    data = source(tmp_path, talks(8, 2))
    with pytest.raises(UserError, match=r"heldOut\.sets: 20\.0% of the samples .*`maxDroppedShare` 19\.0%.*tooLong 2"):
        held_out(make_context(tmp_path), data, tokenizer, 0.19)
    with pytest.raises(UserError, match=r"no conversation to measure \(records 10, tooLong 10\)"):
        held_out(make_context(tmp_path, seed=2), source(tmp_path, talks(0, 10)), tokenizer, 1.0)


def test_a_set_that_is_read_in_part_is_judged_by_what_was_read(tmp_path: Path, tokenizer: Any) -> None:
    """`maxTokens` ends the set after its first answers: those after them were not measured, but not left out either."""
    found = held_out(make_context(tmp_path), source(tmp_path, talks(400, 5)), tokenizer, 0.05, most=8)
    assert found.counts["records"] == 256
    assert sum(row.num_targets for row in found.rows) <= 8
    assert found.counts["tooLong"] == 5


def test_answers_left_out_of_a_held_out_set_are_bound_and_reported(tmp_path: Path, tokenizer: Any) -> None:
    pairs = [{"prompt": "Which?", "chosen": f"a{n}", "rejected": "b " * (300 if n == 0 else 1)} for n in range(10)]
    context = make_context(tmp_path)
    shard = group_shard(context, source(tmp_path, pairs), tokenizer, LENGTH, Grouping.PAIRS)
    said: list[str] = []
    check_left_out("talks", shard.counts, 0.1, said.append)
    assert said[0].startswith("heldOut talks: 2 of 20 answers are left out (records 10, groups 9")
    with pytest.raises(UserError, match=r"heldOut\.sets: 10\.0% of the answers cannot be measured"):
        check_left_out("talks", shard.counts, 0.09, said.append)


def test_fields_and_files_that_are_not_read_are_reported_once_by_every_stage(tmp_path: Path, tokenizer: Any) -> None:
    folder = tmp_path / "in"
    write_jsonl(folder / "a.jsonl", [{**value, "id": 1} for value in talks(3, 0)])
    (folder / "README.md").write_text("about", encoding="utf-8")
    data = NamedSource(uri=str(folder), name="talks")
    expected = ["talks: fields not read: id (3 records)", "talks: files not read: README.md"]
    for number in (1, 2):  # the second attempt finds the tokens in the cache
        context = make_context(tmp_path, seed=number)
        shard = conversation_shard(context, data, tokenizer, Loss(), TooLong.DROP, LENGTH)
        assert context.progress.warnings == expected
        assert (shard.counts["fieldNotRead.id"], shard.counts["fileNotRead.README.md"]) == (3, 1)
    assert read_prompts(make_context(tmp_path, seed=3), data, tokenizer, LENGTH).counts["fieldNotRead.id"] == 3


def test_fields_of_texts_that_are_not_read_are_reported(tmp_path: Path, tokenizer: Any) -> None:
    data = source(tmp_path, [{"text": f"text {n}", "url": "u"} for n in range(3)])
    context = make_context(tmp_path)
    assert text_shard(context, data, tokenizer).counts["fieldNotRead.url"] == 3
    text_held_out(context, data, tokenizer, LENGTH, 4096)
    assert context.progress.warnings == [
        "talks: fields not read: url (3 records)",
        "heldOut talks: fields not read: url (3 records)",
    ]


def test_texts_that_spell_a_special_token_are_counted_and_told(tmp_path: Path, tokenizer: Any) -> None:
    """Text that spells an end of text is trained as characters, which its author surely did not mean."""
    end = tokenizer.eos_token
    context = make_context(tmp_path)
    texts = source(tmp_path / "texts", [{"text": "one"}, {"text": f"two {end} three"}])
    assert text_shard(context, texts, tokenizer).counts["spelledTokens"] == 1
    chats = source(tmp_path / "chats", [*talks(3, 0), {"instruction": "Add 1 to 2.", "output": f"three{end}"}])
    assert conversation_shard(context, chats, tokenizer, Loss(), TooLong.DROP, LENGTH).counts["spelledTokens"] == 1
    (warning,) = context.progress.warnings
    assert warning.startswith("talks: 1 records spell a special token, such as an end of text")


def test_blank_answers_are_counted_in_training(tmp_path: Path, tokenizer: Any) -> None:
    """LLaMA-Factory's SFT: records without an answer were trained on without a warning."""
    data = source(tmp_path, [*talks(3, 0), {"instruction": "Add 1 to 2.", "output": " "}], format=Format.ALPACA)
    context = make_context(tmp_path)
    assert conversation_shard(context, data, tokenizer, Loss(), TooLong.DROP, LENGTH).counts["blankAnswers"] == 1
    assert "1 answers of the assistant are blank" in context.progress.warnings[0]


def test_judged_conversations_are_refused_where_all_turns_are_learnt(tmp_path: Path, tokenizer: Any) -> None:
    """TRL's and LLaMA-Factory's KTO records: `sft` trained on the disliked answers."""
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    data = source(tmp_path, [{"messages": turns, "label": False}])
    with pytest.raises(UserError, match=r"a\.jsonl:1: an answer with a verdict.*`loss: \{kto"):
        conversation_shard(make_context(tmp_path), data, tokenizer, Loss(), TooLong.DROP, LENGTH)
    counts = group_shard(make_context(tmp_path, 2), data, tokenizer, LENGTH, Grouping.ANSWERS).counts
    assert (counts["answers"], counts["disliked"]) == (1, 1)


def test_labels_of_one_kind_are_told_apart_from_both(tmp_path: Path, tokenizer: Any) -> None:
    values = [{"prompt": "q", "completion": f"a{n}", "label": n < 3} for n in range(4)]
    both = group_shard(make_context(tmp_path), source(tmp_path, values), tokenizer, LENGTH, Grouping.ANSWERS).counts
    assert (both["liked"], both["disliked"]) == (3, 1)
    assert one_class_warnings([both]) == []
    assert "all 3 answers are liked" in one_class_warnings([{"liked": 2}, {"liked": 1}])[0]
    assert "all 2 answers are disliked" in one_class_warnings([{"disliked": 2}])[0]
    assert one_class_warnings([{"liked": 2}, {"disliked": 1}]) == one_class_warnings([{}]) == []


@given(st.dictionaries(st.text(min_size=1, max_size=30), st.integers(1, 99), max_size=60))
def test_sentences_about_many_fields_stay_short(fields: dict[str, int]) -> None:
    warnings = warnings_of({f"fieldNotRead.{name}": count for name, count in fields.items()}, "set")
    assert len(warnings) == bool(fields)
    assert all(len(text) < 1000 for text in warnings)
