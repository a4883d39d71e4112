"""Records as closed contracts: what a field means is honoured or refused, and every other field is named."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stagecoach_api.conversation import Role
from stagecoach_api.references import FieldMapping, Format
from stagecoach_trainer.data.formats import detect_format, parser_for
from stagecoach_trainer.data.records import Answer, Record, RecordError, Turn

NO_FIELDS = FieldMapping()
QUESTION, ANSWER = {"role": "user", "content": "ask"}, {"role": "assistant", "content": "reply"}
ALPACA = {"instruction": "ask", "input": "more", "output": "reply"}
RENDERED = "Below is an instruction.\n\n### Instruction:\nask\n\n### Input:\nmore\n\n### Response:\nreply"

LAYOUTS: dict[Format, dict[str, Any]] = {
    Format.TEXT: {"text": "a text"},
    Format.ALPACA: ALPACA,
    Format.SHAREGPT: {"conversations": [{"from": "human", "value": "ask"}, {"from": "gpt", "value": "reply"}]},
    Format.MESSAGES: {"messages": [QUESTION, ANSWER]},
    Format.PAIRS: {"prompt": "ask", "chosen": "reply", "rejected": "other"},
    Format.COMPARISON: {"user_input": "ask", "completion_a": "reply", "completion_b": "other"},
    Format.RANKED: {"prompt": "ask", "answers": ["reply", "other"]},
    Format.LABELS: {"prompt": "ask", "completion": "reply", "label": False},
}


def parse(value: dict[str, Any], format_: Format = Format.AUTO, fields: FieldMapping = NO_FIELDS) -> Record:
    if format_ is Format.AUTO:
        format_ = detect_format(value, fields)
    return parser_for(format_, fields, value)(value)


# -- honoured ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("history", [[["q1", "a1"], ["q2", "a2"]], '[["q1", "a1"], ["q2", "a2"]]'])
def test_earlier_turns_of_alpaca_are_turns(history: Any) -> None:
    """LoongForge#47, unsloth#11053: `history` was dropped."""
    record = parse({**ALPACA, "history": history, "system": "be kind"})
    assert [(turn.role, turn.content) for turn in record.messages] == [
        (Role.SYSTEM, "be kind"),
        *[(Role.USER, "q1"), (Role.ASSISTANT, "a1"), (Role.USER, "q2"), (Role.ASSISTANT, "a2")],
        *[(Role.USER, "ask"), (Role.ASSISTANT, "reply")],
    ]
    assert record.unread == ()


def test_earlier_turns_are_those_of_a_prompt_too() -> None:
    pair = {"instruction": "ask", "input": "more", "history": [["q", "a"]], "chosen": "reply", "rejected": "other"}
    record = parse(pair)
    assert record.messages == (Turn(Role.USER, "q"), Turn(Role.ASSISTANT, "a"), Turn(Role.USER, "ask", "more"))
    assert record.unread == ()


@pytest.mark.parametrize("history", ["no list", [["q"]], [["q", "a", "b"]], [["q", 3]], [{"q": "a"}]])
def test_a_history_of_another_form_is_refused_by_name(history: Any) -> None:
    with pytest.raises(RecordError, match="`history"):
        parse({**ALPACA, "history": history})


@pytest.mark.parametrize("name", ["system", "system_prompt", "system_message"])
@pytest.mark.parametrize("format_", [Format.ALPACA, Format.SHAREGPT, Format.MESSAGES, Format.PAIRS, Format.LABELS])
def test_a_system_prompt_is_read_under_its_published_names(format_: Format, name: str) -> None:
    record = parse({**LAYOUTS[format_], name: "be kind"})
    assert record.messages[0] == Turn(Role.SYSTEM, "be kind")
    assert record.unread == ()


def test_alpaca_has_tools_and_reasoning() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    record = parse({**ALPACA, "tools": tools, "reasoning_content": "hm"})
    assert json.loads(record.tools or "") == tools
    assert record.messages[-1].reasoning == "hm"


