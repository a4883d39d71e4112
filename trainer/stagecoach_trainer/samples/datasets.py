"""Training sets as token shards, and held-out sets as rows to measure on."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np

from stagecoach_api.conversation import Loss, TooLong
from stagecoach_api.kinds.sft import Hindsight, HindsightMode
from stagecoach_api.references import NamedSource, RecordSource
from stagecoach_trainer.batches.rows import IGNORE, Ids, Row
from stagecoach_trainer.data.notes import warn_of_notes
from stagecoach_trainer.data.reading import read_records
from stagecoach_trainer.data.records import Record
from stagecoach_trainer.loop.job import HeldOutSet
from stagecoach_trainer.runtime.context import StageContext
from stagecoach_trainer.runtime.errors import UserError
from stagecoach_trainer.samples.conversation import BATCH_RECORDS, ConversationEncoder, document
from stagecoach_trainer.samples.hindsight import COUNTS, SAME_ANSWERS, HindsightEncoder
from stagecoach_trainer.samples.rows import pack_rows, row_of
from stagecoach_trainer.samples.token_cache import TokenShard, TokenShardWriter, token_shard
from stagecoach_trainer.text.encoding import Encoder
from stagecoach_trainer.text.spellings import Spellings, special_spellings
from stagecoach_trainer.text.templates import Renderer
from stagecoach_trainer.text.vocabulary import batches_of

BATCH_CHARACTERS = 1 << 20

RENDERING = 2
"""Version of how conversations become ids; increase it when a record's ids change."""

LOST_SAMPLES = ("tooLong", "cut", "noLoss", "emptyText")
"""Names of the counts of samples that were dropped, shortened or left without loss."""


def tokenizer_digest(tokenizer: Any) -> str:
    """Return a digest of everything on which a tokenizer's encoding depends."""
    parts = (tokenizer.backend_tokenizer.to_str(), str(tokenizer.bos_token_id), str(tokenizer.eos_token_id))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def source_key(context: StageContext, source: RecordSource) -> dict[str, Any]:
    """Return the cache key of a source's records: its content and reading options, not its location or name."""
    chosen = source.model_dump(mode="json", include={"split", "format", "fields", "dataset", "max_samples"})
    return {"input": context.input(source).digest, "source": chosen}


# -- training sets -----------------------------------------------------------------------------------------------------


def text_shard(context: StageContext, source: RecordSource, tokenizer: Any) -> TokenShard:
    """Return the documents of a set, each with BOS and EOS tokens.

    Raises UserError for conversations.
    """
    key = {"kind": "text", **source_key(context, source), "tokenizer": tokenizer_digest(tokenizer)}

    def build(writer: TokenShardWriter) -> Mapping[str, int]:
        notes: Counter[str] = Counter()
        counts = _write_documents(
            read_records(context, source, notes), Encoder(tokenizer), special_spellings(tokenizer), writer
        )
        return {**counts, **notes}

    return _noted(context, source, token_shard(context, key, f"tokenise {source.label}", build))


def _noted(context: StageContext, source: RecordSource, shard: TokenShard) -> TokenShard:
    """Report what was noted about a set when it was encoded, perhaps by an earlier attempt."""
    warn_of_notes(context.progress.warn, shard.counts, source.label)
    return shard


def _write_documents(
    records: Iterable[Record], encoder: Encoder, spellings: Spellings, writer: TokenShardWriter
) -> Mapping[str, int]:
    counts: Counter[str] = Counter(records=0, samples=0, tokens=0, characters=0)
    for batch in batches_of(texts_of(records), BATCH_CHARACTERS):
        spelled = sum(spellings.occur_in(text) for text in batch)
        if spelled:
            counts["spelledTokens"] += spelled
        writer.report()
        for text, ids in zip(batch, encoder.documents(batch), strict=True):
            counts["records"] += 1
            if not len(ids):
                counts["emptyText"] += 1
                continue
            whole = document(encoder, ids)
            writer.add(whole)
            counts.update(samples=1, tokens=len(whole), characters=len(text))
    return counts


