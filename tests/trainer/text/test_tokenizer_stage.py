from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stagecoach_api.kinds.tokenizer import TokenizerStage, TrainVocabulary
from stagecoach_trainer.runtime.context import StageOutcome
from stagecoach_trainer.runtime.errors import UserError
from stagecoach_trainer.stages.tokenizer import run, sample_lines
from stagecoach_trainer.text.pieces import load_vocabulary, sentences, train_vocabulary
from tests import SHARED_DATA as SHARED
from tests.trainer.data.makers import CHINESE, LLAMA, FolderContext, make_context, write_jsonl

pytestmark = pytest.mark.slow

BASE = {"uri": str(LLAMA)}
POEMS = {
    "uri": str(SHARED / "corpus" / "chinese_classics.jsonl"),
    "fields": {"ignore": ["source"]},
    "maxSamples": 400,
}
MEASURED = [
    {**POEMS, "name": "zh"},
    {"uri": str(SHARED / "sft" / "alpaca_en.json"), "name": "en", "maxSamples": 100},
]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small English vocabulary of 500 pieces."""
    values = json.loads((SHARED / "sft" / "alpaca_en.json").read_text(encoding="utf-8"))[:200]
    config = TrainVocabulary.model_validate({"on": [{"uri": "x"}], "vocabSize": 500})
    path = tmp_path_factory.mktemp("small") / "small.model"
    path.write_bytes(train_vocabulary(config, list(sentences(v["output"] for v in values)), "train").serialize())
    return path


def make(context: FolderContext, **fields: Any) -> StageOutcome:
    return run(TokenizerStage.model_validate(fields), context)


def report_of(context: FolderContext) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((context.output / "report.json").read_text(encoding="utf-8"))
    return report


def test_the_papers_vocabulary_is_made_and_measured(tmp_path: Path) -> None:
    context = make_context(tmp_path)
    outcome = make(
        context, base=BASE, merge={"vocabulary": {"uri": str(CHINESE)}}, add={"padToken": "[PAD]"}, measureOn=MEASURED
    )
    metrics = outcome.metrics
    assert metrics["vocabulary.size"] == 49_954  # Chinese-Alpaca's, with its pad token
    assert metrics["disagreements"] == 0
    assert metrics["tokensPerCharacter.zh.after"] < 0.6 * metrics["tokensPerCharacter.zh.before"]
    assert metrics["roundTripFailures.zh"] == metrics["roundTripFailures.en"] == 0
    assert metrics["vocabulary.unreachable"] == 338
    assert 0 < metrics["vocabulary.unseen"] < 17_953
    report = report_of(context)
    assert report["probes"]["asciiChanged"] > 0
    assert "a unigram vocabulary is merged into a BPE base" in report["warnings"][0]
    text = (context.output / "report.md").read_text(encoding="utf-8")
    assert "49,954 pieces (bpe): 32,000 of the base, 17,953 new." in text


def test_han_pieces_do_not_change_ascii_encodings(tmp_path: Path) -> None:
    context = make_context(tmp_path)
    merge = {"vocabulary": {"uri": str(CHINESE)}, "characters": "cjk"}
    outcome = make(context, base=BASE, merge=merge, measureOn=MEASURED[1:])
    assert outcome.metrics["asciiChanged"] == 0
    assert outcome.metrics["tokensPerCharacter.en.after"] == outcome.metrics["tokensPerCharacter.en.before"]
    assert report_of(context)["sets"]["en"]["asciiLines"] > 200


def test_score_zero_gives_warnings(tmp_path: Path) -> None:
    context = make_context(tmp_path)
    merge = {"vocabulary": {"uri": str(CHINESE)}, "score": "zero"}
    outcome = make(context, base=BASE, merge=merge, measureOn=MEASURED[1:])
    assert outcome.metrics["disagreements"] > 0
    warnings = "\n".join(report_of(context)["warnings"])
    assert "`score: zero`" in warnings
    assert "SentencePiece and transformers encode texts differently" in warnings


def test_a_trained_vocabulary_is_merged_and_base_ids_stay(tmp_path: Path) -> None:
    context = make_context(tmp_path)
    train = {"on": [POEMS], "vocabSize": 2600, "characterCoverage": 0.98}
    outcome = make(context, base=BASE, train=train, merge={}, measureOn=MEASURED)
    old, new = load_vocabulary(LLAMA), load_vocabulary(context.output / "tokenizer.model")
    assert new.pieces[: old.size] == old.pieces
    assert outcome.metrics["vocabulary.unreachable"] == 0
    assert outcome.metrics["asciiChanged"] == 0
    assert report_of(context)["warnings"] == []
    english = json.loads((SHARED / "sft" / "alpaca_en.json").read_text(encoding="utf-8"))
    texts = [value["output"] for value in english if value["output"].isascii()]
    assert new.processor().encode(texts) == old.processor().encode(texts)


def test_a_vocabulary_trained_from_scratch_has_no_counts_before(tmp_path: Path) -> None:
    context = make_context(tmp_path)
    train = {"on": [{key: value for key, value in MEASURED[1].items() if key != "name"}], "vocabSize": 600}
    outcome = make(context, train=train, add={"specialTokens": ["<|im_start|>"]}, measureOn=MEASURED[1:])
    assert outcome.metrics["vocabulary.size"] == 601
    assert "tokensPerCharacter.en.before" not in outcome.metrics
    assert report_of(context)["sets"]["en"]["asciiChanged"] is None


def test_listed_characters_are_added_as_ziya_did(tmp_path: Path) -> None:
    base = load_vocabulary(LLAMA)
    characters = [piece for piece in load_vocabulary(CHINESE).pieces if len(piece) == 1 and piece >= "\u4e00"]
    known = set(base.pieces)
    missing = [character for character in characters if character not in known]
    listed = tmp_path / "characters.txt"
    listed.write_text("\ufeff" + "\n".join(characters) + "\n", encoding="utf-8")
    context = make_context(tmp_path)
    outcome = make(context, base=BASE, add={"characters": "龘", "charactersFrom": str(listed)})
    made = load_vocabulary(context.output / "tokenizer.model")
    assert made.pieces == [*base.pieces, "龘", *missing]
    assert len(characters) - 1000 < len(missing) < len(characters)
    assert outcome.metrics["disagreements"] == 0


def test_an_artifact_can_be_a_base(tmp_path: Path, small: Path) -> None:
    first = make_context(tmp_path / "first")
    make(first, base={"uri": str(small)}, add={"padToken": "[PAD]", "characters": "龘"})
    second = make_context(tmp_path / "second", stages={"vocabulary": first.output})
    make(second, base={"stage": "vocabulary"}, add={"specialTokens": ["<|im_start|>"]})
    pieces = load_vocabulary(second.output / "tokenizer.model").pieces
    assert pieces[500:] == ["龘", "[PAD]", "<|im_start|>"]


def folder_with(tmp_path: Path, model: Path, **files: object) -> Path:
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(model.read_bytes())
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
    return folder


def test_tokens_that_a_hugging_face_folder_adds_keep_their_ids(tmp_path: Path, small: Path) -> None:
    decoder = {"0": {"content": "<unk>", "special": True}, "501": {"content": "<end>", "special": True}}
    folder = folder_with(
        tmp_path, small, added_tokens={"[PAD]": 500}, tokenizer_config={"added_tokens_decoder": decoder}
    )
    context = make_context(tmp_path)
    make(context, base={"uri": str(folder)}, add={"specialTokens": ["[PAD]", "<new>"]})
    assert load_vocabulary(context.output / "tokenizer.model").pieces[500:] == ["[PAD]", "<end>", "<new>"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        pytest.param({"added_tokens": {"[PAD]": 505}}, "leave a gap after the 500 pieces", id="a gap"),
        pytest.param({"tokenizer_config": {"auto_map": {}}}, "trust_remote_code", id="code of its own"),
    ],
)
def test_a_base_folder_whose_ids_cannot_be_kept_is_rejected(
    tmp_path: Path, small: Path, files: dict[str, Any], message: str
) -> None:
    folder = folder_with(tmp_path, small, **files)
    with pytest.raises(UserError, match=message):
        make(make_context(tmp_path), base={"uri": str(folder)}, add={"characters": "龘"})


def test_a_folder_without_sentencepiece_cannot_be_a_base(tmp_path: Path, small: Path) -> None:
    folder = folder_with(tmp_path, small, tokenizer={})
    (folder / "tokenizer.model").unlink()
    with pytest.raises(UserError, match=r"has no tokenizer\.model; only SentencePiece"):
        make(make_context(tmp_path), base={"uri": str(folder)}, add={"characters": "龘"})


def test_encoders_that_disagree_fail_the_stage(tmp_path: Path, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from stagecoach_trainer.text import conversion

    stock = conversion.merges
    monkeypatch.setattr(conversion, "merges", lambda vocabulary: sorted(stock(vocabulary)))
    with pytest.raises(UserError, match=r"encode texts differently: .* in `en`, .* in `probes`; for example"):
        make(make_context(tmp_path), base={"uri": str(small)}, add={"characters": "龘"}, measureOn=MEASURED[1:])


def test_two_sets_of_the_same_name_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"measureOn\[1\]\.name: 'zh' is used twice"):
        make(make_context(tmp_path), base=BASE, add={"characters": "龘"}, measureOn=[MEASURED[0], MEASURED[0]])


def test_sentences_are_sampled_by_the_seed_and_keep_their_order(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": f"{number:04d}"} for number in range(1000)])
    config = TokenizerStage.model_validate(
        {"train": {"on": [{"uri": str(path)}], "vocabSize": 300, "maxSentences": 100}}
    ).train
    assert config is not None
    first, again, other = (
        sample_lines(config, make_context(tmp_path / name, seed)) for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert first == again == sorted(first)
    assert len(first) == len(set(first)) == 100
    assert first != other
    assert 300 < sum(map(int, first)) / 100 < 700


def test_equal_runs_give_equal_bytes(tmp_path: Path) -> None:
    contents = []
    for name in ("a", "b"):
        context = make_context(tmp_path / name)
        make(context, train={"on": [POEMS], "vocabSize": 2600, "characterCoverage": 0.98}, measureOn=MEASURED[:1])
        contents.append({path.name: path.read_bytes() for path in context.output.iterdir()})
    assert contents[0] == contents[1]
    assert len(contents[0]) == 6
