"""S3 credentials in a folder, one file for each key: a mounted Kubernetes Secret.

The files are read for every request, so that credentials rotated while a stage runs (the kubelet replaces the mounted
files) are used at once. They never pass through the environment, arguments or logs.
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
"""Name of this credential provider in botocore."""

CURRENT = "..data"
"""The kubelet's symbolic link to the folder with a mount's current files. It is replaced atomically, so resolving it
once gives two keys of the same revision."""
READ_ATTEMPTS = 3


class KeyPair(NamedTuple):
    """The pair of keys that signs requests."""

    access_key: str
    secret_key: str

    def __repr__(self) -> str:
        return "KeyPair(…)"


def read_key_pair(folder: Path) -> KeyPair:
    """Return both keys of the same revision.

    Raises OSError if a file is missing, ValueError if one is empty; neither message contains a secret.
    """
    for attempt in range(READ_ATTEMPTS):
        present = (folder / CURRENT).resolve() if (folder / CURRENT).exists() else folder
        try:
            pair = KeyPair(_read(present / ACCESS_KEY_FILE), _read(present / SECRET_KEY_FILE))
        except FileNotFoundError:  # the folder may have been replaced after the link was resolved
            if attempt == READ_ATTEMPTS - 1:
                raise
            continue
        empty = [name for name, half in zip((ACCESS_KEY_FILE, SECRET_KEY_FILE), pair, strict=True) if not half]
        if empty:
            raise ValueError(f"{folder / empty[0]} is empty; the Secret's key of that name must have a value")
        return pair
    raise AssertionError("unreachable")


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8").strip()  # Secrets are often made from a file that ends with a newline


def put_first(session: botocore.session.Session, folder: Path) -> None:
    """Make a session read the folder before any other source, and no other source if the folder has no credentials."""
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
    """Return credentials that read the folder at every use. Raises CredentialRetrievalError."""
    from botocore.credentials import Credentials, ReadOnlyCredentials
    from botocore.exceptions import CredentialRetrievalError

    class FolderCredentials(Credentials):
        def get_frozen_credentials(self) -> ReadOnlyCredentials:
            with suppress(OSError, ValueError):  # being replaced: keep the previous keys
                self.access_key, self.secret_key = read_key_pair(folder)
            return ReadOnlyCredentials(self.access_key, self.secret_key, None, None)

    try:
        pair = read_key_pair(folder)
    except (OSError, ValueError) as error:
        raise CredentialRetrievalError(provider=METHOD, error_msg=str(error)) from None
    return FolderCredentials(*pair, method=METHOD)