@pytest.mark.parametrize("text", [RENDERED, f"  {RENDERED}\n</s>"])
def test_alpaca_with_its_rendering_is_alpaca(text: str) -> None:
    """tatsu-lab/alpaca's Parquet has `text` next to the fields it is made of."""
    value = {**ALPACA, "text": text}
    assert detect_format(value, NO_FIELDS) is Format.ALPACA
    assert parse(value).unread == ("text",)
    assert (
        detect_format({"messages": [QUESTION, ANSWER], "text": "User: ask\nBot: reply"}, NO_FIELDS) is Format.MESSAGES
    )


@pytest.mark.parametrize("verdict", [True, False])
@pytest.mark.parametrize("name", ["label", "kto_tag"])
@pytest.mark.parametrize("format_", [Format.ALPACA, Format.SHAREGPT, Format.MESSAGES])
def test_a_conversation_with_a_label_is_a_judged_answer(format_: Format, name: str, verdict: bool) -> None:
    """TRL's and LLaMA-Factory's KTO records: the label was dropped, and disliked answers were trained on."""
    value = {**LAYOUTS[format_], name: verdict}
    assert detect_format(value, NO_FIELDS) is Format.LABELS
    record = parse(value)
    assert record.answers == (Answer("reply", liked=verdict),)
    assert [turn.content for turn in record.messages] == ["ask"]
    assert record.unread == ()
    fields = FieldMapping(label="good")
    assert parse({**LAYOUTS[format_], "good": verdict}, Format.LABELS, fields).answers == record.answers


def test_scores_that_contradict_the_order_are_noted() -> None:
    pair = LAYOUTS[Format.PAIRS]
    assert parse({**pair, "score_chosen": 1.0, "score_rejected": "2"}).scores_disagree
    assert parse({**pair, "chosen-rating": 1.0, "rejected-rating": 2.0}).scores_disagree
    assert not parse({**pair, "score_chosen": 2, "score_rejected": 2}).scores_disagree
    answers = [{"content": "a", "rank": 1, "score": 1}, {"content": "b", "rank": 2, "score": 9}]
    assert parse({"prompt": "q", "answers": answers}).scores_disagree


@pytest.mark.parametrize(
    ("cell", "liked"), [("True", True), ("false", False), ("1", True), ("0", False), ("bad", False)]
)
def test_verdicts_of_tables_are_text(cell: str, liked: bool) -> None:
    record = parse({"prompt": "ask", "completion": "reply", "label": cell}, Format.LABELS)
    assert record.answers == (Answer("reply", liked=liked),)


@pytest.mark.parametrize("format_", [Format.MESSAGES, Format.SHAREGPT])
def test_turns_of_tables_are_json(format_: Format) -> None:
    ((name, turns),) = LAYOUTS[format_].items()
    value = {name: json.dumps(turns), "label": ""}
    assert detect_format(value, NO_FIELDS) is format_
    assert parse(value) == parse({name: turns})
    assert parse({name: json.dumps(turns), "label": "False"}, Format.LABELS).answers == (Answer("reply", liked=False),)


# -- refused -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "formats"),
    [
        pytest.param({**ALPACA, "text": "something else"}, "`text` and `alpaca`", id="text that is no rendering"),
        pytest.param({"messages": [QUESTION, ANSWER], "text": "x"}, "`text` and `messages`", id="text and messages"),
        pytest.param({**ALPACA, "messages": [QUESTION]}, "`alpaca` and `messages`", id="alpaca and messages"),
        pytest.param({**ALPACA, "chosen": "a", "rejected": "b"}, "`pairs` and `alpaca`", id="alpaca and pairs"),
        pytest.param({"messages": [QUESTION, ANSWER], "label": 1}, "`labels` and `messages`", id="a class?"),
    ],
)
def test_a_record_that_fits_two_layouts_is_refused(value: dict[str, Any], formats: str) -> None:
    with pytest.raises(RecordError, match=rf"fit {formats}; set `format`"):
        detect_format(value, NO_FIELDS)


def test_turns_under_two_names_are_refused_until_one_is_named() -> None:
    value = {"messages": [QUESTION, ANSWER], "conversations": [QUESTION]}
    with pytest.raises(RecordError, match=r"name one in `fields\.messages`"):
        detect_format(value, NO_FIELDS)
    record = parse(value, fields=FieldMapping(messages="messages"))
    assert (len(record.messages), record.unread) == (2, ("conversations",))


