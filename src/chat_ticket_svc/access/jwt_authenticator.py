"""Authentication by JSON Web Token, signed with a key of the configured key set.

Required claims are `iss`, `aud` and `exp` (RFC 7519), and `tenants`: a list of tenant ids, or "*"
for all. `scope` (RFC 8693) lists the permissions, separated by spaces; unknown ones are ignored.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import jwt
import structlog

from chat_ticket_svc.access.authenticator import Context
from chat_ticket_svc.access.credential import (
    Credential,
    Metadata,
    Permission,
    credential_expired,
    metadata_values,
    parse_tenants,
)
from chat_ticket_svc.access.jwks import JwksClient
from chat_ticket_svc.errors import UnauthenticatedError, UnavailableError

log = structlog.get_logger()

# Callers send the same token with many calls, and verifying a signature takes a tenth of a
# millisecond, so verified tokens are cached.
MAX_CACHED_TOKENS = 1000


class JwtAuthenticator:
    """Turns the bearer token of a call into a credential."""

    def __init__(self, keys: JwksClient, *, issuer: str, audience: str, algorithms: Sequence[str]):
        self._keys = keys
        self._issuer = issuer
        self._audience = audience
        self._algorithms = algorithms
        # With the key that verified each token, which must still be in the key set at its next use.
        self._verified: dict[str, tuple[str, jwt.PyJWK, Credential]] = {}

    async def authenticate(self, _context: Context, metadata: Metadata) -> Credential:
        headers = metadata_values(metadata, "authorization")
        if not headers:
            raise UnauthenticatedError(
                "metadata key authorization is missing", reason="CREDENTIAL_REQUIRED"
            )
        scheme, _, token = str(headers[0]).partition(" ")
        if len(headers) > 1 or scheme.lower() != "bearer":
            raise UnauthenticatedError(
                "metadata key authorization must hold exactly one bearer token",
                reason="CREDENTIAL_INVALID",
            )
        try:
            return await self._verify(token.strip())
        except UnavailableError:
            raise
        except jwt.ExpiredSignatureError as error:
            raise credential_expired() from error
        except Exception as error:  # a forged token can make the parsers raise anything
            log.debug("token rejected", error=type(error).__qualname__)
            raise UnauthenticatedError("token is not valid", reason="CREDENTIAL_INVALID") from error

    async def _verify(self, token: str) -> Credential:
        if (cached := self._verified.get(token)) is not None:
            key_id, key, credential = cached
            if await self._keys.get_key(key_id) is key:
                if credential.expires_at <= time.time():
                    raise jwt.ExpiredSignatureError
                return credential
            self._verified.pop(token, None)
        key_id = jwt.get_unverified_header(token)["kid"]
        current_key = await self._keys.get_key(key_id)
        if current_key is None:
            raise jwt.InvalidKeyError
        credential = self._decode(token, current_key)
        if len(self._verified) >= MAX_CACHED_TOKENS:
            del self._verified[next(iter(self._verified))]
        self._verified[token] = key_id, current_key, credential
        return credential

    def _decode(self, token: str, key: jwt.PyJWK) -> Credential:
        claims = jwt.decode(
            token,
            key,
            algorithms=self._algorithms,
            issuer=self._issuer,
            audience=self._audience,
            options={
                "require": ["exp", "iss", "aud"],
                # The time of issue says nothing about validity.
                "verify_iat": False,
                "enforce_minimum_key_length": True,
            },
        )
        scopes = claims.get("scope", "").split()
        return Credential(
            tenants=parse_tenants(claims["tenants"]),
            permissions=frozenset(permission for permission in Permission if permission in scopes),
            expires_at=float(claims["exp"]),
        )
