"""Ranked answers as samples: ids built by hand, loss on answers only, and trained prompts equal served ones."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from stagecoach_api.conversation import Loss, Role, Template, TemplateName, TooLong
from stagecoach_api.kinds.sft import Feedback, Hindsight, HindsightMode
from stagecoach_api.references import RecordSource
from stagecoach_trainer.data.reading import read_path
from stagecoach_trainer.data.records import Answer, Record, Turn
from stagecoach_trainer.runtime.errors import UserError
from stagecoach_trainer.samples.conversation import ConversationEncoder, Sample
from stagecoach_trainer.samples.hindsight import HindsightEncoder, answer_frame, choose_feedback, lead_in
from stagecoach_trainer.text.encoding import Encoder
from stagecoach_trainer.text.templates import Renderer, apply_template, message_of
from stagecoach_trainer.text.vocabulary import load_tokenizer
from tests import SHARED_DATA as DATA
from tests.trainer.models.makers import make_tokenizer

NAMED = [name for name in TemplateName if name is not TemplateName.CUSTOM]
VICUNA, CHATML = Template(name=TemplateName.VICUNA), Template(name=TemplateName.CHATML)
WORDS = Feedback(good="A good answer:", bad="A bad answer:")
ONE = Hindsight(feedback=(WORDS,))
BEST = Hindsight(mode=HindsightMode.BEST)
LONG = 100_000
SEED = 5


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """LLaMA's real vocabulary."""
    folder = tmp_path_factory.mktemp("llama")
    shutil.copyfile(DATA / "tokenizers" / "llama_32000.model", folder / "tokenizer.model")
    return load_tokenizer(folder)


def compared(*answers: str, ranks: tuple[int, ...] = (), prompt: str = "the dog", where: str = "x.json:1") -> Record:
    """Return a preference record, its answers given from best to worst unless `ranks` is set."""
    places = ranks or tuple(range(1, len(answers) + 1))
    found = tuple(Answer(answer, rank) for answer, rank in zip(answers, places, strict=True))
    return Record(messages=(Turn(Role.USER, prompt),), answers=found, where=where)


def make_encoder(
    tokenizer: Any,
    hindsight: Hindsight = ONE,
    template: Template = VICUNA,
    length: int = LONG,
    too_long: TooLong = TooLong.DROP,
    **changes: Any,
) -> HindsightEncoder:
    apply_template(tokenizer, template)
    parts = (Encoder(tokenizer), Renderer(tokenizer), Loss(), too_long, length, hindsight)
    return HindsightEncoder(*parts, **{"seed": SEED, **changes})


def plain_ids(tokenizer: Any, text: str, special: bool = False) -> list[int]:
    """Encode text that follows other text. `special`: whether names of special tokens in it are encoded as those
    tokens, or as ordinary text."""
    backend = tokenizer.backend_tokenizer
    if special:
        return [int(one) for one in backend.encode(f"<s>{text}", add_special_tokens=False).ids[1:]]
    backend.encode_special_tokens = True
    try:
        before, both = (backend.encode(one, add_special_tokens=False).ids for one in (".\n", f".\n{text}"))
    finally:
        backend.encode_special_tokens = False
    assert both[: len(before)] == before
    return [int(one) for one in both[len(before) :]]


def served_ids(tokenizer: Any, record: Record, feedback: str) -> list[int]:
    """Return, using only transformers, the ids that a model receives when its answer is to continue `feedback`."""
    messages = [message_of(turn.role, turn.content, turn.input) for turn in record.messages]
    messages.append({"role": "assistant", "content": f"{feedback}\n"})
    found = tokenizer.apply_chat_template(messages, continue_final_message=True, return_dict=False)
    return [int(one) for one in found]


def runs(sample: Sample) -> list[tuple[bool, list[int]]]:
    """Split a sample into runs of tokens that do or do not carry loss."""
    edges = [0, *(np.flatnonzero(np.diff(sample.trained.astype(int))) + 1).tolist(), len(sample.ids)]
    return [(bool(sample.trained[a]), sample.ids[a:b].tolist()) for a, b in pairwise(edges)]


def as_tuple(sample: Sample) -> tuple[Any, ...]:
    return sample.ids.tolist(), sample.trained.tolist(), sample.characters


# -- chains ------------------------------------------------------------------------------------------------------------