IMAGES: dict[str, Any] = {"images": ["a.png"], "image": "a.png", "audio": {"path": "a"}, "videos": ["v"]}
REFUSED: list[tuple[Format, dict[str, Any]]] = [
    *((format_, {name: value}) for format_ in LAYOUTS for name, value in IMAGES.items()),
    *((format_, {"weight": 0.5}) for format_ in LAYOUTS),
    *((format_, {"weights": [1, 0]}) for format_ in LAYOUTS),
    *((format_, {"train": False}) for format_ in LAYOUTS),
    *((format_, {"loss": 0}) for format_ in LAYOUTS),
    *((format_, {"label": False}) for format_ in (Format.ALPACA, Format.MESSAGES, Format.SHAREGPT)),
    *((format_, {"history": [["q", "a"]]}) for format_ in (Format.MESSAGES, Format.SHAREGPT)),
    *((format_, {"documents": ["d"]}) for format_ in LAYOUTS if format_ is not Format.TEXT),
    *((Format.ALPACA, more) for more in ({"weight": "0.5"}, {"train": "False"}, {"label": "false"})),
    (Format.MESSAGES, {"rejected_response": "b"}),
    (Format.PAIRS, {"chat_template_kwargs": {"enable_thinking": False}}),
]


@pytest.mark.parametrize(("format_", "more"), REFUSED)
def test_a_field_that_would_change_what_is_learnt_is_refused_unless_it_is_ignored(
    format_: Format, more: dict[str, Any]
) -> None:
    value = {**LAYOUTS[format_], **more}
    (name,) = more
    with pytest.raises(RecordError, match=rf"^`{name}` .*`fields\.ignore`"):
        parse(value, format_)
    record = parse(value, format_, FieldMapping(ignore=(name,)))
    assert record == parse(LAYOUTS[format_], format_)
    assert record.unread == ()


@pytest.mark.parametrize("more", [{"weight": 1}, {"weight": "1.0"}, {"train": True}, {"loss": 1}, {"images": []}])
def test_a_field_that_changes_nothing_is_neither_refused_nor_counted(more: dict[str, Any]) -> None:
    assert parse({**ALPACA, **more}).unread == ()


@pytest.mark.parametrize("key", ["images", "audio", "tools"])
def test_media_and_tools_in_a_turn_are_refused_with_the_turn(key: str) -> None:
    value = {"messages": [QUESTION, {**ANSWER, key: [{"a": 1}]}]}
    with pytest.raises(RecordError, match=rf"^`messages\[1\]`: `{key}`"):
        parse(value)
    for name in (key, f"messages[].{key}"):
        assert parse(value, fields=FieldMapping(ignore=(name,))).unread == ()


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"loss_mask": 0}, "marks what carries loss, but not how"),
        ({"mask": 1}, "marks what carries loss, but not how"),
        ({"reasoning_details": [{"text": "hm"}]}, "is reasoning in a form that is not read"),
        ({"thought": "hm"}, "is reasoning in a form that is not read"),
        ({"tool_call": {"name": "add"}}, "is a call in a form that is not read"),
        ({"toolCalls": [{"name": "add"}]}, "is a call in a form that is not read"),
        ({"channel": "analysis"}, "is not `final`, so the turn is reasoning or a call"),
    ],
)
def test_losses_reasoning_and_calls_in_forms_that_are_not_read_are_refused(more: dict[str, Any], reason: str) -> None:
    (name,) = more
    value = {"messages": [QUESTION, {**ANSWER, **more}]}
    with pytest.raises(RecordError, match=rf"^`messages\[1\]`: `{name}` {reason}.*`fields\.ignore`"):
        parse(value)
    assert parse(value, fields=FieldMapping(ignore=(name,))).unread == ()


def test_reasoning_that_is_given_in_a_second_form_is_named_only() -> None:
    """OpenRouter writes `reasoning` and `reasoning_details`, which state the same."""
    turn = {**ANSWER, "reasoning": "hm", "reasoning_details": [{"text": "hm"}], "channel": "final"}
    record = parse({"messages": [QUESTION, turn]})
    assert (record.messages[-1].reasoning, record.unread) == ("hm", ("messages[].reasoning_details",))


