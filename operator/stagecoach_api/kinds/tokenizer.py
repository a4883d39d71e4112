"""`tokenizer`: train a SentencePiece vocabulary, merge it into a base, or add characters and special tokens."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import Field

from stagecoach_api.base import Fraction, Model, Uri
from stagecoach_api.constraints import Constraint, both, different, either, given, implies
from stagecoach_api.references import ArtifactType, NamedSource, RecordSource, Reference
from stagecoach_api.stage_kind import StageConfig, StageKind, reads
from stagecoach_api.summary_tables import ChangeTable


class Algorithm(StrEnum):
    """Model types of SentencePiece."""

    BPE = "bpe"
    UNIGRAM = "unigram"


class Normalization(StrEnum):
    """Normalisation rules of SentencePiece."""

    IDENTITY = "identity"
    NFKC = "nmt_nfkc"


class TrainVocabulary(Model):
    """Train a SentencePiece vocabulary."""

    # In YAML 1.1, and so for kubectl, a bare `on` is the boolean true: in YAML the field is called `data`.
    on: Annotated[tuple[RecordSource, ...], Field(alias="data", min_length=1, max_length=64)]
    """Text to train on."""

    vocab_size: Annotated[int, Field(ge=16, le=1_000_000)]
    """Number of pieces of the trained vocabulary, including control and byte pieces."""

    algorithm: Algorithm = Algorithm.BPE
    """Model type of SentencePiece."""

    character_coverage: Fraction = 0.9995
    """Share of the text's characters that get a piece of their own. All others are encoded as bytes."""

    normalization: Normalization = Normalization.IDENTITY
    """Normalisation before encoding. LLaMA uses `identity`."""

    split_digits: bool = True
    """Make every digit a separate piece, as in LLaMA."""

    max_sentences: Annotated[int, Field(ge=1, le=100_000_000)] = 2_000_000
    """Number of sentences to sample for training."""


class MergedCharacters(StrEnum):
    """Pieces of the second vocabulary to add."""

    ALL = "all"
    CJK = "cjk"


class MergedScore(StrEnum):
    """Score of a piece that is added to the base."""

    BELOW = "below"
    ZERO = "zero"


class MergeVocabulary(Model):
    """Append the pieces of a second vocabulary to the base. Ids of the base do not change; duplicates are dropped."""

    vocabulary: Reference | None = None
    """SentencePiece `.model` file or `tokenizer` artifact to merge. If unset: the vocabulary trained by `train`."""

    characters: MergedCharacters = MergedCharacters.ALL
    """Pieces to add. `all`: every new piece. `cjk`: only those of CJK characters alone, so that the encoding of other
    text does not change."""

    score: MergedScore = MergedScore.BELOW
    """Score of added pieces. `below`: less than the lowest score of an ordinary base piece, decreasing in steps of 1 in
    the second vocabulary's order. `zero`: 0 for all, as in Chinese-LLaMA (with a warning: SentencePiece and
    transformers then disagree)."""


class AddTokens(Model):
    """Append listed characters or special tokens to the base."""

    input_file = "characters_from"

    characters: Annotated[str, Field(max_length=65536)] = ""
    """Characters to add, each as a separate piece. Characters that the base has are skipped."""

    characters_from: Uri | None = None
    """UTF-8 text file whose distinct characters, without whitespace, are added. If unset: no file is read."""

    special_tokens: Annotated[
        tuple[Annotated[str, Field(min_length=1, max_length=128)], ...], Field(max_length=1024)
    ] = ()
    """Tokens that are never split and never result from encoding text, such as `<|im_start|>`."""

    pad_token: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    """Special token to add for padding, such as `[PAD]`. If unset: none is added."""


class TokenizerStage(StageConfig):
    """Make a vocabulary: train one, merge one into a base, or add tokens. At least one of the three must be set."""

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
    """Vocabulary to start from: a `tokenizer` artifact, a Hugging Face folder or a SentencePiece `.model` file. If
    unset: `train` makes the whole vocabulary."""

    train: TrainVocabulary | None = None
    """Train a vocabulary. If unset: none is trained."""

    merge: MergeVocabulary | None = None
    """Merge a vocabulary into `base`. If unset: none is merged."""

    add: AddTokens | None = None
    """Append characters or special tokens. If unset: none are added."""

    measure_on: Annotated[tuple[NamedSource, ...], Field(max_length=16)] = ()
    """Held-out text on which tokens per character, round trips, and the agreement of SentencePiece and transformers are
    measured."""

    def new_vocabulary_size(self) -> int:
        return self.train.vocab_size if self.train is not None else 0


KIND = StageKind(
    name="tokenizer",
    position=20,
    summary="Make a vocabulary.",
    config=TokenizerStage,
    makes=ArtifactType.VOCABULARY,
    reads={
        "base": reads(ArtifactType.VOCABULARY, ArtifactType.MODEL),
        "merge.vocabulary": reads(ArtifactType.VOCABULARY),
    },
    tables=(
        ChangeTable(
            "Tokens per character, before and after the vocabulary",
            before="tokensPerCharacter.{set}.before",
            after="tokensPerCharacter.{set}.after",
        ),
    ),
)
