"""`tokenizer`: train a vocabulary, merge it into a base, add tokens; write it for both encoders and measure it."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from stagecoach_api.artifacts import REPORT, REPORT_TEXT
from stagecoach_api.kinds.tokenizer import AddTokens, MergedScore, MergeVocabulary, TokenizerStage, TrainVocabulary
from stagecoach_api.references import RecordSource, Reference
from stagecoach_trainer.data.notes import Notes, warn_of_notes
from stagecoach_trainer.data.reading import read_records
from stagecoach_trainer.models.safety import read_json
from stagecoach_trainer.runtime.context import StageContext, StageOutcome
from stagecoach_trainer.runtime.errors import Interrupted, UserError
from stagecoach_trainer.text.conversion import save_vocabulary
from stagecoach_trainer.text.measure import PROBES, EncodingCounts, EncodingMeter, piece_facts
from stagecoach_trainer.text.pieces import (
    Vocabulary,
    add_characters,
    add_special_tokens,
    append_tokens,
    load_vocabulary,
    merge_vocabularies,
    sentences,
    train_vocabulary,
)
from stagecoach_trainer.text.vocabulary import (
    CONFIG_FILE,
    SENTENCEPIECE_FILE,
    TOKENIZER_FILE,
    load_tokenizer,
    read_tokenizer_config,
)

RECORDS_PER_HEARTBEAT = 512
MAX_USE_CHARACTERS = 8_000_000
"""Characters of the training text in which the report counts uses of new pieces, at most."""


def run(config: TokenizerStage, context: StageContext) -> StageOutcome:
    """Write the vocabulary of `config` to `context.output`.

    Raises:
        UserError: An input is not a vocabulary, the text does not suffice for the requested size, or SentencePiece and
            transformers encode a measured text differently (only a warning under `score: zero`).
        Interrupted: The stage was asked to stop; the next attempt starts from scratch.
    """
    _check_names(config)
    base = None if config.base is None else load_base(context, config.base)
    lines = [] if config.train is None else sample_lines(config.train, context)
    trained = None if config.train is None else _train(config.train, lines, context)
    vocabulary, warnings = _combine(config, context, base, trained)
    save_vocabulary(vocabulary, context.output)
    meter = EncodingMeter(base, vocabulary, load_tokenizer(context.output))
    sets = {source.name: meter.measure(_texts(context, source, "measure")) for source in config.measure_on}
    used_in = sum(measured.characters for measured in sets.values()) + meter.count_uses(_first(lines))
    facts = piece_facts(base, vocabulary, meter.uses, used_in)
    report = _report(facts, sets, meter.measure(PROBES), [*warnings, *context.progress.warnings])
    _check_agreement(config, report)
    _write(report, context.output)
    return StageOutcome(metrics=_metrics(report))


def _check_names(config: TokenizerStage) -> None:
    names = [source.name for source in config.measure_on]
    for index, name in enumerate(names):
        if name in names[:index]:
            raise UserError(f"measureOn[{index}].name: {name!r} is used twice; give every set its own name")


# -- parts of the vocabulary -------------------------------------------------------------------------------------------


def load_base(context: StageContext, reference: Reference) -> Vocabulary:
    """Load a SentencePiece vocabulary from a `.model` file, a `tokenizer` artifact or a Hugging Face folder.

    Tokens that a folder adds after the model's pieces (such as a pad token) become pieces with the same ids.

    Raises UserError if the folder has no SentencePiece model, needs its own code, or leaves gaps between ids.
    """
    path = context.fetch(reference)
    if path.is_file():
        return load_vocabulary(path)
    config = read_tokenizer_config(path)
    if not (path / SENTENCEPIECE_FILE).is_file():
        raise UserError(
            f"{reference.key}: the folder has no {SENTENCEPIECE_FILE}; only SentencePiece vocabularies can be a base"
        )
    vocabulary = load_vocabulary(path / SENTENCEPIECE_FILE)
    return append_tokens(vocabulary, _tokens_after(vocabulary, _added_tokens(path, config), reference.key))


def _added_tokens(folder: Path, config: dict[str, Any]) -> dict[int, tuple[str, bool]]:
    """Return (token, is special) by id of the tokens in a folder's JSON files."""
    tokens: dict[int, tuple[str, bool]] = {}
    # Later files override earlier ones: only they record which tokens are special.
    added = folder / "added_tokens.json"
    if added.is_file():
        tokens |= {int(index): (str(token), True) for token, index in read_json(added).items()}
    if (folder / TOKENIZER_FILE).is_file():
        for item in read_json(folder / TOKENIZER_FILE).get("added_tokens", []):
            tokens[int(item["id"])] = (str(item["content"]), bool(item.get("special")))
    for index, item in config.get("added_tokens_decoder", {}).items():
        tokens[int(index)] = (str(item["content"]), bool(item.get("special")))
    return tokens


