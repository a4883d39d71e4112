"""The progress server's certificate and its authorities, read again when the files change: no restart is needed.

Files of a Secret are replaced one after the other from the view of a reader, so a pair that does not match is not used.
"""

from __future__ import annotations

import logging
import re
import ssl
from dataclasses import dataclass, field
from pathlib import Path

from stagecoach_operator.settings import Settings

log = logging.getLogger(__name__)

CHECK_SECONDS = 10.0
"""How often the files are compared. The kubelet updates them within about a minute."""
_CERTIFICATE = re.compile(r"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----\n?", re.DOTALL)


@dataclass
class CertificateFiles:
    """What is read from the files of the settings."""

    settings: Settings
    context: ssl.SSLContext | None = None
    """TLS context for new connections. None if the server serves plain HTTP."""
    authorities: str | None = None
    """Certificates that new pods trust: those of the file now, and those that it contained before."""
    reloads: int = 0
    failures: int = 0
    _pair: tuple[bytes, bytes] | None = None
    _bundle: str | None = None
    _refused: object = field(default=None)

    def __post_init__(self) -> None:
        """Read the files. Raises OSError or ssl.SSLError if they cannot be used."""
        self.authorities = self._bundle = self.settings.progress_ca
        pair = self._read_pair()
        if pair is not None:
            self.context, self._pair = self._new_context(), pair

    def refresh(self) -> bool:
        """Read the files again; return whether the authorities have changed. What cannot be used is not taken over."""
        changed = False
        try:
            pair, bundle = self._read_pair(), self._read_bundle()
            if pair != self._pair and pair is not None:
                self.context, self._pair = self._new_context(), pair
                self.reloads += 1
                log.info("the progress server's certificate has changed")
            if bundle != self._bundle and bundle is not None:
                changed = self._take_over(bundle)
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            self._complain(error)
        return changed

    def _take_over(self, bundle: str) -> bool:
        """Trust another bundle, and for a while the certificates of the one before it as well."""
        new, old = _CERTIFICATE.findall(bundle), _CERTIFICATE.findall(self._bundle or "")
        if not new:
            raise ValueError("the file of authorities contains no certificate")
        ssl.create_default_context(cadata=bundle)  # raises if one is damaged
        self._bundle = bundle
        self.authorities = "".join(f"{item.strip()}\n" for item in dict.fromkeys([*new, *old]))
        self.reloads += 1
        log.info("the progress server's authorities have changed; new pods trust those before as well")
        return True

    def _complain(self, error: Exception) -> None:
        self.failures += 1
        text = f"{type(error).__name__}: {error}"
        if text != self._refused:
            self._refused = text
            log.warning("the progress server keeps its certificates, because those in the files are unusable: %s", text)

    def _read_pair(self) -> tuple[bytes, bytes] | None:
        files = self.settings.progress_cert_file, self.settings.progress_key_file
        if files[0] is None or files[1] is None:
            return None
        return Path(files[0]).read_bytes(), Path(files[1]).read_bytes()

    def _read_bundle(self) -> str | None:
        file = self.settings.progress_ca_file
        return None if file is None else Path(file).read_text(encoding="utf-8")

    def _new_context(self) -> ssl.SSLContext:
        """Return a new context: a failed change of one in use would leave it without a certificate."""
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(str(self.settings.progress_cert_file), str(self.settings.progress_key_file))
        return context
