"""Formatting of durations, counts, sizes and metrics for people."""

from __future__ import annotations

import math

THOUSAND = 1000
MINUTE = 60
HOUR = 3600
DAY = 86400
SHORT_DIGEST = 12


def duration(seconds: float) -> str:
    """Return `0.4 s`, `42 s`, `3 m 05 s`, `2 h 07 m` or `3 d 04 h`."""
    if seconds < 10:
        return f"{max(0.0, seconds):.1f} s"
    whole = round(seconds)
    if whole < MINUTE:
        return f"{whole} s"
    if whole < HOUR:
        return f"{whole // MINUTE} m {whole % MINUTE:02d} s"
    if whole < DAY:
        return f"{whole // HOUR} h {whole % HOUR // MINUTE:02d} m"
    return f"{whole // DAY} d {whole % DAY // HOUR:02d} h"


def quantity(value: float) -> str:
    """Return a count with three significant digits: `812`, `12.3k`, `4.2M`, `1.5B`, `2T`."""
    for power, suffix in ((4, "T"), (3, "B"), (2, "M"), (1, "k")):
        unit = THOUSAND**power
        if value >= unit * 0.9995:
            return f"{value / unit:.3g}{suffix}"
    return f"{value:.3g}" if value != int(value) else str(int(value))


def size(num_bytes: float) -> str:
    """Return a number of bytes with three significant digits: `812 B`, `12.3 kB`, `4.2 MB`, `1.5 GB`, `2 TB`."""
    for power, unit in ((4, "TB"), (3, "GB"), (2, "MB"), (1, "kB")):
        if num_bytes >= THOUSAND**power * 0.9995:
            return f"{num_bytes / THOUSAND**power:.3g} {unit}"
    return f"{int(num_bytes)} B"


def metric(value: float) -> str:
    """Return a measured value with four significant digits, `NaN`, or a large value as a count."""
    if math.isnan(value):
        return "NaN"
    return quantity(value) if abs(value) >= 10_000 else f"{value:.4g}"


def short(digest: str) -> str:
    """Return the leading digits of a digest, enough to distinguish digests."""
    return digest[:SHORT_DIGEST]


def metric_label(camel: str) -> str:
    """Return a label for a metric's camelCase name: `tokens/s` for `tokensPerSecond`, `grad norm` for `gradNorm`."""
    spaced = "".join(f" {letter.lower()}" if letter.isupper() else letter for letter in camel)
    return spaced.replace(" per second", "/s").replace(" per ", "/")
