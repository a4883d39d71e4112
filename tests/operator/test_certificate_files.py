"""Certificates that change while the operator runs: new connections and new pods get them, without a restart."""

from __future__ import annotations

import asyncio
import shutil
import ssl
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from stagecoach_operator.certificate_files import CertificateFiles
from stagecoach_operator.guarded_listener import GuardedListener
from stagecoach_operator.settings import Settings
from tests.operator.certificates import Certificates, make_certificates


@pytest.fixture(scope="module")
def generations(tmp_path_factory: pytest.TempPathFactory) -> tuple[Certificates, Certificates]:
    folder = tmp_path_factory.mktemp("generations")
    return make_certificates(folder / "old", "old"), make_certificates(folder / "new", "new")


def install(made: Certificates, folder: Path) -> None:
    """Put certificates where the settings name them."""
    for file in (made.certificate, made.key, made.ca):
        shutil.copy(file, folder / file.name)


def files_in(folder: Path) -> CertificateFiles:
    settings = Settings(
        trainer_image="trainer:1",
        trainer_code="code",
        progress_url="https://progress",
        progress_ca=(folder / "ca.crt").read_text(),
        progress_cert_file=str(folder / "tls.crt"),
        progress_key_file=str(folder / "tls.key"),
        progress_ca_file=str(folder / "ca.crt"),
    )
    return CertificateFiles(settings)


async def reaches(port: int, authorities: str) -> bool:
    """Return whether a client that trusts these authorities can call the server."""
    context = ssl.create_default_context(cadata=authorities)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=context)) as session:
        try:
            async with session.get(f"https://127.0.0.1:{port}/") as answer:
                return answer.status == 404
        except aiohttp.ClientSSLError:
            return False


def test_renewed_certificates_and_authorities_are_taken_over(
    tmp_path: Path, generations: tuple[Certificates, Certificates]
) -> None:
    old, new = generations
    install(old, tmp_path)
    files = files_in(tmp_path)
    trusted_before = files.authorities or ""

    async def scenario() -> None:
        listener = GuardedListener(web.Application(), lambda: files.context)
        port = await listener.start("127.0.0.1", 0)
        assert await reaches(port, trusted_before)
        assert not files.refresh(), "nothing has changed"
        install(new, tmp_path)
        assert files.refresh()
        assert files.authorities is not None
        assert await reaches(port, files.authorities)
        assert not await reaches(port, trusted_before)
        # A replica that has not read the new files yet still presents the old certificate.
        install(old, tmp_path)
        files.context = files_in(tmp_path).context
        assert await reaches(port, files.authorities), "new pods trust two generations"
        await listener.cleanup()

    asyncio.run(scenario())


def test_pods_with_a_bundle_of_both_authorities_report_before_and_after_the_change(
    tmp_path: Path, generations: tuple[Certificates, Certificates]
) -> None:
    """The rotation that docs/operator.md describes: first both authorities, then the new certificate."""
    old, new = generations
    install(old, tmp_path)
    (tmp_path / "ca.crt").write_text(old.ca.read_text() + new.ca.read_text())
    files = files_in(tmp_path)
    bundle = files.authorities or ""

    async def scenario() -> None:
        listener = GuardedListener(web.Application(), lambda: files.context)
        port = await listener.start("127.0.0.1", 0)
        assert await reaches(port, bundle)
        install(new, tmp_path)
        files.refresh()
        assert await reaches(port, bundle)
        await listener.cleanup()

    asyncio.run(scenario())


@pytest.mark.parametrize("damage", ["half of a pair", "no certificate", "no file"])
def test_files_that_cannot_be_used_are_not_taken_over(
    damage: str, tmp_path: Path, generations: tuple[Certificates, Certificates]
) -> None:
    old, new = generations
    install(old, tmp_path)
    files = files_in(tmp_path)
    context, authorities = files.context, files.authorities
    if damage == "half of a pair":
        shutil.copy(new.key, tmp_path / "tls.key")
    elif damage == "no certificate":
        (tmp_path / "ca.crt").write_text("")
    else:
        (tmp_path / "tls.crt").unlink()
    assert not files.refresh()
    assert (files.context, files.authorities, files.failures) == (context, authorities, 1)
    install(new, tmp_path)
    assert files.refresh(), "the whole pair is"
    assert files.context is not context
