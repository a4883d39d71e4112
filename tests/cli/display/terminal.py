"""A terminal that wraps long lines again when it is resized, as GNOME's, KDE's, iTerm, kitty and tmux do."""

from __future__ import annotations

import re

_PARTS = re.compile(r"\x1b\[([0-9;?]*)([A-Za-z])|([^\x1b]+)")


class Terminal:
    """Interprets what is written to it. A line ends at a line feed, however many rows it takes."""

    def __init__(self, width: int, height: int = 24) -> None:
        self.width, self.height = width, height
        self._lines = [""]
        self._line, self._column = 0, 0

    def write(self, text: str) -> int:
        for part in _PARTS.finditer(text):
            if part[3] is not None:
                for character in part[3]:
                    self._put(character)
            elif part[2] == "A":
                self._up(int(part[1] or 1))
            elif part[2] == "K":
                self._lines[self._line] = self._lines[self._line][: self._column]
            elif part[2] == "J":
                self._lines[self._line] = self._lines[self._line][: self._column]
                del self._lines[self._line + 1 :]
            else:
                assert part[2] == "m", f"unknown sequence {part[0]!r}"
        return len(text)

    def flush(self) -> None:
        """Do nothing."""

    def isatty(self) -> bool:
        return True

    @property
    def rows(self) -> list[str]:
        """The rows with text, as they are wrapped now."""
        rows = [row for line in self._lines for row in self._wrapped(line)]
        while rows and not rows[-1]:
            rows.pop()
        return rows

    def _put(self, character: str) -> None:
        if character == "\n":
            self._line, self._column = self._line + 1, 0
            if self._line == len(self._lines):
                self._lines.append("")
        elif character == "\r":
            self._column -= self._column % self.width
        else:
            line = self._lines[self._line].ljust(self._column)
            self._lines[self._line] = line[: self._column] + character + line[self._column + 1 :]
            self._column += 1

    def _up(self, rows: int) -> None:
        column = self._column % self.width
        row = sum(self._num_rows(line) for line in self._lines[: self._line]) + self._column // self.width
        row = max(0, row - rows)
        for index, line in enumerate(self._lines):
            if row < self._num_rows(line):
                self._line, self._column = index, row * self.width + column
                return
            row -= self._num_rows(line)

    def _num_rows(self, line: str) -> int:
        return max(1, -(-len(line) // self.width))

    def _wrapped(self, line: str) -> list[str]:
        return [line[start : start + self.width].rstrip() for start in range(0, len(line), self.width)] or [""]
