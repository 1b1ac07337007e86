"""The server's own certificate, which may be renewed while it serves."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

import grpc
import structlog
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization

from chat_ticket_svc import config
from chat_ticket_svc.config import ConfigurationError, Settings

log = structlog.get_logger()

RELOAD_SECONDS = 2


class ServerCertificates:
    """What the server shows to callers, and what it judges theirs by, from PEM files.

    Files that change are used for the connections made from then on; what cannot be used is
    logged, and what was read before stays.
    """

    @classmethod
    def of(cls, settings: Settings) -> Self | None:
        """Those of the settings, if any. ConfigurationError when they cannot be served."""
        if settings.tls_certificate is None or settings.tls_key is None:
            return None
        return cls(
            certificate=settings.tls_certificate,
            key=settings.tls_key,
            client_authority=settings.tls_client_ca if "mtls" in settings.auth else None,
        )

    def __init__(self, *, certificate: Path, key: Path, client_authority: Path | None):
        self._paths = {"CHAT_TICKET_TLS_CERTIFICATE": certificate, "CHAT_TICKET_TLS_KEY": key}
        if client_authority is not None:
            self._paths["CHAT_TICKET_TLS_CLIENT_CA"] = client_authority
        self._read = self._contents()
        self._current = self._given = _configuration(*self._read)
        self._watching: asyncio.Task[None] | None = None

    @property
    def own(self) -> x509.Certificate:
        """What callers are shown."""
        return x509.load_pem_x509_certificates(self._read[0])[0]

    def credentials(self) -> grpc.ServerCredentials:
        """Callers must show a certificate exactly when there is an authority to judge it by."""
        return grpc.dynamic_ssl_server_credentials(
            self._current,
            self._renewed,  # type: ignore[arg-type] # gRPC's own documentation allows None
            require_client_authentication=len(self._paths) == 3,
        )

    def watch(self) -> None:
        self._watching = asyncio.create_task(self._watch())

    async def close(self) -> None:
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)

    def _renewed(self) -> grpc.ServerCertificateConfiguration | None:
        """Asked by gRPC, on a thread of its own, before each handshake; None is no change."""
        current = self._current
        if current is self._given:
            return None
        self._given = current
        return current

    async def _watch(self) -> None:
        trouble = ""
        while True:
            await asyncio.sleep(RELOAD_SECONDS)
            before = trouble
            try:
                contents = await asyncio.to_thread(self._contents)
                if contents != self._read:
                    self._current = _configuration(*contents)
                    self._read = contents
                    log.info("the certificate files are renewed")
                trouble = ""
            except ConfigurationError as error:
                trouble = str(error)
            except Exception as error:  # whatever it is, the certificate of before still serves
                trouble = type(error).__qualname__
            if trouble and trouble != before:
                log.error(
                    "the certificate files cannot be used: the old ones are kept", because=trouble
                )

    def _contents(self) -> list[bytes]:
        return [config.read_file(*each) for each in self._paths.items()]


@contextlib.contextmanager
def _must_be(variable: str, what: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigurationError(f"{variable}: does not hold {what}") from error


def _configuration(
    certificate: bytes, key: bytes, client_authority: bytes | None = None
) -> grpc.ServerCertificateConfiguration:
    """Raises ConfigurationError for what gRPC would fail to serve, handshake by handshake."""
    with _must_be("CHAT_TICKET_TLS_CERTIFICATE", "certificates in PEM"):
        own = x509.load_pem_x509_certificates(certificate)[0]
    with _must_be("CHAT_TICKET_TLS_KEY", "a key in PEM without a password"):
        public = serialization.load_pem_private_key(key, None).public_key()
    if own.public_key() != public:
        raise ConfigurationError("CHAT_TICKET_TLS_KEY: is not the key of the certificate")
    if own.not_valid_after_utc <= datetime.now(UTC):
        raise ConfigurationError("CHAT_TICKET_TLS_CERTIFICATE: has expired")
    if client_authority is not None:
        with _must_be("CHAT_TICKET_TLS_CLIENT_CA", "certificates in PEM"):
            x509.load_pem_x509_certificates(client_authority)
    return grpc.ssl_server_certificate_configuration([(key, certificate)], client_authority)
