"""`sft`: supervised fine-tuning on instructions and conversations."""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum
from typing import Annotated

from pydantic import Field

from stagecoach_api.base import Fraction, Model, ShortText
from stagecoach_api.conversation import Loss, Template, TooLong
from stagecoach_api.draft import Draft, Fault, configs
from stagecoach_api.references import PREFERENCE_FORMATS, ArtifactType, Format, Reference
from stagecoach_api.rules.formats import numbered, training_sets, wrong_formats
from stagecoach_api.stage_kind import Ranks, StageKind, reads
from stagecoach_api.summary_tables import HELD_OUT_TABLES
from stagecoach_api.training import TextTraining


class HindsightMode(StrEnum):
    """How ranked answers are used."""

    CHAIN = "chain"
    BEST = "best"


class Feedback(Model):
    """Texts placed before an answer that state how good it is."""

    good: ShortText
    """Text before the best answer, such as `A helpful answer:`."""

    bad: ShortText
    """Text before the others, such as `An unhelpful answer:`."""


class Hindsight(Model):
    """Imitation learning from ranked answers (chain of hindsight, arXiv 2302.02676; fine-tuning on the best answer)."""

    mode: HindsightMode = HindsightMode.CHAIN
    """How ranked answers are used. `chain`: one sequence of the prompt and the answers from worst to best, each after a
    feedback text, with loss on the answers only; plus the best answer alone, as it is prompted for later. `best`: the
    best answer alone, as in plain fine-tuning."""

    feedback: Annotated[tuple[Feedback, ...], Field(min_length=1, max_length=64)] = (
        Feedback(good="A helpful answer:", bad="An unhelpful answer:"),
        Feedback(good="A good answer:", bad="A bad answer:"),
        Feedback(good="Better:", bad="Worse:"),
    )
    """For `chain` only: texts to choose from at random, once per record. A served model is prompted with the `good`
    text before its answer (`generation.answerBeginsWith`)."""

    max_masked_share: Fraction = 0.05
    """For `chain` only: each row masks a random share of its tokens, between 0 and this, so that the model cannot copy
    the previous answer."""


class SftStage(TextTraining):
    """Supervised fine-tuning on instructions and conversations."""

    model: Reference
    """Model to fine-tune: a stage's artifact or a Hugging Face folder (safetensors only)."""

    template: Template | None = None
    """How conversations are rendered as text. If unset: the chat template of the model's tokenizer."""

    loss: Loss = Loss()
    """Which tokens carry loss."""

    packing: bool = True
    """Pack several conversations into one row without attention between them. Models whose attention cannot separate
    them (BLOOM, OPT) are rejected and need `false`."""

    too_long: TooLong = TooLong.DROP
    """What happens to a conversation longer than `sequenceLength`. `split`: split it between turns into several
    samples, each with the system prompt. `drop`: drop and count it. `cut`: truncate and count it. `fail`: fail the
    stage and name the record."""

    hindsight: Hindsight | None = None
    """How preference records (`pairs`, `comparison`, `ranked`) in `data` are used. Conversations and text next to them
    are trained on as usual, text as a regulariser. If unset: `data` must not have preference records."""


# -- rules -------------------------------------------------------------------------------------------------------------


def fine_tuning_reads_conversations(draft: Draft) -> Iterator[Fault]:
    for stage, config in configs(draft, SftStage):
        yield from wrong_formats(
            stage,
            numbered(("data",), config.data),
            {Format.TEXT},
            "plain text has no turns to learn from",
            "give conversations (alpaca, sharegpt, messages), or train on the text in a `pretrain` stage",
        )


def preferences_need_hindsight(draft: Draft) -> Iterator[Fault]:
    for stage, config in configs(draft, SftStage):
        yield from wrong_formats(
            stage,
            training_sets(config),
            {Format.LABELS},
            "labels judge single answers, and `hindsight` needs ranked ones",
            "train on them in a `dpo` stage with `loss: {kto: {}}`",
        )
        if config.hindsight is None:
            yield from wrong_formats(
                stage,
                training_sets(config),
                PREFERENCE_FORMATS - {Format.LABELS},
                "preferences are not conversations: each has several answers",
                "add `hindsight: {}`, or train on them in a `rewardModel` or `dpo` stage",
            )


KIND = StageKind(
    name="sft",
    position=40,
    summary="Fine-tune a model on instructions and conversations.",
    config=SftStage,
    makes=ArtifactType.MODEL,
    reads={
        "model": reads(ArtifactType.MODEL),
        "tokenizer": reads(ArtifactType.VOCABULARY, ArtifactType.MODEL),
    },
    ranks=Ranks.ALL,
    heavy=True,
    tables=HELD_OUT_TABLES,
    rules=(fine_tuning_reads_conversations, preferences_need_hindsight),
)
