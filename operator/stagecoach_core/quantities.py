"""Kubernetes quantities, and the number of threads that follows from them."""

from __future__ import annotations

from decimal import Decimal

from stagecoach_api.spec import Resources

_FACTORS = {
    "m": Decimal("0.001"),
    "k": Decimal(10**3),
    "M": Decimal(10**6),
    "G": Decimal(10**9),
    "T": Decimal(10**12),
    "P": Decimal(10**15),
    "Ki": Decimal(2**10),
    "Mi": Decimal(2**20),
    "Gi": Decimal(2**30),
    "Ti": Decimal(2**40),
    "Pi": Decimal(2**50),
}


def parse_quantity(quantity: str) -> Decimal:
    """Return the value of a quantity such as `4`, `500m` or `64Gi`."""
    number = quantity.rstrip("mkMGTPi")
    suffix = quantity[len(number) :]
    return Decimal(number) * (_FACTORS[suffix] if suffix else 1)


def num_cpus(quantity: str) -> int:
    """Return the number of whole CPUs in a quantity such as `4`, `1.5` or `500m`, rounded down."""
    return int(parse_quantity(quantity))


def threads_per_rank(resources: Resources) -> int | None:
    """Return the number of CPU threads of each rank: its share of a pod's CPUs, at least 1. None if `cpu` is unset."""
    if resources.cpu is None:
        return None
    return max(1, num_cpus(resources.cpu) // resources.num_ranks_per_node)
