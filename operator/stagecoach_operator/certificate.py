"""The certificate of the progress server, made once per installation in the cluster.

The authority's key is used for one signature and never stored.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

VALID_FOR = timedelta(days=3650)
CLOCK_SKEW = timedelta(hours=1)
"""Before which a certificate is valid already: clocks of nodes differ."""


def make_certificate(host: str, now: datetime) -> dict[str, bytes]:
    """Return `ca.crt`, `tls.crt` and `tls.key` (PEM) of a server called `host` and `host.cluster.local`."""
    authority_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    issuer = _name("stagecoach progress authority")
    authority = _builder(issuer, issuer, authority_key.public_key(), now)
    authority = authority.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    authority = authority.add_extension(key_usage(signs_certificates=True), critical=True)
    server = _builder(_name("stagecoach progress"), issuer, key.public_key(), now)
    names = x509.SubjectAlternativeName([x509.DNSName(host), x509.DNSName(f"{host}.cluster.local")])
    server = server.add_extension(names, critical=False)
    server = server.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    server = server.add_extension(key_usage(signs_certificates=False), critical=True)
    server = server.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key())
    server = server.add_extension(identifier, critical=False)
    return {
        "ca.crt": authority.sign(authority_key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM),
        "tls.crt": server.sign(authority_key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM),
        "tls.key": key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ),
    }


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, now: datetime
) -> x509.CertificateBuilder:
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key)
    builder = builder.serial_number(x509.random_serial_number())
    builder = builder.not_valid_before(now - CLOCK_SKEW).not_valid_after(now + VALID_FOR)
    # Python 3.13 and later reject an authority without it (RFC 5280, section 4.2.1.2).
    return builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)


def key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    """Return the usage of a key; Python 3.13 rejects an authority without it."""
    return x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
