"""Error responses of the Kubernetes API server, independent of the client library."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def status_object(text: str) -> Mapping[str, Any]:
    """Return the `Status` object in the body of a response.

    Empty if the body is something else, which means that the requested path itself is not served.
    """
    try:
        answer = json.loads(text)
    except ValueError:
        return {}
    return answer if isinstance(answer, dict) and answer.get("kind") == "Status" else {}
