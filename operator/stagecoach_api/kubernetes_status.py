"""What a Kubernetes API server answers when it refuses: for whoever calls one, with whatever client."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def status_object(text: str) -> Mapping[str, Any]:
    """Return the `Status` that an answer holds. Empty: it is none, so the path itself is not served."""
    try:
        answer = json.loads(text)
    except ValueError:
        return {}
    return answer if isinstance(answer, dict) and answer.get("kind") == "Status" else {}
