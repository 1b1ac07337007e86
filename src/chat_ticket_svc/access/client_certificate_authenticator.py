"""Authentication by client certificate (mutual TLS), with a policy file that lists the callers.

The file is TOML. Each table grants one caller its tenants and permissions. The table's name is
the SPIFFE id or a DNS name of the caller's certificate:

    ["spiffe://example.org/assistant"]
    tenants = "*"
    permissions = ["read", "write", "ticket"]

    ["billing.internal"]
    tenants = ["acme"]
    permissions = ["read"]
"""

import functools
import time
import tomllib
from pathlib import Path
from typing import Annotated

from cryptography import x509
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from chat_ticket_svc import config
from chat_ticket_svc.access.authenticator import Context
from chat_ticket_svc.access.credential import (
    Credential,
    Metadata,
    Permission,
    credential_expired,
    parse_tenants,
)
from chat_ticket_svc.config import ConfigurationError
from chat_ticket_svc.errors import UnauthenticatedError
from chat_ticket_svc.telemetry.redaction import quote

# A subject alternative name: its type and its value.
Name = tuple[type[x509.GeneralName], str]
URI, DNS = x509.UniformResourceIdentifier, x509.DNSName

SPIFFE_ID = r"spiffe://[a-z0-9._-]+(/[A-Za-z0-9._-]+)*"
DNS_NAME = r"[a-z0-9_-]+(\.[a-z0-9_-]+)*"


class _Grant(BaseModel):
    """What the policy file grants one caller."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    tenants: Annotated[frozenset[str] | None, BeforeValidator(parse_tenants)]
    permissions: frozenset[Permission] = Field(min_length=1)


_CallerName = Annotated[str, Field(pattern=f"^({SPIFFE_ID}|{DNS_NAME})$")]
_POLICY = TypeAdapter(dict[_CallerName, _Grant])


class ClientCertificateAuthenticator:
    """Turns the client certificate of a call's connection into a credential.

    gRPC has verified the certificate against the client CA during the TLS handshake.
    """

    def __init__(self, path: Path):
        try:
            text = config.read_file("CHAT_TICKET_MTLS_POLICY", path).decode()
            policy = _POLICY.validate_python(tomllib.loads(text))
        except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise ConfigurationError(f"CHAT_TICKET_MTLS_POLICY: {error}") from error
        except ValidationError as error:
            raise ConfigurationError(
                "\n".join(
                    f"CHAT_TICKET_MTLS_POLICY: {'.'.join(map(str, problem['loc']))}:"
                    f" {problem['msg'].removeprefix('Value error, ')}"
                    for problem in error.errors(include_input=False, include_url=False)
                )
            ) from error
        self._grants = {
            # The key includes the type of the name: a CA that signs any DNS name could otherwise
            # put a SPIFFE id into a DNS name.
            (URI if "://" in name else DNS, name): grant
            for name, grant in policy.items()
        }

    def __len__(self) -> int:
        """The number of callers in the policy file."""
        return len(self._grants)

    async def authenticate(self, context: Context, _: Metadata) -> Credential:
        pem = next(iter(context.auth_context().get("x509_pem_cert", ())), b"")
        names, expires_at = _identity(pem)
        name = next((name for name in names if name in self._grants), None)
        if name is None:
            raise UnauthenticatedError(
                "client certificate has no name that the policy lists",
                reason="CREDENTIAL_INVALID",
                diagnosis={
                    "part": "certificate",
                    "expected": "a name that the policy lists",
                    "found": quote([text for _, text in names]),
                },
            )
        grant = self._grants[name]
        # The handshake checked this too, but the connection may be old.
        if expires_at <= time.time():
            raise credential_expired()
        return Credential(
            tenants=grant.tenants,
            permissions=grant.permissions,
            expires_at=expires_at,
            subject=name[1],
        )


@functools.lru_cache(maxsize=1024)
def _identity(pem: bytes) -> tuple[list[Name], float]:
    """The names in a certificate, its SPIFFE id first, and when it expires.

    The names are read from the certificate itself, because gRPC's auth context truncates a name
    at a NUL character: a longer name could pass for one that the policy lists.
    """
    if not pem:
        return [], 0
    certificate = x509.load_pem_x509_certificate(pem)
    try:
        extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except x509.ExtensionNotFound:
        return [], 0
    uris = extension.value.get_values_for_type(URI)
    # The SPIFFE X.509-SVID standard requires exactly one URI.
    names: list[Name] = [(URI, uri) for uri in uris if len(uris) == 1]
    names += [(DNS, name.lower()) for name in extension.value.get_values_for_type(DNS)]
    return names, certificate.not_valid_after_utc.timestamp()
