"""When Python looks for garbage: not while torch and transformers are imported, whose objects all stay.

Those looks take half a second of the six or seven until a stage's first step (measured with `gc.callbacks`).
"""

from __future__ import annotations

import gc


def put_off() -> None:
    """Look for no garbage until `take_up`."""
    gc.disable()


def take_up() -> None:
    """Look for garbage again, and never at what is there now: it stays to the end of the process."""
    gc.freeze()
    gc.enable()