def test_a_chain_is_the_prompt_then_feedback_and_answers_from_worst_to_best(llama: Any) -> None:
    record = compared("forty two", "forty", "four", prompt="How many?")
    chain, last_link = make_encoder(llama).encode([record])
    front = Renderer(llama).render([message_of(Role.USER, "How many?")]) + "ASSISTANT: A bad answer:\n"
    prompt = [int(one) for one in llama.backend_tokenizer.encode(front, add_special_tokens=False).ids]
    assert prompt[0] == llama.bos_token_id
    pieces = [
        (False, prompt),
        (True, plain_ids(llama, "four")),
        (False, plain_ids(llama, "\nA bad answer:\n", special=True)),
        (True, plain_ids(llama, "forty")),
        (False, plain_ids(llama, "\nA good answer:\n", special=True)),
        (True, [*plain_ids(llama, "forty two"), llama.eos_token_id]),
    ]
    assert runs(chain) == pieces
    assert llama.decode(chain.ids).endswith(
        "USER: How many? ASSISTANT: A bad answer:\nfour\nA bad answer:\nforty\nA good answer:\nforty two</s>"
    )
    assert runs(last_link) == [(False, served_ids(llama, record, "A good answer:")), pieces[-1]]
    assert (chain.characters, last_link.characters) == (len("fourfortyforty two"), len("forty two"))


@pytest.mark.parametrize("name", NAMED)
def test_served_prompts_begin_trained_sequences_of_real_comparisons(llama: Any, name: TemplateName) -> None:
    hindsight = Hindsight()
    encoder = make_encoder(llama, hindsight, Template(name=name))
    path = DATA / "preference" / "comparison_zh.json"
    records = list(read_path(path, RecordSource(uri=path.name, max_samples=60)))
    used = set()
    for record in records:
        assert isinstance(record, Record)
        pair = choose_feedback(hindsight.feedback, SEED, record)
        used.add(pair.good)
        worst, best = record.answers[1].content, record.answers[0].content
        chain, last_link = encoder.encode([record])
        served = served_ids(llama, record, pair.good)
        assert last_link.ids[: len(served)].tolist() == served
        assert not last_link.trained[: len(served)].any()
        assert last_link.trained[len(served) :].all()
        messages = [message_of(turn.role, turn.content, turn.input) for turn in record.messages]
        assert llama.decode(served) == answer_frame(Renderer(llama), messages, ()).prompt + lead_in(pair.good)
        begun = served_ids(llama, record, pair.bad)
        assert chain.ids[: len(begun)].tolist() == begun
        answers = [llama.decode(ids) for trained, ids in runs(chain) if trained]
        assert len(answers) == 2
        assert answers[0] == worst
        assert answers[1].startswith(best)
        assert chain.ids[-1] == llama.eos_token_id
        assert runs(chain)[-1] == runs(last_link)[-1]
    assert used == {pair.good for pair in hindsight.feedback}
    assert encoder.counts["chains"] == 60
    assert encoder.counts["chainedAnswers"] == 120


def test_feedback_may_have_special_tokens_but_answers_never_do() -> None:
    tokenizer = make_tokenizer(special=("<|good|>", "<|bad|>"))
    hindsight = Hindsight(feedback=(Feedback(good="<|good|>", bad="<|bad|>"),))
    record = compared("the </s> <|bad|>", "the fox")
    chain, last_link = make_encoder(tokenizer, hindsight).encode([record])
    good, bad = tokenizer.convert_tokens_to_ids(["<|good|>", "<|bad|>"])
    for sample, number in ((chain, 1), (last_link, 0)):
        ids = sample.ids.tolist()
        assert ids.count(bad) == number
        assert ids.count(good) == 1
        assert ids.count(tokenizer.eos_token_id) == 1
        assert not sample.trained[np.isin(sample.ids, [good, bad])].any()
        assert ids[-1] == tokenizer.eos_token_id


def test_a_chain_ends_as_the_template_ends_a_turn(llama: Any) -> None:
    chain, last_link = make_encoder(llama, template=CHATML).encode([compared("yes", "no")])
    assert llama.decode(chain.ids[chain.trained]).endswith("yes<|im_end|></s>")
    assert llama.decode(last_link.ids[last_link.trained]) == "yes<|im_end|></s>"
    assert llama.decode(chain.ids).count("</s>") == 1


ANSWERS = st.lists(
    st.text(st.sampled_from("the dogfx \n白日<>/s"), min_size=1, max_size=12).filter(str.strip),
    min_size=2, max_size=6, unique=True,
)  # fmt: skip


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ANSWERS, st.sampled_from([VICUNA, CHATML, Template(name=TemplateName.ALPACA)]), st.integers(40, 200))
@example(["<s>", "<"], VICUNA, 153)
@example(["<", "</s>"], CHATML, 167)
def test_only_answers_and_the_end_carry_loss_whatever_the_answers(
    answers: list[str], template: Template, length: int
) -> None:
    tokenizer = make_tokenizer()
    encoder = make_encoder(tokenizer, template=template, length=length)
    samples = list(encoder.encode([compared(*answers)]))
    assert all(len(sample.ids) <= length for sample in samples)
    expected = [tuple(plain_ids(tokenizer, answer)) for answer in answers]
    for sample in samples:
        trained_runs = [ids for trained, ids in runs(sample) if trained]
        assert trained_runs[-1][-1] == tokenizer.eos_token_id
        assert tuple(trained_runs[-1][: len(expected[0])]) == expected[0]
        assert [tuple(ids) for ids in trained_runs[:-1]] == list(reversed(expected[1 : len(trained_runs)]))
        untrained = [tokenizer.decode(ids) for trained, ids in runs(sample) if not trained]
        assert untrained[-1].strip().endswith("A good answer:")
        assert all(text.strip().endswith("A bad answer:") for text in untrained[:-1])