def _tokens_after(vocabulary: Vocabulary, added: dict[int, tuple[str, bool]], where: str) -> list[tuple[str, bool]]:
    after = {index: token for index, token in added.items() if index >= vocabulary.size}
    if sorted(after) != list(range(vocabulary.size, vocabulary.size + len(after))):
        raise UserError(
            f"{where}: {CONFIG_FILE} adds tokens with the ids {sorted(after)}, which leave a gap after the "
            f"{vocabulary.size:,} pieces of {SENTENCEPIECE_FILE}; ids must be consecutive"
        )
    return [after[index] for index in sorted(after)]


def sample_lines(config: TrainVocabulary, context: StageContext) -> list[str]:
    """Return the lines to train on: all, or `maxSentences` of them sampled uniformly by the seed, in their order."""
    generator = random.Random(f"sentences:{context.seed}")  # noqa: S311 - not used for secrets
    kept: list[tuple[int, str]] = []
    texts = (text for source in config.on for text in _texts(context, source, "read"))
    # Reservoir sampling (algorithm R): one pass, memory for the sample only.
    for number, line in enumerate(sentences(texts)):
        if number < config.max_sentences:
            kept.append((number, line))
        elif (place := generator.randrange(number + 1)) < config.max_sentences:
            kept[place] = (number, line)
    return [line for _, line in sorted(kept)]


def _train(config: TrainVocabulary, lines: list[str], context: StageContext) -> Vocabulary:
    context.progress.report("train", 0, len(lines), "sentences")
    return train_vocabulary(config, lines, "train")


def _combine(
    config: TokenizerStage, context: StageContext, base: Vocabulary | None, trained: Vocabulary | None
) -> tuple[Vocabulary, list[str]]:
    """Return the vocabulary of base, trained or merged pieces and added tokens, and warnings for the report."""
    vocabulary = base if base is not None else trained
    warnings: list[str] = []
    if config.merge is not None and base is not None:
        other = trained if config.merge.vocabulary is None else load_base(context, config.merge.vocabulary)
        if other is not None:
            vocabulary = merge_vocabularies(base, other, config.merge.characters, config.merge.score)
            warnings = _merge_warnings(config.merge, base, other)
    if vocabulary is None:
        raise UserError("without `base`, the vocabulary must be trained; set `train`")
    if config.add is not None:
        vocabulary = add_characters(vocabulary, config.add.characters + _characters_from(config.add, context))
        vocabulary = add_special_tokens(vocabulary, config.add.special_tokens, config.add.pad_token)
    return vocabulary, warnings


def _merge_warnings(config: MergeVocabulary, base: Vocabulary, other: Vocabulary) -> list[str]:
    warnings = []
    if not other.is_bpe:
        warnings.append(
            "a unigram vocabulary is merged into a BPE base: its pieces were not made by merges, so some can never be "
            "produced (see `unreachable`); train with `algorithm: bpe` to avoid it"
        )
    if config.score is MergedScore.ZERO:
        warnings.append(
            "`score: zero` puts the merged pieces above all others and level with each other: text in the base's "
            "language changes its encoding, and SentencePiece and transformers disagree; use `below` unless a "
            "published vocabulary is to be reproduced"
        )
    names = (base.model.normalizer_spec.name, other.model.normalizer_spec.name)
    if names[0] != names[1]:
        warnings.append(
            f"the merged pieces were learnt under the normalisation `{names[1]}`, the base normalises by `{names[0]}`: "
            "pieces of normalised characters only match text that already has that form"
        )
    return warnings


def _characters_from(config: AddTokens, context: StageContext) -> str:
    if config.characters_from is None:
        return ""
    path = context.fetch(Reference(uri=config.characters_from))
    if not path.is_file():
        raise UserError(f"add.charactersFrom: {config.characters_from} is a folder; give one UTF-8 text file")
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"add.charactersFrom: {config.characters_from}:{line}: bad UTF-8") from error


# -- text --------------------------------------------------------------------------------------------------------------


def _texts(context: StageContext, source: RecordSource, activity: str) -> Iterator[str]:
    """Yield each record's text, reporting progress and honouring the stop flag."""
    notes: Notes = Counter()
    for number, record in enumerate(read_records(context, source, notes)):
        if number % RECORDS_PER_HEARTBEAT == 0:
            context.progress.report(activity, number, source.max_samples, "records")
            if context.stop.is_set():
                raise Interrupted("stopped while reading text; the next attempt starts from scratch")
        yield record.content
    warn_of_notes(context.progress.warn, notes, source.label)


