"""Makers for the tests of rewards: terms, answers to judge, documents of stages with rewards, a real endpoint."""

from __future__ import annotations

from typing import Any


def feedback_term(url: str = "http://judge:8000/v1", secret: str | None = None, **changes: Any) -> dict[str, Any]:
    """A term that asks a language model for a mark."""
    endpoint: dict[str, Any] = {"url": url, "model": "judge"}
    if secret is not None:
        endpoint["credentials"] = {"secretName": secret}
    feedback = {"endpoint": endpoint, "instruction": "Mark {answer} as an answer to {prompt} from 0 to 10."}
    return {"name": "mark", "feedback": feedback | changes}


def evaluate_stage(*terms: dict[str, Any], name: str = "compare", **changes: Any) -> dict[str, Any]:
    """An `evaluate` stage that compares a model with a rival by these terms."""
    task = {
        "name": "help",
        "data": {"name": "prompts", "uri": "prompts"},
        "generation": {"maxNewTokens": 6},
        "rewards": list(terms),
        "rivals": [{"name": "before", "model": {"uri": "rival"}}],
    }
    return {"name": name, "evaluate": {"model": {"uri": "model"}, "precision": "fp32", "rewards": [task | changes]}}