def test_reasoning_next_to_the_turns_is_refused() -> None:
    with pytest.raises(RecordError, match=r"^`reasoning_content` is at the record: write it in the turn"):
        parse({"messages": [QUESTION, ANSWER], "reasoning_content": "hm"})


def test_a_picture_in_a_part_of_text_is_refused() -> None:
    part = {"type": "text", "text": "ask", "image_url": {"url": "a.png"}}
    with pytest.raises(RecordError, match=r"^`messages\[0\]`: `image_url` is a medium"):
        parse({"messages": [{"role": "user", "content": [part]}, ANSWER]})


def test_of_two_fields_with_one_meaning_none_is_chosen_in_silence() -> None:
    tool, function = {"name": "add"}, {"name": "add", "arguments": {"a": 1}, "parameters": {"b": 2}}
    with pytest.raises(RecordError, match="has both `tools` and `functions`; leave one out"):
        parse({"messages": [QUESTION, ANSWER], "tools": [tool], "functions": [tool]})
    with pytest.raises(RecordError, match="has both `arguments` and `parameters`; leave one out"):
        parse({"messages": [QUESTION, {"role": "assistant", "tool_calls": [{"function": function}]}]})
    with pytest.raises(RecordError, match=r"`messages\[0\]` has both `from` and `role`, which fit two layouts"):
        parse({"messages": [{**QUESTION, "from": "human", "value": "other"}, ANSWER]})


@pytest.mark.parametrize(
    ("value", "formats"),
    [
        (LAYOUTS[Format.PAIRS] | LAYOUTS[Format.LABELS], "`pairs` and `labels`"),
        (LAYOUTS[Format.PAIRS] | LAYOUTS[Format.RANKED], "`pairs` and `ranked`"),
        (LAYOUTS[Format.COMPARISON] | LAYOUTS[Format.PAIRS], "`comparison` and `pairs`"),
        (LAYOUTS[Format.RANKED] | LAYOUTS[Format.LABELS], "`ranked` and `labels`"),
    ],
)
def test_preferences_that_fit_two_layouts_are_refused_until_one_is_named(value: dict[str, Any], formats: str) -> None:
    with pytest.raises(RecordError, match=f"fit {formats}; set `format` to the one to read"):
        detect_format(value, NO_FIELDS)
    for format_ in formats.replace("`", "").split(" and "):
        assert parse(value, Format(format_)).answers


def test_marks_of_answers_in_a_list_of_their_own_are_refused() -> None:
    """RRHF's data: `scores` next to the answers, which were taken for sorted ones."""
    value = {"prompt": "q", "answers": ["a", "b"], "scores": [1, 5]}
    with pytest.raises(RecordError, match=r"^`scores` has a mark for each of `answers`"):
        parse(value)
    assert parse(value, fields=FieldMapping(ignore=("scores",))).answers[0].content == "a"


def test_two_verdicts_that_differ_are_refused() -> None:
    value = {"prompt": "q", "completion": "a", "label": True, "kto_tag": False}
    with pytest.raises(RecordError, match="`label` and `kto_tag` contradict each other"):
        parse(value)
    assert parse(value | {"kto_tag": True}).answers[0].liked is True


def test_the_id_of_a_call_in_a_turn_that_is_no_result_is_named() -> None:
    record = parse({"messages": [{**QUESTION, "tool_call_id": "c1"}, ANSWER]})
    assert record.unread == ("messages[].tool_call_id",)


def test_turns_of_sharegpt_are_read_under_messages_too() -> None:
    value = {"messages": [{"from": "human", "value": "ask"}, {"from": "gpt", "value": "reply"}]}
    assert parse(value).messages == parse(LAYOUTS[Format.MESSAGES]).messages


# -- counted -----------------------------------------------------------------------------------------------------------

NAMES = st.text("xyz_", min_size=5, max_size=8)
VALUES = st.one_of(st.integers(), st.booleans(), st.text(min_size=1), st.lists(st.integers(), min_size=1))


@given(st.sampled_from(sorted(LAYOUTS)), st.dictionaries(NAMES, VALUES, max_size=4))
@settings(max_examples=100, deadline=None)
def test_unknown_fields_are_always_named_and_change_nothing(format_: Format, more: dict[str, Any]) -> None:
    value = LAYOUTS[format_]
    for record in (parse({**more, **value}, format_), parse({**more, **value})):
        assert set(record.unread) == set(more)
        assert record == parse(value)