# -- what is left out --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "kept", "counts"),
    [
        (compared("a", "b", "c", ranks=(1, 2, 2)), ["b", "a"], {"tiedAnswers": 1}),
        (compared("c", "a", "b", ranks=(3, 1, 2)), ["c", "b", "a"], {}),
        (compared("a", " \n", "b"), ["b", "a"], {"emptyAnswers": 1}),
        (compared("a", "b", "a"), ["b", "a"], {"repeatedAnswers": 1}),
        (compared("a", "a"), [], {"repeatedAnswers": 1, "sameAnswers": 1}),
        (compared("a", "b", ranks=(1, 1)), [], {"tiedAnswers": 1, "sameAnswers": 1}),
        (compared("", "b"), [], {"emptyAnswers": 1, "sameAnswers": 1}),
    ],
)
def test_tied_empty_and_equal_answers_are_left_out_of_chains_and_counted(
    record: Record, kept: list[str], counts: dict[str, int]
) -> None:
    tokenizer = make_tokenizer()
    encoder = make_encoder(tokenizer)
    samples = list(encoder.encode([record]))
    trained_runs = [tokenizer.decode(ids) for sample in samples[:1] for trained, ids in runs(sample) if trained]
    assert [text.removesuffix("</s>") for text in trained_runs] == kept
    names = ("tiedAnswers", "emptyAnswers", "repeatedAnswers", "sameAnswers")
    assert {name: encoder.counts[name] for name in names if encoder.counts[name]} == counts
    assert encoder.counts["chains"] == (1 if kept else 0)


def test_a_chain_that_is_too_long_loses_its_worst_answers_first() -> None:
    tokenizer = make_tokenizer()
    record = compared("the best", "the fox " * 4, "the model", "the tasks " * 6)
    whole, last_link = make_encoder(tokenizer).encode([record])
    by_length: dict[int, list[str]] = {}
    for length in range(len(last_link.ids), len(whole.ids) + 1):
        encoder = make_encoder(tokenizer, length=length)
        first = next(iter(encoder.encode([record])))
        assert len(first.ids) <= length
        by_length[length] = [tokenizer.decode(ids).strip() for trained, ids in runs(first) if trained]
        assert encoder.counts["shortenedChains"] == (length < len(whole.ids))
    order = ["the tasks " * 6, "the model", "the fox " * 4, "the best</s>"]
    assert {tuple(found) for found in by_length.values()} == {
        tuple(text.strip() for text in order[start:]) for start in range(4)
    }
    assert sorted(by_length.values(), key=len) == list(by_length.values())


def test_a_best_answer_that_does_not_fit_alone_is_dropped_or_reported() -> None:
    tokenizer = make_tokenizer()
    record = compared("the best", "the worst", where="x.json:7")
    _, last_link = make_encoder(tokenizer).encode([record])
    short = len(last_link.ids) - 1
    dropping = make_encoder(tokenizer, length=short)
    assert list(dropping.encode([record])) == []
    assert (dropping.counts["tooLong"], dropping.counts["shortenedChains"]) == (1, 0)
    with pytest.raises(UserError, match=rf"x\.json:7: {short + 1} tokens do not fit"):
        list(make_encoder(tokenizer, length=short, too_long=TooLong.FAIL).encode([record]))
    [cut] = make_encoder(tokenizer, length=short, too_long=TooLong.CUT).encode([record])
    assert cut.ids.tolist() == last_link.ids[:short].tolist()


# -- randomness --------------------------------------------------------------------------------------------------------


