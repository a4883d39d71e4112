"""Sessions of boto3, which is imported at the first one."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stagecoach_api.names import ENV_CREDENTIALS_DIR
from stagecoach_api.stores.credentials import put_first

if TYPE_CHECKING:
    from boto3.session import Session


@cache
def _service_models() -> Any:
    """botocore's service models, shared by all stores: parsing them is most of the cost of a client."""
    import botocore.loaders

    return botocore.loaders.create_loader()


def new_session() -> Session:
    """Return a new session: sessions are not thread-safe, and a new one reads the credentials again.

    Credentials are those in the folder `ENV_CREDENTIALS_DIR` if it is set, else those that the AWS SDK finds.
    """
    import boto3
    import botocore.session

    core = botocore.session.get_session()
    core.register_component("data_loader", _service_models())
    folder = os.environ.get(ENV_CREDENTIALS_DIR)
    if folder:
        put_first(core, Path(folder))
    return boto3.session.Session(botocore_session=core)
