"""`sft`: supervised fine-tuning on instructions and conversations."""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum
from typing import Annotated

from pydantic import Field

from stagecoach_api.base import Fraction, Model, ShortText
from stagecoach_api.conversation import Loss, Template, TooLong
from stagecoach_api.draft import Draft, Fault, configs
from stagecoach_api.references import PREFERENCE_FORMATS, Artifact, Format, Reference
from stagecoach_api.rules.formats import numbered, training_sets, wrong_format
from stagecoach_api.stage_kind import Ranks, StageKind, reads
from stagecoach_api.summary_tables import HELD_OUT_TABLES
from stagecoach_api.training import TextTraining


class HindsightMode(StrEnum):
    """What becomes of ranked answers."""

    CHAIN = "chain"
    BEST = "best"


class Feedback(Model):
    """Words in front of an answer that say how good it is."""

    good: ShortText
    """In front of the best answer, such as `A helpful answer:`."""

    bad: ShortText
    """In front of the others, such as `An unhelpful answer:`."""


class Hindsight(Model):
    """Learn from ranked answers by imitation (chain of hindsight, arXiv 2302.02676; fine-tuning on the best answer)."""

    mode: HindsightMode = HindsightMode.CHAIN
    """`chain`: prompt, then feedback words and answers from the worst to the best in one sequence, with loss on the
    answers only, and beside it the best answer alone as it is asked for; `best`: the best answer alone, as in plain
    fine-tuning. Default: chain."""

    feedback: Annotated[tuple[Feedback, ...], Field(min_length=1, max_length=64)] = (
        Feedback(good="A helpful answer:", bad="An unhelpful answer:"),
        Feedback(good="A good answer:", bad="A bad answer:"),
        Feedback(good="Better:", bad="Worse:"),
    )
    """`chain` only: words to choose from at random, once a record. A served model is asked with the
    `good` words in front of its answer (`generation.answerBeginsWith`).
    Default: three English pairs."""

    max_masked_share: Fraction = 0.05
    """`chain` only: each row hides a random share of its tokens, from 0 to this, so that the model cannot copy the
    answer in front. Default: 0.05."""


class SftStage(TextTraining):
    """Supervised fine-tuning."""

    model: Reference
    """Model to tune: a stage's artifact or a Hugging Face folder (safetensors only)."""

    template: Template
    """How a conversation becomes text."""

    loss: Loss = Loss()
    """Which tokens carry loss. Default: what the assistant says and the tools it calls."""

    packing: bool = True
    """Put several conversations into one row; none sees another. Models whose attention cannot tell them apart (BLOOM,
    OPT) are refused and need `false`. Default: true."""

    too_long: TooLong = TooLong.DROP
    """`split` between turns into several samples (the system prompt stays in front of each), `drop` and count, `cut` at
    the end and count, or `fail` and name the record. Default: drop."""

    hindsight: Hindsight | None = None
    """What becomes of preference records (`pairs`, `comparison`, `ranked`) in `data`; conversations and text beside
    them are trained on as ever, text being the regulariser. If unset: `data` has no preference records."""


# -- rules -------------------------------------------------------------------------------------------------------------


def fine_tuning_reads_conversations(draft: Draft) -> Iterator[Fault]:
    for stage, config in configs(draft, SftStage):
        for path, source in numbered(("data",), config.data):
            if source.format is Format.TEXT:
                yield wrong_format(
                    stage,
                    path,
                    source,
                    "plain text has no turns to learn from",
                    "give conversations (alpaca, sharegpt, messages), or train on the text in a `pretrain` stage",
                )


def preferences_need_hindsight(draft: Draft) -> Iterator[Fault]:
    for stage, config in configs(draft, SftStage):
        for path, source in training_sets(config):
            if source.format is Format.LABELS:
                yield wrong_format(
                    stage,
                    path,
                    source,
                    "labels judge single answers, and `hindsight` needs ranked ones",
                    "train on them in a `dpo` stage with `loss: {kto: {}}`",
                )
            elif source.format in PREFERENCE_FORMATS and config.hindsight is None:
                yield wrong_format(
                    stage,
                    path,
                    source,
                    "preferences are not conversations: each has several answers",
                    "add `hindsight: {}`, or train on them in a `rewardModel` or `dpo` stage",
                )


KIND = StageKind(
    name="sft",
    position=40,
    summary="Fine-tune a model on instructions and conversations.",
    config=SftStage,
    makes=Artifact.MODEL,
    reads={
        "model": reads(Artifact.MODEL),
        "tokenizer": reads(Artifact.VOCABULARY, Artifact.MODEL),
    },
    ranks=Ranks.ALL,
    heavy=True,
    tables=HELD_OUT_TABLES,
    rules=(fine_tuning_reads_conversations, preferences_need_hindsight),
)
