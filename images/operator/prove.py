"""Imports everything the operator uses while its image is built: a missing module fails the build, and Python writes
the bytecode, which pods could not, because their root file system is read-only."""

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
"""Modules that the operator imports only at run time."""
UNWANTED = ("torch", "stagecoach_trainer", "stagecoach_cli")


def prove() -> None:
    for name in PACKAGES:
        package = importlib.import_module(name)
        for module in pkgutil.walk_packages(package.__path__, prefix=f"{name}."):
            importlib.import_module(module.name)
    for name in LATE:
        importlib.import_module(name)
    import boto3

    # botocore imports most of its modules, and reads its data, when a client is created.
    boto3.client("s3", region_name="us-east-1", aws_access_key_id="none", aws_secret_access_key="none")  # noqa: S106
    found = [name for name in UNWANTED if find_spec(name) is not None]
    if found:
        sys.exit(f"the operator's image must not contain {', '.join(found)}")


if __name__ == "__main__":
    prove()
