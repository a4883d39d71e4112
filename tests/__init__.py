"""The test suite; it mirrors the packages."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
"""The checkout."""

SHARED_DATA = ROOT.parent / "shared" / "data"
"""Public vocabularies, instructions and texts, in a folder next to the checkout."""
