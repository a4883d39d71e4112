"""Conversations as ids: trained prompts equal served ones, on real data with LLaMA's real vocabulary."""

from __future__ import annotations

import shutil
from typing import Any

import numpy as np
import pytest

from stagecoach_api.conversation import Loss, Role, Template, TemplateName, TooLong, Turns
from stagecoach_api.references import Format, RecordSource
from stagecoach_trainer.data.reading import read_path
from stagecoach_trainer.data.records import Record, Turn, as_message
from stagecoach_trainer.runtime.errors import UserError
from stagecoach_trainer.samples.conversation import ConversationEncoder, Sample, document
from stagecoach_trainer.text.encoding import Encoder
from stagecoach_trainer.text.templates import Renderer, apply_template, parse_tools
from stagecoach_trainer.text.vocabulary import load_tokenizer
from tests import SHARED_DATA as DATA
from tests.trainer.models.makers import make_tokenizer

NAMED = [name for name in TemplateName if name not in (TemplateName.MODEL, TemplateName.CUSTOM)]
FILES = ["alpaca_zh.json", "alpaca_en.json", "huangdi_tcm_sample.json", "toolcall_sharegpt_zh.json"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """LLaMA's real vocabulary."""
    folder = tmp_path_factory.mktemp("llama")
    shutil.copyfile(DATA / "tokenizers" / "llama_32000.model", folder / "tokenizer.model")
    return load_tokenizer(folder)


def real_records(file: str, name: TemplateName) -> list[Record]:
    source = RecordSource(uri=file, format=Format.AUTO)
    records = [record for record in read_path(DATA / "sft" / file, source) if isinstance(record, Record)]
    if name is TemplateName.CHATML:
        return records
    return [record for record in records if record.tools is None]


def make_encoder(
    tokenizer: Any,
    template: Template,
    too_long: TooLong = TooLong.FAIL,
    sequence_length: int = 100_000,
    loss: Loss | None = None,
) -> ConversationEncoder:
    apply_template(tokenizer, template)
    return ConversationEncoder(Encoder(tokenizer), Renderer(tokenizer), loss or Loss(), too_long, sequence_length)


def served_prompts(tokenizer: Any, record: Record) -> list[list[int]]:
    """Return, using only transformers, the ids that a model receives before each of its turns."""
    messages = [as_message(turn) for turn in record.messages]
    return [
        tokenizer.apply_chat_template(
            messages[:index], tools=parse_tools(record.tools), add_generation_prompt=True, return_dict=False
        )
        for index, turn in enumerate(record.messages)
        if turn.role is Role.ASSISTANT
    ]


def trained_starts(sample: Sample) -> list[int]:
    """Return where each trained turn begins in a sample."""
    return np.flatnonzero(np.diff(np.concatenate([[False], sample.trained]).astype(int)) == 1).tolist()


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("file", FILES)
def test_the_ids_before_every_trained_turn_are_the_served_ids(llama: Any, name: TemplateName, file: str) -> None:
    records = real_records(file, name)[:60]
    encoder = make_encoder(llama, Template(name=name))
    turns = 0
    for record in records:
        prompts = served_prompts(llama, record)
        said = [turn.content for turn in record.messages if turn.role is Role.ASSISTANT]
        found = 0
        for sample in encoder.encode([record]):
            ids = sample.ids.tolist()
            assert ids[0] == llama.bos_token_id
            assert ids.count(llama.bos_token_id) == 1
            assert ids[-1] == llama.eos_token_id
            assert bool(sample.trained[-1])
            stops = np.flatnonzero(np.diff(np.append(sample.trained, False).astype(int)) == -1) + 1
            for start, stop in zip(trained_starts(sample), stops.tolist(), strict=True):
                assert ids[:start] == prompts[found]
                assert ids[stop - 1] == llama.eos_token_id
                assert llama.decode(ids[:stop]).removeprefix(llama.decode(ids[:start])).find(said[found]) in range(14)
                found += 1
        assert found == len(prompts)
        turns += found
    assert turns >= len(records) == 60
    assert encoder.counts["noLoss"] == 0


def talk(*turns: str, system: str = "", where: str = "talk.jsonl:1") -> Record:
    """Return a conversation of user and assistant, alternating."""
    roles = (Role.USER, Role.ASSISTANT)
    messages = [Turn(roles[index % 2], text) for index, text in enumerate(turns)]
    front = [Turn(Role.SYSTEM, system)] if system else []
    return Record(messages=(*front, *messages), where=where)


def texts(tokenizer: Any, samples: list[Sample]) -> list[str]:
    return [tokenizer.decode(sample.ids) for sample in samples]


def trained_text(tokenizer: Any, sample: Sample) -> str:
    return str(tokenizer.decode(sample.ids[sample.trained]))


def test_a_turn_whose_served_prompt_encodes_differently_begins_a_sample(llama: Any) -> None:
    encoder = make_encoder(llama, Template(name=TemplateName.ALPACA))
    record = talk("Greet me.", "Hello there", "Again.", "Hello again")
    samples = list(encoder.encode([record]))
    assert len(samples) == 2
    assert encoder.counts["extraSamples"] == 1
    prompts = served_prompts(llama, record)
    assert [sample.ids[: trained_starts(sample)[0]].tolist() for sample in samples] == prompts
    assert [trained_text(llama, sample) for sample in samples] == ["Hello there</s>", "Hello again</s>"]


def test_a_conversation_whose_history_encodes_equally_is_one_sample(llama: Any) -> None:
    encoder = make_encoder(llama, Template(name=TemplateName.VICUNA))
    [sample] = encoder.encode([talk("Greet me.", "Hello there", "Again.", "Hello again")])
    assert trained_text(llama, sample).strip() == "Hello there</s> Hello again</s>"
    assert len(trained_starts(sample)) == 2


def test_the_spelling_of_a_special_token_is_plain_text_in_an_answer(llama: Any) -> None:
    encoder = make_encoder(llama, Template(name=TemplateName.VICUNA))
    [sample] = encoder.encode([talk("Which token ends a text?", "It is </s>, you see")])
    ids = sample.ids[sample.trained].tolist()
    assert ids.count(llama.eos_token_id) == 1
    assert ids[-1] == llama.eos_token_id
    assert "It is </s>, you see" in trained_text(llama, sample)


def test_an_answer_gets_no_prepended_space(llama: Any) -> None:
    encoder = make_encoder(llama, Template(name=TemplateName.HUMAN_BOT))
    [sample] = encoder.encode([talk("hi", "Hello")])
    assert llama.convert_ids_to_tokens(sample.ids[sample.trained].tolist()) == ["Hello", "</s>"]
    assert llama.decode(sample.ids) == "<s><human>:hi\n<bot>:Hello</s>"


def test_loss_on_the_last_turn_or_on_other_roles_only(llama: Any) -> None:
    template = Template(name=TemplateName.VICUNA)
    record = talk("one", "two", "three", "four")
    [last] = make_encoder(llama, template, loss=Loss(turns=Turns.LAST)).encode([record])
    assert trained_text(llama, last).strip() == "four</s>"
    [user] = make_encoder(llama, template, loss=Loss(roles=(Role.USER,))).encode([record])
    assert "three" in trained_text(llama, user)
    assert "four" not in trained_text(llama, user)


def test_a_conversation_without_a_trained_turn_is_counted() -> None:
    encoder = make_encoder(make_tokenizer(), Template(name=TemplateName.VICUNA))
    assert list(encoder.encode([talk("only a question")])) == []
    assert encoder.counts["noLoss"] == 1


def long_record() -> Record:
    return talk(
        "the dog", "the fox " * 12, "the model", "the word " * 12, "the task", "the brown " * 12, system="be lazy"
    )


def length_of(record: Record, template: Template) -> int:
    [sample] = make_encoder(make_tokenizer(), template).encode([record])
    return len(sample.ids)


CHATML = Template(name=TemplateName.CHATML)


def test_too_long_drop_and_fail() -> None:
    whole = length_of(long_record(), CHATML)
    dropping = make_encoder(make_tokenizer(), CHATML, TooLong.DROP, whole - 1)
    assert list(dropping.encode([long_record()])) == []
    assert dropping.counts["tooLong"] == 1
    failing = make_encoder(make_tokenizer(), CHATML, TooLong.FAIL, whole - 1)
    with pytest.raises(UserError, match=rf"talk\.jsonl:1: {whole} tokens do not fit `sequenceLength` {whole - 1}"):
        list(failing.encode([long_record()]))
    fitting = make_encoder(make_tokenizer(), CHATML, TooLong.FAIL, whole)
    assert len(list(fitting.encode([long_record()]))) == 1


def test_too_long_cut_keeps_the_beginning_and_counts() -> None:
    whole = length_of(long_record(), CHATML)
    cutting = make_encoder(make_tokenizer(), CHATML, TooLong.CUT, whole - 10)
    [sample] = cutting.encode([long_record()])
    [entire] = make_encoder(make_tokenizer(), CHATML).encode([long_record()])
    assert sample.ids.tolist() == entire.ids[: whole - 10].tolist()
    assert cutting.counts["cut"] == 1
    nothing_left = make_encoder(make_tokenizer(), CHATML, TooLong.CUT, 20)
    assert list(nothing_left.encode([long_record()])) == []
    assert (nothing_left.counts["cut"], nothing_left.counts["noLoss"]) == (1, 1)


def test_too_long_split_splits_between_exchanges_and_keeps_the_system_prompt() -> None:
    tokenizer = make_tokenizer()
    capacity = length_of(long_record(), CHATML) - 1
    encoder = make_encoder(tokenizer, CHATML, TooLong.SPLIT, capacity)
    samples = list(encoder.encode([long_record()]))
    assert encoder.counts["splitRecords"] == 1
    assert [len(trained_starts(sample)) for sample in samples] == [2, 1]
    assert all("be lazy" in text for text in texts(tokenizer, samples))
    pieces = [talk(*(turn.content for turn in long_record().messages[first:last]), system="be lazy")
              for first, last in ((1, 5), (5, 7))]  # fmt: skip
    served = [served_prompts(tokenizer, piece)[-1] for piece in pieces]
    assert [sample.ids[: trained_starts(sample)[-1]].tolist() for sample in samples] == served


def test_too_long_split_drops_an_exchange_that_does_not_fit_alone() -> None:
    record = talk("the dog", "the fox", "the model", "the word " * 60, "the task", "the brown")
    encoder = make_encoder(make_tokenizer(), CHATML, TooLong.SPLIT, 100)
    samples = list(encoder.encode([record]))
    assert [len(trained_starts(sample)) for sample in samples] == [1, 1]
    assert encoder.counts["tooLong"] == 1


def test_too_long_split_with_loss_on_the_last_turn_keeps_the_end_of_the_conversation() -> None:
    tokenizer = make_tokenizer()
    capacity = length_of(long_record(), CHATML) - 1
    encoder = make_encoder(tokenizer, CHATML, TooLong.SPLIT, capacity, Loss(turns=Turns.LAST))
    [sample] = encoder.encode([long_record()])
    assert "the word" in tokenizer.decode(sample.ids)
    assert "the fox" not in tokenizer.decode(sample.ids)
    assert "the brown" in trained_text(tokenizer, sample)


def test_all_plain_text_carries_loss_and_is_split_into_rows() -> None:
    tokenizer = make_tokenizer()
    record = Record(text="the quick brown fox jumps over the lazy dog", where="a.txt:1")
    encoder = make_encoder(tokenizer, CHATML)
    [whole] = encoder.encode([record])
    assert whole.ids.tolist() == document(Encoder(tokenizer), whole.ids[1:-1]).tolist()
    assert whole.trained.all()
    splitting = make_encoder(tokenizer, CHATML, TooLong.SPLIT, 5)
    pieces = list(splitting.encode([record]))
    assert np.concatenate([piece.ids for piece in pieces]).tolist() == whole.ids.tolist()


def test_records_keep_their_order_and_counts_add_up() -> None:
    encoder = make_encoder(make_tokenizer(), CHATML)
    records = [talk("q", f"the {number}") if number % 2 else Record(text=f"the {number}") for number in range(600)]
    samples = list(encoder.encode(records))
    tokenizer = make_tokenizer()
    assert all(f"the {number}" in tokenizer.decode(sample.ids) for number, sample in enumerate(samples))
    assert encoder.counts["samples"] == encoder.counts["records"] == 600
    assert encoder.counts["tokens"] == sum(len(sample.ids) for sample in samples)
    assert encoder.counts["trainedTokens"] == sum(int(sample.trained[1:].sum()) for sample in samples)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            Record(messages=(Turn(Role.USER, "q"), Turn(Role.ASSISTANT, "a")), tools="{", where="x.json:3"),
            "x.json:3: `tools`",
        ),
        (
            Record(messages=(Turn(Role.TOOL, "e"), Turn(Role.ASSISTANT, "a")), where="x.json:4"),
            "x.json:4.*tool",
        ),
    ],
)
def test_a_record_that_cannot_be_rendered_is_named(record: Record, message: str) -> None:
    encoder = make_encoder(make_tokenizer(), Template(name=TemplateName.VICUNA))
    with pytest.raises(UserError, match=message):
        list(encoder.encode([record]))
