"""Lines at the end of a terminal that are drawn again in place, also after it has been resized."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

CLEAR_LINE = "\x1b[K"
CLEAR_BELOW = "\x1b[J"


class Screen:
    """Draws lines that are shorter than the terminal is wide, and erases exactly what it has drawn.

    After a resize a terminal has wrapped each line that has become too long: the rows to erase follow from the lines'
    lengths and the new width. The cursor stays below the lines, where an echoed `^C` is erased with them.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._lengths: list[int] = []
        """Columns of each line drawn."""
        self._drawn: tuple[int, list[str]] = (0, [])

    def draw(self, lines: Sequence[Text]) -> None:
        """Replace the lines by others."""
        texts = [self._as_codes(line) for line in lines]
        if self._drawn == (self._console.width, texts):
            return
        self._write(self._up() + "".join(f"{text}{CLEAR_LINE}\n" for text in texts) + CLEAR_BELOW)
        self._lengths = [line.cell_len for line in lines]
        self._drawn = (self._console.width, texts)

    def erase(self) -> None:
        """Remove the lines; the cursor is where the first one was."""
        self._write(self._up() + CLEAR_BELOW)
        self._lengths, self._drawn = [], (0, [])

    def _up(self) -> str:
        width = max(1, self._console.width)
        rows = sum(max(1, -(-length // width)) for length in self._lengths)
        return f"\r\x1b[{rows}A" if rows else "\r"

    def _as_codes(self, line: Text) -> str:
        with self._console.capture() as capture:
            self._console.print(line, end="", soft_wrap=True, highlight=False)
        return capture.get()

    def _write(self, text: str) -> None:
        self._console.file.write(text)
        self._console.file.flush()