@given(st.sampled_from([Format.MESSAGES, Format.SHAREGPT]), st.dictionaries(NAMES, VALUES, max_size=3))
@settings(max_examples=50, deadline=None)
def test_unknown_fields_of_turns_are_named(format_: Format, more: dict[str, Any]) -> None:
    ((name, turns),) = LAYOUTS[format_].items()
    record = parse({name: [turns[0], {**more, **turns[1]}]})
    assert set(record.unread) == {f"{name}[].{key}" for key in more}
    pair = {"prompt": turns[:1], "chosen": [{**more, **turns[1]}], "rejected": [turns[1]]}
    assert set(parse(pair).unread) == {f"chosen[].{key}" for key in more}


def in_place(place: str, more: dict[str, Any]) -> dict[str, Any]:
    """Return a conversation with more fields at a place of its last turn."""
    function: dict[str, Any] = {"name": "add", "arguments": {"a": 1}}
    turn: dict[str, Any]
    match place:
        case "messages[].content[]":
            turn = {"role": "assistant", "content": [{"type": "text", "text": "reply", **more}]}
        case "messages[].tool_calls[]":
            turn = {"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": function, **more}]}
        case "messages[].tool_calls[].function":
            turn = {"role": "assistant", "tool_calls": [{"function": {**function, **more}}]}
        case "messages[].function_call":
            turn = {"role": "assistant", "function_call": {**function, **more}}
        case "messages[].content":
            turn = {"role": "function_call", "content": json.dumps({**function, **more})}
        case _:
            turn = {**ANSWER, **more}
    return {"messages": [QUESTION, turn]}


PLACES = st.sampled_from(
    [
        *("messages[]", "messages[].content[]", "messages[].content", "messages[].function_call"),
        *("messages[].tool_calls[]", "messages[].tool_calls[].function"),
    ]
)


@given(PLACES, st.dictionaries(NAMES, VALUES, max_size=3))
@settings(max_examples=100, deadline=None)
def test_unknown_fields_are_named_at_any_depth_of_a_turn(place: str, more: dict[str, Any]) -> None:
    """The result that a data set keeps in a call, and what it keeps in a part of a content, went without a word."""
    record = parse(in_place(place, more))
    assert set(record.unread) == {f"{place}.{key}" for key in more}
    assert record == parse(in_place(place, {}))
    ignored = FieldMapping(ignore=tuple(f"{place}.{key}" for key in more))
    assert parse(in_place(place, more), fields=ignored).unread == ()


def test_unknown_fields_of_ranked_answers_are_named() -> None:
    answers = [{"content": "a", "score": 2, "model": "m"}, {"content": "b", "score": 1}]
    assert parse({"prompt": "q", "answers": answers, "id": 4}).unread == ("id", "answers[].model")


KNOWN: dict[str, Any] = {
    "system": "s1 words",
    "history": [["h1 words", "h2 words"]],
    "tools": [{"type": "function", "function": {"name": "toolname"}}],
    "input": "i1 words",
    "reasoning_content": "r1 words",
    "images": ["a.png"],
    "weight": 0.5,
    "label": False,
    "documents": ["d1 words"],
    "text": "t1 words",
    "id": "id1 words",
}


@given(st.sampled_from(sorted(LAYOUTS)), st.sets(st.sampled_from(sorted(KNOWN))))
@settings(max_examples=200, deadline=None)
def test_every_known_field_is_in_the_record_or_refused_or_named(format_: Format, names: set[str]) -> None:
    value = {**{name: KNOWN[name] for name in names}, **LAYOUTS[format_]}
    record: Record | None
    try:
        record = parse(value, format_)
    except RecordError as error:
        refused = str(error)
        record = None
    if record is None:
        assert any(f"`{name}`" in refused for name in names)
        return
    text = repr(record)
    for name in names - set(LAYOUTS[format_]):
        words = {"history": "h1 words", "tools": "toolname"}.get(name, str(KNOWN[name]))
        assert words in text or name in record.unread
