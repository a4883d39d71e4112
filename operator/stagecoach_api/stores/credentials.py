"""S3 credentials in a folder, one file each: a Kubernetes Secret as it is mounted.

The files are read for every request, so that credentials that are rotated while a stage runs are used at once: the
kubelet replaces them below the pod. They never pass through the environment, arguments or logs.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from stagecoach_api.names import ACCESS_KEY_FILE, SECRET_KEY_FILE

if TYPE_CHECKING:
    import botocore.session
    from botocore.credentials import Credentials

METHOD = "stagecoach-folder"
"""What botocore calls this way of finding credentials."""

CURRENT = "..data"
"""The kubelet's link to the folder that holds a mount's present files; it is replaced as a whole."""
READ_ATTEMPTS = 3


class KeyPair(NamedTuple):
    """What requests are signed with."""

    access_key: str
    secret_key: str

    def __repr__(self) -> str:
        return "KeyPair(…)"


def read_key_pair(folder: Path) -> KeyPair:
    """Return both halves as they were at one moment. Raises OSError where one is missing, ValueError where one is
    empty; neither holds a secret."""
    for attempt in range(READ_ATTEMPTS):
        present = (folder / CURRENT).resolve() if (folder / CURRENT).exists() else folder
        try:
            pair = KeyPair(_read(present / ACCESS_KEY_FILE), _read(present / SECRET_KEY_FILE))
        except FileNotFoundError:  # the folder may have been replaced between link and file
            if attempt == READ_ATTEMPTS - 1:
                raise
            continue
        empty = [name for name, half in zip((ACCESS_KEY_FILE, SECRET_KEY_FILE), pair, strict=True) if not half]
        if empty:
            raise ValueError(f"{folder / empty[0]} is empty; the Secret's key of that name must hold a value")
        return pair
    raise AssertionError("unreachable")


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8").strip()  # many a Secret is made from a file with a newline at its end


def put_first(session: botocore.session.Session, folder: Path) -> None:
    """Let a session look into the folder before anything else, and at nothing else if there is nothing in it."""
    resolver = session.get_component("credential_provider")
    resolver.insert_before("env", _provider(folder))


def _provider(folder: Path) -> object:
    from botocore.credentials import CredentialProvider

    class FolderProvider(CredentialProvider):
        METHOD = METHOD

        def load(self) -> Credentials:
            return _credentials(folder)

    return FolderProvider()


def _credentials(folder: Path) -> Credentials:
    """Return credentials that read the folder each time they are used. Raises CredentialRetrievalError."""
    from botocore.credentials import Credentials, ReadOnlyCredentials
    from botocore.exceptions import CredentialRetrievalError

    class FolderCredentials(Credentials):
        def get_frozen_credentials(self) -> ReadOnlyCredentials:
            with suppress(OSError, ValueError):  # being replaced: what was read before is tried
                self.access_key, self.secret_key = read_key_pair(folder)
            return ReadOnlyCredentials(self.access_key, self.secret_key, None, None)

    try:
        pair = read_key_pair(folder)
    except (OSError, ValueError) as error:
        raise CredentialRetrievalError(provider=METHOD, error_msg=str(error)) from None
    return FolderCredentials(*pair, method=METHOD)
