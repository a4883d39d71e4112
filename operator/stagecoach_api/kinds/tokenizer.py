"""`tokenizer`: train a SentencePiece vocabulary, merge it into a base, or add characters and special tokens."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import Field

from stagecoach_api.base import Fraction, Model, Uri
from stagecoach_api.constraints import Constraint, both, different, either, given, implies
from stagecoach_api.references import Artifact, NamedSource, RecordSource, Reference
from stagecoach_api.stage_kind import StageConfig, StageKind, reads
from stagecoach_api.summary_tables import ChangeTable


class Algorithm(StrEnum):
    """SentencePiece's model types."""

    BPE = "bpe"
    UNIGRAM = "unigram"


class Normalization(StrEnum):
    """SentencePiece's normalisation rules."""

    IDENTITY = "identity"
    NFKC = "nmt_nfkc"


class TrainVocabulary(Model):
    """Train a SentencePiece vocabulary."""

    # In YAML 1.1, and so for kubectl, a bare `on` is the truth value true: outside, the field is called `data`.
    on: Annotated[tuple[RecordSource, ...], Field(alias="data", min_length=1, max_length=64)]
    """Text to train on."""

    vocab_size: Annotated[int, Field(ge=16, le=1_000_000)]
    """Pieces of the trained vocabulary, control and byte pieces included."""

    algorithm: Algorithm = Algorithm.BPE
    """`bpe` or `unigram`. Default: bpe."""

    character_coverage: Fraction = 0.9995
    """Share of the text's characters that get a piece of their own; the rest falls back to bytes. Default: 0.9995."""

    normalization: Normalization = Normalization.IDENTITY
    """Normalisation in front of the vocabulary. Default: identity, as LLaMA's."""

    split_digits: bool = True
    """Make every digit a piece of its own. Default: true, as LLaMA's."""

    max_sentences: Annotated[int, Field(ge=1, le=100_000_000)] = 2_000_000
    """Sentences sampled for training. Default: 2,000,000."""


class MergedCharacters(StrEnum):
    """Which pieces of the second vocabulary are taken."""

    ALL = "all"
    CJK = "cjk"


class MergedScore(StrEnum):
    """Score of a piece that is added to the base."""

    BELOW = "below"
    ZERO = "zero"


class MergeVocabulary(Model):
    """Append the pieces of a second vocabulary to the base; base ids never move, duplicates are dropped."""

    vocabulary: Reference | None = None
    """A SentencePiece `.model` file or `tokenizer` artifact to merge. If unset: the one trained by `train`."""

    characters: MergedCharacters = MergedCharacters.ALL
    """`all` takes every new piece; `cjk` only those made of CJK characters alone, so that old text keeps its encoding.
    Default: all."""

    score: MergedScore = MergedScore.BELOW
    """`below`: under the lowest ordinary base score in steps of 1, in the second vocabulary's order; `zero`: all 0, as
    Chinese-LLaMA did (with a warning: SentencePiece and transformers then disagree). Default: below."""


class AddTokens(Model):
    """Append listed characters or special tokens to the base."""

    input_file = "characters_from"

    characters: Annotated[str, Field(max_length=65536)] = ""
    """Characters to add, each a piece of its own; those the base has are skipped. Default: none."""

    characters_from: Uri | None = None
    """A UTF-8 text file whose distinct characters, blanks apart, are added. If unset: no file."""

    special_tokens: Annotated[
        tuple[Annotated[str, Field(min_length=1, max_length=128)], ...], Field(max_length=1024)
    ] = ()
    """Tokens never split and never produced from text, such as `<|im_start|>`. Default: none."""

    pad_token: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    """Special token to add for padding, such as `[PAD]`. If unset: none is added."""


class TokenizerStage(StageConfig):
    """Make a vocabulary: train one, merge one into a base, add tokens; at least one of the three."""

    constraints = (
        Constraint(
            either(given("train"), given("merge"), given("add")),
            "a tokenizer stage needs something to do",
            "give at least one of `train`, `merge` and `add`",
        ),
        Constraint(either(given("base"), given("train")), "without `base` there must be `train`", "give one of them"),
        Constraint(implies(given("merge"), given("base")), "`merge` needs a `base` to merge into", "give it"),
        Constraint(
            implies(given("merge"), different(given("merge.vocabulary"), given("train"))),
            "`merge` needs exactly one source",
            "give `train` or `merge.vocabulary`, not both",
        ),
        Constraint(
            implies(both(given("base"), given("train")), given("merge")),
            "`train` with `base` needs `merge`, or the base would be unused",
            "give it, or leave `base` out",
        ),
    )

    base: Reference | None = None
    """Vocabulary to start from: a `tokenizer` artifact, a Hugging Face folder or a SentencePiece `.model` file.
    If unset: `train` makes the vocabulary from nothing."""

    train: TrainVocabulary | None = None
    """Train a vocabulary. If unset: none is trained."""

    merge: MergeVocabulary | None = None
    """Merge into `base`. If unset: nothing is merged."""

    add: AddTokens | None = None
    """Append characters or special tokens. If unset: nothing is added."""

    measure_on: Annotated[tuple[NamedSource, ...], Field(max_length=16)] = ()
    """Held-out text on which tokens per character, round trips and the agreement of SentencePiece and transformers
    are measured. Default: none."""

    def new_vocabulary_size(self) -> int:
        return self.train.vocab_size if self.train is not None else 0


KIND = StageKind(
    name="tokenizer",
    position=20,
    summary="Make a vocabulary.",
    config=TokenizerStage,
    makes=Artifact.VOCABULARY,
    reads={
        "base": reads(Artifact.VOCABULARY, Artifact.MODEL),
        "merge.vocabulary": reads(Artifact.VOCABULARY),
    },
    tables=(
        ChangeTable(
            "Tokens per character, before and after the vocabulary",
            before="tokensPerCharacter.{set}.before",
            after="tokensPerCharacter.{set}.after",
        ),
    ),
)
