"""Two models that read the same token ids must have the same vocabulary."""

from __future__ import annotations

from typing import Any

from stagecoach_trainer.runtime.errors import UserError


def require_same_vocabulary(policys: Any, others: Any, whose: str, remedy: str) -> None:
    """Raise UserError unless both tokenizers give every token the same id.

    `whose`: field and model of the other one, as the message begins; `remedy`: how it ends.
    """
    ours, theirs = policys.get_vocab(), others.get_vocab()
    odd = sorted({token for token, _ in set(ours.items()) ^ set(theirs.items())})
    if odd:
        raise UserError(
            f"{whose} has another vocabulary: {len(theirs)} tokens against the policy's {len(ours)}, and {len(odd)} of "
            f"them differ, such as {odd[0]!r}; {remedy}"
        )


def require_vocabulary_of_reference(policys: Any, references: Any) -> None:
    """Raise UserError unless a stage's `reference` reads the policy's token ids."""
    remedy = (
        "name a model of the same vocabulary, or leave `reference` out to hold the policy to the model it starts from"
    )
    require_same_vocabulary(policys, references, "reference: it", remedy)
