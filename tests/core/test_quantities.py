"""Kubernetes quantities as numbers."""

from __future__ import annotations

from decimal import Decimal

import pytest

from stagecoach_core.quantities import num_cpus, parse_quantity


@pytest.mark.parametrize(
    ("quantity", "number"),
    [("96", 96), ("1.5", Decimal("1.5")), ("500m", Decimal("0.5")), ("2k", 2000), ("64Mi", 64 << 20), ("1Ti", 1 << 40)],
)
def test_a_quantity_is_its_number_times_its_suffix(quantity: str, number: int | Decimal) -> None:
    assert parse_quantity(quantity) == number


@pytest.mark.parametrize(("quantity", "cpus"), [("4", 4), ("1.5", 1), ("500m", 0), ("2500m", 2), ("1k", 1000)])
def test_cpus_are_rounded_down(quantity: str, cpus: int) -> None:
    assert num_cpus(quantity) == cpus