def conversation_shard(
    context: StageContext,
    source: RecordSource,
    tokenizer: Any,
    loss: Loss,
    too_long: TooLong,
    sequence_length: int,
    hindsight: Hindsight | None = None,
) -> TokenShard:
    """Return the conversations of a set as samples of at most `sequence_length` tokens, with the mask of the loss.

    The tokenizer has the chat template; `hindsight` sets how preference records are encoded.
    Raises UserError naming a record that cannot be rendered, or, without `hindsight`, a preference record.
    """
    key = {
        "kind": "conversation",
        **source_key(context, source),
        "tokenizer": tokenizer_digest(tokenizer),
        "template": tokenizer.chat_template,
        "rendering": RENDERING,
        "loss": loss.model_dump(mode="json"),
        "tooLong": too_long.value,
        "sequenceLength": sequence_length,
        **_hindsight_key(hindsight, context.seed),
    }

    def build(writer: TokenShardWriter) -> Mapping[str, int]:
        encoder = _encoder_of(tokenizer, loss, too_long, sequence_length, hindsight, context.seed)
        for sample in encoder.encode(read_records(context, source, encoder.counts)):
            writer.add(sample.ids, sample.trained)
        return encoder.counts

    return _noted(context, source, token_shard(context, key, f"tokenise {source.label}", build))


def _hindsight_key(hindsight: Hindsight | None, seed: int) -> dict[str, Any]:
    """Return the part of the cache key for preference records; tokens are masked later, when rows are drawn."""
    if hindsight is None:
        return {}
    if hindsight.mode is HindsightMode.BEST:
        return {"hindsight": {"mode": hindsight.mode.value}}
    chain = hindsight.model_dump(mode="json", include={"mode", "feedback"})
    return {"hindsight": {**chain, "seed": seed}}


def _encoder_of(
    tokenizer: Any, loss: Loss, too_long: TooLong, sequence_length: int, hindsight: Hindsight | None, seed: int
) -> ConversationEncoder:
    parts = (Encoder(tokenizer), Renderer(tokenizer), loss, too_long, sequence_length)
    return ConversationEncoder(*parts) if hindsight is None else HindsightEncoder(*parts, hindsight, seed)


def check_lost_samples(
    counts: Mapping[str, Mapping[str, int]],
    largest_share: float,
    where: str = "data",
    remedy: str = "raise `sequenceLength`, choose another `tooLong`, or allow more",
) -> None:
    """Raise UserError if no sample is left, or more of them than `largest_share` were dropped, cut or have no loss.

    `counts`: by data set; `where`: path of the sets' field; `remedy`: end of the message.
    """
    lost = sum(map(lost_samples, counts.values()))
    kept = sum(each.get("samples", 0) for each in counts.values())
    cut = sum(each.get("cut", 0) for each in counts.values())
    reasons = "; ".join(f"{name}: {describe_samples(each)}" for name, each in counts.items())
    if kept == 0:
        raise UserError(f"{where}: no sample to train on is left ({reasons})")
    share = lost / (kept + lost - cut)  # samples that were cut are among those kept, too
    if share > largest_share:
        raise UserError(
            f"{where}: {share:.1%} of the samples were dropped, cut or carry no loss, more than `maxDroppedShare` "
            f"{largest_share:.1%} ({reasons}); {remedy}"
        )


def lost_samples(counts: Mapping[str, int]) -> int:
    """Return the number of samples that were dropped, shortened or left without loss."""
    return sum(counts.get(name, 0) for name in (*LOST_SAMPLES, SAME_ANSWERS))


def describe_samples(counts: Mapping[str, int]) -> str:
    """Return the counts that explain lost samples, for a message."""
    names = ("records", "samples", *LOST_SAMPLES, "splitRecords", "extraSamples", *COUNTS)
    return ", ".join(f"{name} {counts[name]}" for name in names if counts.get(name))


# -- held-out sets -----------------------------------------------------------------------------------------------------


def text_held_out(
    context: StageContext, source: NamedSource, tokenizer: Any, sequence_length: int, max_tokens: int
) -> HeldOutSet:
    """Return a text set to measure on: documents with BOS tokens, `max_tokens` in all."""
    notes: Counter[str] = Counter()
    texts = texts_of(read_records(context, source, notes))
    found = measured_text(source.name, texts, tokenizer, sequence_length, max_tokens)
    warn_of_notes(context.progress.warn, notes, f"heldOut {source.name}")
    return found


def measured_text(name: str, texts: Iterable[str], tokenizer: Any, sequence_length: int, max_tokens: int) -> HeldOutSet:
    """Return documents as rows to measure on.

    A document longer than a row is split, and the first token of a piece is predicted at the end of the piece before
    it. The last document is shortened to the rest of `max_tokens`. Raises UserError if there is nothing to measure.
    """
    encoder = Encoder(tokenizer)
    pieces: list[Row] = []
    left, characters = max_tokens, 0
    for text, ids in _encoded(texts, encoder):
        if left <= 0:
            break
        kept, used = (ids, text) if len(ids) <= left else _shortened(encoder, text, left)
        left -= len(kept)
        characters += len(used)
        pieces += _pieces(_with_bos(encoder, kept), sequence_length)
    if not any(piece.num_targets for piece in pieces):
        raise UserError(f"heldOut.sets: {name} has no text to measure")
    return HeldOutSet(name, pack_rows(pieces, sequence_length), characters)