def _first(lines: Iterable[str]) -> Iterator[str]:
    characters = 0
    for line in lines:
        characters += len(line)
        if characters > MAX_USE_CHARACTERS:
            return
        yield line


# -- report ------------------------------------------------------------------------------------------------------------


def _report(
    facts: dict[str, Any], sets: dict[str, EncodingCounts], probes: EncodingCounts, warnings: list[str]
) -> dict[str, Any]:
    return {
        "pieces": facts,
        "sets": {name: measured.as_json() for name, measured in sets.items()},
        "probes": probes.as_json(),
        "warnings": list(warnings),
    }


def _check_agreement(config: TokenizerStage, report: dict[str, Any]) -> None:
    """Raise UserError if the encoders disagree; under `score: zero`, which causes it, add a warning instead."""
    parts = {**report["sets"], "probes": report["probes"]}
    differing = {name: part["disagreements"] for name, part in parts.items() if part["disagreements"]}
    if not differing:
        return
    counted = ", ".join(f"{count:,} of {parts[name]['texts']:,} in `{name}`" for name, count in differing.items())
    message = f"SentencePiece and transformers encode texts differently: {counted}"
    if config.merge is not None and config.merge.score is MergedScore.ZERO:
        report["warnings"].append(message)
        return
    example = next(part["disagreementExamples"][0] for part in parts.values() if part["disagreements"])
    raise UserError(
        f"{message}; for example {example!r}. The vocabulary would give different ids in different programs: "
        "use a BPE vocabulary with byte fallback and identity normalisation"
    )


def _write(report: dict[str, Any], folder: Path) -> None:
    text = json.dumps(report, ensure_ascii=False, indent=2, allow_nan=False) + "\n"
    (folder / REPORT).write_text(text, encoding="utf-8")
    (folder / REPORT_TEXT).write_text(_markdown(report), encoding="utf-8")


def _markdown(report: dict[str, Any]) -> str:
    facts = report["pieces"]
    lines = ["# Vocabulary", ""]
    base = "" if facts["base"] is None else f"{facts['base']:,} of the base, "
    columns = ("texts", "tokens per character before", "after", "round-trip failures", "disagreements", "ASCII changed")
    lines += [
        f"{facts['total']:,} pieces ({facts['algorithm']}): {base}{facts['new']:,} new.",
        "",
        f"| text | {' | '.join(columns)} |",
        f"|---|{'---:|' * len(columns)}",
    ]
    for name, part in {**report["sets"], "(probes)": report["probes"]}.items():
        changed = "–" if part["asciiLines"] is None else f"{part['asciiChanged']:,} of {part['asciiLines']:,}"
        lines.append(
            f"| {name} | {part['texts']:,} | {_figure(part['tokensPerCharacterBefore'])} | "
            f"{_figure(part['tokensPerCharacter'])} | {part['roundTripFailures']:,} | {part['disagreements']:,} | "
            f"{changed} |"
        )
    unreachable, unseen = facts["unreachable"], facts["unseen"]
    lines += [
        "",
        f"{unreachable['count']:,} pieces can never be produced, {unreachable['withoutSplit']:,} of them for want of "
        "any two that make them.",
        f"{unseen['count']:,} new pieces do not come up in {unseen['ofCharacters']:,} characters of text.",
    ]
    if report["warnings"]:
        lines += ["", "## Warnings", "", *(f"- {warning}" for warning in report["warnings"])]
    return "\n".join(lines) + "\n"


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _metrics(report: dict[str, Any]) -> dict[str, float]:
    facts = report["pieces"]
    parts = [*report["sets"].values(), report["probes"]]
    metrics: dict[str, float] = {
        "vocabulary.size": facts["total"],
        "vocabulary.new": facts["new"],
        "vocabulary.unreachable": facts["unreachable"]["count"],
        "vocabulary.unseen": facts["unseen"]["count"],
        "disagreements": sum(part["disagreements"] for part in parts),
    }
    for name, part in report["sets"].items():
        if part["tokensPerCharacterBefore"] is not None:
            metrics[f"tokensPerCharacter.{name}.before"] = part["tokensPerCharacterBefore"]
        if part["tokensPerCharacter"] is not None:
            metrics[f"tokensPerCharacter.{name}.after"] = part["tokensPerCharacter"]
        metrics[f"roundTripFailures.{name}"] = part["roundTripFailures"]
    if facts["base"] is not None:
        metrics["asciiChanged"] = sum(part["asciiChanged"] for part in parts)
    return metrics
