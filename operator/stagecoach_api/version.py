"""The version of Stagecoach: of its packages, its images and its chart.

This is the only place it is written. The build reads it from this file (`tool.hatch.version` in pyproject.toml), and
`make generate` copies it into Chart.yaml. A constant, because the images contain the packages without their metadata.
"""

from __future__ import annotations

__version__ = "0.1.0"