def _encoded(texts: Iterable[str], encoder: Encoder) -> Iterator[tuple[str, Ids]]:
    for batch in batches_of(texts, BATCH_CHARACTERS >> 3):
        yield from zip(batch, encoder.documents(batch), strict=True)


def _shortened(encoder: Encoder, text: str, most: int) -> tuple[Ids, str]:
    """Return the beginning of a text, shortened to at most `most` tokens, and its ids."""
    ids = encoder.documents([text])[0]
    # Text is shortened, not ids, so that characters and tokens match; each round removes at least one character.
    while len(ids) > most:
        text = text[: max(0, min(len(text) - 1, len(text) * most // len(ids)))]
        ids = encoder.documents([text])[0]
    return ids, text


def _with_bos(encoder: Encoder, ids: Ids) -> Ids:
    return ids if encoder.bos is None else np.concatenate([np.array([encoder.bos], np.int32), ids])


def _pieces(ids: Ids, sequence_length: int) -> Iterator[Row]:
    labels = np.append(ids[1:], np.int32(IGNORE)).astype(np.int32)
    for start in range(0, len(ids), sequence_length):
        piece = slice(start, start + sequence_length)
        if (labels[piece] != IGNORE).any():
            yield Row(ids[piece], labels[piece], (len(ids[piece]),))


def conversation_held_out(
    context: StageContext,
    source: NamedSource,
    tokenizer: Any,
    loss: Loss,
    sequence_length: int,
    max_tokens: int,
    max_dropped_share: float,
    hindsight: Hindsight | None = None,
) -> HeldOutSet:
    """Return a conversation set to measure on, `max_tokens` with loss in all; samples that are too long are left out.

    Preference records are encoded as `hindsight` trains on them, without masked tokens. What is left out is counted
    over the records that were read, in whole batches.
    Raises UserError if there is nothing to measure, or more than `max_dropped_share` of the samples are left out.
    """
    encoder = _encoder_of(tokenizer, loss, TooLong.DROP, sequence_length, hindsight, context.seed)
    rows: list[Row] = []
    left, characters = max_tokens, 0
    records, is_full = read_records(context, source, encoder.counts), False
    while not is_full and (batch := list(islice(records, BATCH_RECORDS))):
        for sample in encoder.encode(batch):
            row = row_of(sample)
            is_full = is_full or (bool(rows) and row.num_targets > left)
            if not is_full:
                rows.append(row)
                left -= row.num_targets
                characters += sample.characters
    if not rows:
        raise UserError(
            f"heldOut.sets: {source.name} has no conversation to measure ({describe_samples(encoder.counts)})"
        )
    check_left_out(context, source.name, encoder.counts, max_dropped_share)
    return HeldOutSet(source.name, pack_rows(rows, sequence_length), characters, encoder.counts)


def check_left_out(context: StageContext, name: str, counts: Mapping[str, int], largest_share: float) -> None:
    """Report what a held-out set leaves out. Raises UserError if that is more than `largest_share` of the samples."""
    where, remedy = "heldOut.sets", "raise `sequenceLength`, or allow more"
    check_lost_samples({name: counts}, largest_share, where, remedy)
    warn_of_notes(context.progress.warn, counts, f"heldOut {name}")
    lost = lost_samples(counts)
    if lost:
        context.progress.warn(
            f"heldOut {name}: {lost:,} of {counts['samples'] + lost:,} samples are left out "
            f"({describe_samples(counts)}), and the figures are those of the others"
        )


# -- shared ------------------------------------------------------------------------------------------------------------


def texts_of(records: Iterable[Record]) -> Iterator[str]:
    """Yield the text of each record. Raises UserError for a conversation."""
    for record in records:
        if record.text is None:
            raise UserError(
                f"{record.where}: a conversation where plain text is expected; `sft` trains on conversations, and a "
                "`data` stage makes text of them"
            )
        yield record.text


def is_conversation(context: StageContext, source: RecordSource) -> bool:
    """Return whether a source's first record is a conversation. Raises UserError for an empty source."""
    for record in islice(read_records(context, source, Counter()), 1):
        return record.text is None
    raise UserError(f"{source.key}: the data set is empty")
