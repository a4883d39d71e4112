"""Imports all that the operator uses, once, while its image is built: what fails here fails there, and Python leaves
the bytecode that pods cannot write."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from importlib.util import find_spec

PACKAGES = ("stagecoach_api", "stagecoach_core", "stagecoach_operator")
LATE = (
    "boto3.s3.transfer",
    "cryptography.hazmat.primitives.asymmetric.rsa",
    "kopf",
    "kubernetes.aio.client",
    "kubernetes.aio.config",
)
"""What the operator imports only when it runs."""
UNWANTED = ("torch", "stagecoach_trainer", "stagecoach_cli")


def prove() -> None:
    for name in PACKAGES:
        package = importlib.import_module(name)
        for module in pkgutil.walk_packages(package.__path__, prefix=f"{name}."):
            importlib.import_module(module.name)
    for name in LATE:
        importlib.import_module(name)
    import boto3

    # botocore imports and reads most of what it needs when a client is made.
    boto3.client("s3", region_name="us-east-1", aws_access_key_id="none", aws_secret_access_key="none")  # noqa: S106
    found = [name for name in UNWANTED if find_spec(name) is not None]
    if found:
        sys.exit(f"the operator's image must not hold {', '.join(found)}")


if __name__ == "__main__":
    prove()
