"""S3 credentials in mounted files: read for every request, rotated while a store is open, never in a message."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from botocore.credentials import Credentials

from stagecoach_api.names import ENV_CREDENTIALS_DIR
from stagecoach_api.store import AccessDenied, open_store
from stagecoach_api.stores.credentials import KeyPair, read_key_pair
from stagecoach_api.stores.s3_session import new_session
from tests.s3 import ACCESS_KEY, SECRET_KEY, S3Server, make_bucket

pytestmark = pytest.mark.slow


def mount(folder: Path, access_key: str, secret_key: str) -> None:
    """Write credentials as the kubelet mounts a Secret: links to links to files, replaced atomically."""
    folder.mkdir(exist_ok=True)
    version = folder / f"..{len(list(folder.iterdir()))}"
    version.mkdir()
    for name, text in (("accessKeyId", access_key), ("secretAccessKey", secret_key)):
        (version / name).write_text(text + "\n", encoding="utf-8")
        if not (folder / name).is_symlink():
            (folder / name).symlink_to(Path("..data") / name)
    (folder / "..data_tmp").symlink_to(version.name)
    (folder / "..data_tmp").replace(folder / "..data")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, s3_credentials: None) -> Path:
    """The folder that credentials are read from; the environment has none."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv(ENV_CREDENTIALS_DIR, str(tmp_path / "credentials"))
    return tmp_path / "credentials"


def current_credentials() -> Credentials:
    credentials = new_session().get_credentials()
    assert credentials is not None
    return credentials


def test_a_store_is_opened_with_mounted_credentials(folder: Path, s3_server: S3Server) -> None:
    with pytest.MonkeyPatch.context() as patch:  # a store creates no bucket
        patch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
        patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
        make_bucket(s3_server.endpoint, f"mounted-{os.getpid()}")
    mount(folder, ACCESS_KEY, SECRET_KEY)
    store = open_store(f"s3://mounted-{os.getpid()}/p", endpoint=s3_server.endpoint, region="us-east-1")
    store.write("a", b"x")
    assert store.read("a") == b"x"


def test_they_take_precedence_over_the_environment(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "of-the-environment")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "of-the-environment")
    mount(folder, "id", "key")
    assert current_credentials().get_frozen_credentials()[:2] == ("id", "key")


def test_rotated_credentials_are_used_at_once(folder: Path) -> None:
    mount(folder, "old-id", "old-key")
    credentials = current_credentials()
    mount(folder, "new-id", "new-key")
    assert credentials.get_frozen_credentials()[:2] == ("new-id", "new-key")


def test_during_a_replacement_the_previous_credentials_are_used(folder: Path) -> None:
    mount(folder, "id", "key")
    credentials = current_credentials()
    (folder / "..data").unlink()
    assert credentials.get_frozen_credentials()[:2] == ("id", "key")


def test_both_keys_are_of_the_same_revision(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mount(folder, "old-id", "old-key")
    read = Path.read_text

    def read_then_rotate(self: Path, *arguments: str, **named: str) -> str:
        text = read(self, *arguments, **named)
        if text == "old-id\n":
            mount(folder, "new-id", "new-key")
        return text

    monkeypatch.setattr(Path, "read_text", read_then_rotate)
    assert read_key_pair(folder) == ("old-id", "old-key")


@pytest.mark.parametrize(
    ("name", "text"), [("secretAccessKey", None), ("accessKeyId", " \n")], ids=["missing", "empty"]
)
def test_one_key_alone_is_not_usable(folder: Path, name: str, text: str | None) -> None:
    folder.mkdir()
    for each in ("accessKeyId", "secretAccessKey"):
        (folder / each).write_text("canary", encoding="utf-8")
    (folder / name).unlink() if text is None else (folder / name).write_text(text, encoding="utf-8")
    store = open_store("s3://bucket/p", endpoint="http://127.0.0.1:9", region="us-east-1")
    with pytest.raises(AccessDenied, match=f"no usable credentials .*{ENV_CREDENTIALS_DIR}") as caught:
        store.read("a")
    assert "canary" not in f"{caught.value!r} {caught.value}"


def test_a_key_pair_does_not_print_itself() -> None:
    assert "canary" not in f"{KeyPair('canary', 'canary')!r} {KeyPair('canary', 'canary')}"
