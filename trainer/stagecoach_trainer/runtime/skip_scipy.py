"""What of transformers a language model does not need, left out before any of its models is imported."""

from __future__ import annotations


def leave_out_scipy() -> None:
    """Let transformers believe that scipy is not there: it would import it for the losses of object detection, which
    takes half a second of the seven until the first step (measured with `-X importtime`).

    Only for processes that train; other code finds scipy as ever.
    """
    import transformers.utils

    transformers.utils.is_scipy_available = _no  # type: ignore[attr-defined]  # by this name its models import it


def _no() -> bool:
    return False
