"""Callers that prove themselves by a client certificate, as a file lists them.

The file is TOML, with one table for each caller, named by the SPIFFE id or by a DNS name of its
certificate:

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
from typing import Annotated, Any

import grpc.aio
from cryptography import x509
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from chat_ticket_svc import config
from chat_ticket_svc.access.credential import Credential, Metadata, Permission, expired, tenants_of
from chat_ticket_svc.config import ConfigurationError
from chat_ticket_svc.errors import UnauthenticatedError

Context = grpc.aio.ServicerContext[Any, Any]

Name = tuple[type[x509.GeneralName], str]
URI, DNS = x509.UniformResourceIdentifier, x509.DNSName

SPIFFE_ID = r"spiffe://[a-z0-9._-]+(/[A-Za-z0-9._-]+)*"
DNS_NAME = r"[a-z0-9_-]+(\.[a-z0-9_-]+)*"


class _Caller(BaseModel):
    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    tenants: Annotated[frozenset[str] | None, BeforeValidator(tenants_of)]
    permissions: frozenset[Permission] = Field(min_length=1)


_Name = Annotated[str, Field(pattern=f"^({SPIFFE_ID}|{DNS_NAME})$")]
_FILE = TypeAdapter(dict[_Name, _Caller])


class ClientCertificateAuthenticator:
    """Turns the client certificate of a call's connection into a credential.

    gRPC has verified it against the authority of callers before the first call.
    """

    def __init__(self, path: Path):
        try:
            text = config.read_file("CHAT_TICKET_MTLS_POLICY", path).decode()
            listed = _FILE.validate_python(tomllib.loads(text))
        except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise ConfigurationError(f"CHAT_TICKET_MTLS_POLICY: {error}") from error
        except ValidationError as error:
            raise ConfigurationError(
                "\n".join(
                    f"CHAT_TICKET_MTLS_POLICY: {'.'.join(map(str, each['loc']))}: {each['msg']}"
                    for each in error.errors(include_input=False, include_url=False)
                )
            ) from error
        self._callers = {
            # By the kind of name: one that signs any DNS name could write a SPIFFE id into it.
            (URI if "://" in name else DNS, name): caller
            for name, caller in listed.items()
        }

    def __len__(self) -> int:
        """How many callers are listed."""
        return len(self._callers)

    async def authenticate(self, context: Context, _: Metadata) -> Credential:
        pem = next(iter(context.auth_context().get("x509_pem_cert", ())), b"")
        names, expires_at = _identity(pem)
        caller = next((self._callers[name] for name in names if name in self._callers), None)
        if caller is None:
            raise UnauthenticatedError(
                "the client certificate is of no listed caller", reason="CREDENTIAL_INVALID"
            )
        # Verified when the connection was made, which can be long ago.
        if expires_at <= time.time():
            raise expired()
        return Credential(
            tenants=caller.tenants, permissions=caller.permissions, expires_at=expires_at
        )


@functools.lru_cache(maxsize=1024)
def _identity(pem: bytes) -> tuple[list[Name], float]:
    """The names of a certificate by their kind, its SPIFFE id first, and when it expires.

    Read from the certificate: what gRPC tells of it is cut off at a NUL, where another name can
    begin. Nothing, when there is none.
    """
    if not pem:
        return [], 0
    certificate = x509.load_pem_x509_certificate(pem)
    try:
        named = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return [], 0
    uris = named.get_values_for_type(URI)
    # The SPIFFE X.509-SVID standard: exactly one URI.
    names: list[Name] = [(URI, uri) for uri in uris if len(uris) == 1]
    names += [(DNS, name.lower()) for name in named.get_values_for_type(DNS)]
    return names, certificate.not_valid_after_utc.timestamp()