def test_feedback_depends_only_on_the_seed_and_the_content_of_a_record() -> None:
    feedback = Hindsight().feedback
    records = [compared(f"a {number}", f"b {number}", prompt=f"q {number}") for number in range(300)]
    chosen = [choose_feedback(feedback, 1, record) for record in records]
    moved = [replace(record, where="elsewhere:9", source="other") for record in records]
    assert [choose_feedback(feedback, 1, record) for record in moved] == chosen
    assert [choose_feedback(feedback, 2, record) for record in records] != chosen
    counts = Counter(pair.good for pair in chosen)
    assert min(counts[pair.good] for pair in feedback) > 70
    other = compared("b 0", "a 0", prompt="q 0")
    assert len({choose_feedback(feedback, seed, other) == choose_feedback(feedback, seed, records[0])
                for seed in range(30)}) == 2  # fmt: skip


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1000))
def test_the_order_of_records_changes_only_the_order_of_samples(seed: int) -> None:
    tokenizer = make_tokenizer()
    records = [compared(f"the {number}", "the fox", prompt=f"what is {number}") for number in range(30)]
    records += [Record(text=f"the lazy {number}") for number in range(5)]
    records += [Record(messages=(Turn(Role.USER, "q"), Turn(Role.ASSISTANT, f"the {number}"))) for number in range(5)]
    shuffled = random.Random(seed).sample(records, len(records))
    first, second = (make_encoder(tokenizer, Hindsight()) for _ in range(2))
    found, expected = ([as_tuple(sample) for sample in encoder.encode(items)]
                       for encoder, items in ((first, shuffled), (second, records)))  # fmt: skip
    assert sorted(found) == sorted(expected)
    assert len(found) == 30 * 2 + 10
    assert first.counts == second.counts


# -- the best answer ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [VICUNA, CHATML])
def test_the_best_answer_is_trained_on_like_any_conversation(llama: Any, template: Template) -> None:
    turns = (
        Turn(Role.SYSTEM, "be short"),
        Turn(Role.USER, "one"),
        Turn(Role.ASSISTANT, "two"),
        Turn(Role.USER, "three"),
    )
    answers = (Answer("six", 3), Answer("four", 1), Answer("five", 1))
    encoder = make_encoder(llama, BEST, template)
    found = [as_tuple(sample) for sample in encoder.encode([Record(messages=turns, answers=answers)])]
    plain = ConversationEncoder(Encoder(llama), Renderer(llama), Loss(), TooLong.DROP, LONG)
    talk = Record(messages=(*turns, Turn(Role.ASSISTANT, "four")))
    assert found == [as_tuple(sample) for sample in plain.encode([talk])]
    assert encoder.counts["bestAnswers"] == 1
    assert encoder.counts["trainedTokens"] == plain.counts["trainedTokens"]


def test_a_rejected_answer_is_never_taken_for_the_best() -> None:
    encoder = make_encoder(make_tokenizer(), BEST)
    assert list(encoder.encode([compared("", "the worst"), compared("same", "same")])) == []
    assert encoder.counts["sameAnswers"] == 2
    assert encoder.counts["bestAnswers"] == 0


# -- rejections --------------------------------------------------------------------------------------------------------


def test_ranked_answers_without_hindsight_and_answers_without_ranks_are_rejected() -> None:
    tokenizer = make_tokenizer()
    make_encoder(tokenizer)
    plain = ConversationEncoder(Encoder(tokenizer), Renderer(tokenizer), Loss(), TooLong.DROP, LONG)
    with pytest.raises(UserError, match=r"x\.json:1: a preference record.*`sft` with `hindsight`"):
        list(plain.encode([compared("a", "b")]))
    liked = Record(messages=(Turn(Role.USER, "q"),), answers=(Answer("a", liked=True),), where="x.json:2")
    for hindsight in (ONE, BEST):
        with pytest.raises(UserError, match=r"x\.json:2: .*`dpo` stage trains on `labels`"):
            list(make_encoder(tokenizer, hindsight).encode([liked]))


@pytest.mark.parametrize(("good", "bad"), [("same:", "same: "), ("", "bad"), ("good", " ")])
def test_feedback_that_does_not_separate_good_from_bad_is_rejected(good: str, bad: str) -> None:
    feedback = (WORDS, Feedback(good=good, bad=bad))
    with pytest.raises(UserError, match=r"hindsight\.feedback\[1\]"):
        make_encoder(make_tokenizer(), Hindsight(feedback=feedback))


def test_a_template_that_omits_the_assistants_content_is_rejected_with_the_record() -> None:
    jinja = "{{ messages[0]['content'] }}{% if messages|length > 1 or add_generation_prompt %}:{% endif %}"
    jinja += "{% if messages|length > 1 %}{{ eos_token }}{% endif %}"
    encoder = make_encoder(make_tokenizer(), template=Template(name=TemplateName.CUSTOM, jinja=jinja))
    with pytest.raises(UserError, match=r"x\.json:1: turn 1 .assistant.: the chat template leaves out its content"):
        list(encoder.encode([compared("a", "b")]))


def test_chains_can_be_made_without_their_last_links() -> None:
    tokenizer = make_tokenizer()
    [chain] = make_encoder(tokenizer, with_last_links=False).encode([compared("a", "b")])
    assert as_tuple(chain) == as_tuple(next(iter(make_encoder(tokenizer).encode([compared("a", "b")]))))
