"""Those whom the service trusts: an issuer of tokens with its server of keys, and a CA."""

import asyncio
import contextlib
import datetime
import ipaddress
import json
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import jwt
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from jwt.algorithms import ECAlgorithm

ISSUER = "https://issuer.example"
AUDIENCE = "chat-ticket-svc"

OK = b"HTTP/1.1 200 OK\r\nConnection: close\r\n"


class Key:
    """A key that an issuer signs with."""

    def __init__(self, key_id: str = "one", use: str = "sig"):
        self.key_id = key_id
        self._use = use
        self.private = ec.generate_private_key(ec.SECP256R1())

    @property
    def public(self) -> dict[str, str]:
        public = ECAlgorithm.to_jwk(self.private.public_key(), as_dict=True)
        return {**public, "kid": self.key_id, "alg": "ES256", "use": self._use}

    def token(self, **claims: Any) -> str:
        """A token for all tenants and permissions, but for `claims`; None leaves one out."""
        return jwt.encode(
            self.claims(**claims), self.private, "ES256", headers={"kid": self.key_id}
        )

    def trusted(self, directory: Path) -> dict[str, str]:
        """The settings by which a server believes its tokens."""
        (directory / "keys.json").write_bytes(key_set(self))
        return {
            "jwks": str(directory / "keys.json"),
            "jwt_issuer": ISSUER,
            "jwt_audience": AUDIENCE,
        }

    @staticmethod
    def claims(**claims: Any) -> dict[str, Any]:
        claims = {
            "iss": ISSUER,
            "aud": AUDIENCE,
            "exp": int(time.time()) + 600,
            "tenants": "*",
            "scope": "read write delete ticket",
            **claims,
        }
        return {name: value for name, value in claims.items() if value is not None}


def key_set(*keys: Key) -> bytes:
    return json.dumps({"keys": [key.public for key in keys]}).encode()


class KeyServer:
    """Serves a key set, or another body, over HTTP, and counts the requests.

    `/elsewhere` always has an answer that is in order.
    """

    url: str

    def __init__(self, *keys: Key):
        self.body = key_set(*keys)
        self.head = OK
        self.requests = 0
        self.answering = asyncio.Event()
        self.answering.set()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            request = await reader.readuntil(b"\r\n\r\n")
            head = OK if b"/elsewhere" in request else self.head
            self.requests += 1
            writer.write(head + b"\r\n")
            while not self.answering.is_set():
                writer.write(b" ")
                await asyncio.sleep(0.1)
            writer.write(self.body)
            await writer.drain()
        writer.close()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator["KeyServer"]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/keys"
        try:
            yield self
        finally:
            self.answering.set()
            server.close()
            await server.wait_closed()


@dataclass(frozen=True)
class Certificate:
    """A certificate and its key, as PEM."""

    certificate: bytes
    key: bytes

    def write(self, directory: Path) -> dict[str, str]:
        """The settings by which a server shows it."""
        directory.mkdir(exist_ok=True)
        (directory / "key.pem").write_bytes(self.key)
        (directory / "certificate.pem").write_bytes(self.certificate)
        return {
            "tls_certificate": str(directory / "certificate.pem"),
            "tls_key": str(directory / "key.pem"),
        }


class Authority:
    """A CA for servers and callers."""

    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a CA of the tests")])
        self.certificate = self._sign(self._key, self._name, [], ca=True)

    def server(self, **validity: float) -> Certificate:
        loopback = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
        return self.issue([x509.DNSName("localhost"), loopback], **validity)

    def caller(
        self, *, uris: Sequence[str] = (), names: Sequence[str] = (), **validity: float
    ) -> Certificate:
        uri = [x509.UniformResourceIdentifier(each) for each in uris]
        return self.issue([*uri, *[x509.DNSName(name) for name in names]], **validity)

    def issue(self, names: Sequence[x509.GeneralName], *, seconds: float = 3600) -> Certificate:
        key = ec.generate_private_key(ec.SECP256R1())
        # As SPIFFE ids are issued, without a common name; a certificate needs some name.
        kind = NameOID.ORGANIZATION_NAME if names else NameOID.COMMON_NAME
        subject = x509.Name([x509.NameAttribute(kind, "anything")])
        return Certificate(
            certificate=self._sign(key, subject, names, seconds=seconds),
            key=key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            ),
        )

    def trusted_by(self, caller: Certificate | None = None) -> grpc.ChannelCredentials:
        """Credentials of a channel whose server must be of this CA."""
        if caller is None:
            return grpc.ssl_channel_credentials(self.certificate)
        return grpc.ssl_channel_credentials(self.certificate, caller.key, caller.certificate)

    def _sign(
        self,
        key: ec.EllipticCurvePrivateKey,
        subject: x509.Name,
        names: Sequence[x509.GeneralName],
        *,
        ca: bool = False,
        seconds: float = 3600,
    ) -> bytes:
        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(seconds=seconds))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        )
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        signed = builder.sign(self._key, hashes.SHA256())
        return signed.public_bytes(serialization.Encoding.PEM)
