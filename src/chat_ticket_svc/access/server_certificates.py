"""The server's TLS certificate, its key and the CA of client certificates, reloaded on change."""

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
from chat_ticket_svc.tasks import cancel_and_wait

log = structlog.get_logger()

RELOAD_SECONDS = 2


class ServerCertificates:
    """The PEM files that the settings name, as gRPC server credentials.

    New connections use the files as they are then. If changed files are not usable, the problem
    is logged and the last usable ones stay in effect.
    """

    @classmethod
    def from_settings(cls, settings: Settings) -> Self | None:
        """None without TLS. Raises ConfigurationError if the files are not usable."""
        if settings.tls_certificate is None or settings.tls_key is None:
            return None
        return cls(
            certificate=settings.tls_certificate,
            key=settings.tls_key,
            client_ca=settings.tls_client_ca if "mtls" in settings.auth else None,
        )

    def __init__(self, *, certificate: Path, key: Path, client_ca: Path | None):
        self._paths = {"CHAT_TICKET_TLS_CERTIFICATE": certificate, "CHAT_TICKET_TLS_KEY": key}
        if client_ca is not None:
            self._paths["CHAT_TICKET_TLS_CLIENT_CA"] = client_ca
        self._contents = self._read_files()
        self._current = self._in_use = _configuration(*self._contents)
        self._reload_task: asyncio.Task[None] | None = None

    @property
    def certificate(self) -> x509.Certificate:
        """The certificate that the server presents."""
        return x509.load_pem_x509_certificates(self._contents[0])[0]

    def credentials(self) -> grpc.ServerCredentials:
        """Clients must present a certificate exactly if there is a CA to verify it."""
        return grpc.dynamic_ssl_server_credentials(
            self._current,
            self._fetch_changed,  # type: ignore[arg-type] # gRPC's own documentation allows None
            require_client_authentication=len(self._paths) == 3,
        )

    def start_reloading(self) -> None:
        self._reload_task = asyncio.create_task(self._reload())

    async def close(self) -> None:
        await cancel_and_wait(self._reload_task)

    def _fetch_changed(self) -> grpc.ServerCertificateConfiguration | None:
        """The configuration if it has changed, else None.

        gRPC calls this before each handshake, on a thread of its own.
        """
        current = self._current
        if current is self._in_use:
            return None
        self._in_use = current
        return current

    async def _reload(self) -> None:
        problem = ""
        while True:
            await asyncio.sleep(RELOAD_SECONDS)
            previous_problem = problem
            try:
                contents = await asyncio.to_thread(self._read_files)
                if contents != self._contents:
                    self._current = _configuration(*contents)
                    self._contents = contents
                    log.info("certificate files reloaded")
                problem = ""
            except ConfigurationError as error:
                problem = str(error)
            except Exception as error:  # no error may end the reloading
                problem = type(error).__qualname__
            if problem and problem != previous_problem:
                log.error("certificate files not usable, keeping the old ones", problem=problem)

    def _read_files(self) -> list[bytes]:
        return [config.read_file(variable, path) for variable, path in self._paths.items()]


@contextlib.contextmanager
def _must_contain(variable: str, what: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigurationError(f"{variable}: must contain {what}") from error


def _configuration(
    certificate: bytes, key: bytes, client_ca: bytes | None = None
) -> grpc.ServerCertificateConfiguration:
    """Raises ConfigurationError for files with which every TLS handshake would fail."""
    with _must_contain("CHAT_TICKET_TLS_CERTIFICATE", "PEM certificates"):
        own = x509.load_pem_x509_certificates(certificate)[0]
    with _must_contain("CHAT_TICKET_TLS_KEY", "an unencrypted PEM key"):
        public_key = serialization.load_pem_private_key(key, None).public_key()
    if own.public_key() != public_key:
        raise ConfigurationError("CHAT_TICKET_TLS_KEY: does not match the certificate")
    if own.not_valid_after_utc <= datetime.now(UTC):
        raise ConfigurationError("CHAT_TICKET_TLS_CERTIFICATE: has expired")
    if client_ca is not None:
        with _must_contain("CHAT_TICKET_TLS_CLIENT_CA", "PEM certificates"):
            x509.load_pem_x509_certificates(client_ca)
    return grpc.ssl_server_certificate_configuration([(key, certificate)], client_ca)
