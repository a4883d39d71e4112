"""Check that models which read the same token ids have the same vocabulary."""

from __future__ import annotations

from typing import Any

from stagecoach_trainer.runtime.errors import UserError


def require_same_vocabulary(policy_tokenizer: Any, other_tokenizer: Any, whose: str, remedy: str) -> None:
    """Raise UserError unless both tokenizers give every token the same id.

    `whose`: beginning of the message, with field and model of the other tokenizer; `remedy`: its end.
    """
    ours, theirs = policy_tokenizer.get_vocab(), other_tokenizer.get_vocab()
    differing = sorted({token for token, _ in set(ours.items()) ^ set(theirs.items())})
    if differing:
        raise UserError(
            f"{whose} has another vocabulary: {len(theirs)} tokens against the policy's {len(ours)}, and "
            f"{len(differing)} of them differ, such as {differing[0]!r}; {remedy}"
        )


def require_vocabulary_of_reference(policy_tokenizer: Any, reference_tokenizer: Any) -> None:
    """Raise UserError unless a stage's `reference` has the policy's vocabulary."""
    remedy = (
        "name a model of the same vocabulary, or remove `reference` to compare the policy with the model it starts from"
    )
    require_same_vocabulary(policy_tokenizer, reference_tokenizer, "reference: it", remedy)
