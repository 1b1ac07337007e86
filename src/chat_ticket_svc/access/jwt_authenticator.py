"""Authentication by JSON Web Token, signed with a key of the configured key set.

Required claims are `iss`, `aud` and `exp` (RFC 7519), and the tenants: a list of tenant ids, or "*"
for all. The permissions are a text separated by spaces (as `scope` of RFC 8693) or a list; unknown
ones are ignored. Settings name the claims that hold them.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, Self

import jwt
from jwt.exceptions import InvalidSubjectError
from jwt.types import Options

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
from chat_ticket_svc.config import Settings
from chat_ticket_svc.errors import UnauthenticatedError, UnavailableError
from chat_ticket_svc.telemetry.redaction import quote

# Callers send the same token with many calls, and verifying a signature takes a tenth of a
# millisecond, so verified tokens are cached.
MAX_CACHED_TOKENS = 1000

NO_CLAIM_CHECKS: Options = {
    "verify_exp": False,
    "verify_nbf": False,
    "verify_iat": False,
    "verify_aud": False,
    "verify_iss": False,
    "verify_sub": False,
    "verify_jti": False,
}


class TokenRejectedError(Exception):
    """A token that is not valid, and why, for operators. Callers must not learn it.

    `part` is a claim, a parameter of the header, `signature` or `token`. `found` is what is there:
    of what nobody has signed, only the key id and the algorithm.
    """

    def __init__(self, part: str, *, expected: str, found: str, key_id: str | None = None):
        super().__init__(part)
        self.part = part
        self.expected = expected
        self.found = found
        self.key_id = key_id

    def __str__(self) -> str:
        key = "" if self.key_id is None else f", in a token of key {quote(self.key_id)}"
        return f"{self.part}: expected {self.expected}, found {self.found}{key}"

    @property
    def diagnosis(self) -> dict[str, str]:
        """The fields of a log line."""
        fields = {"part": self.part, "expected": self.expected, "found": self.found}
        return fields if self.key_id is None else {**fields, "key_id": quote(self.key_id)}


class JwtAuthenticator:
    """Turns the bearer token of a call into a credential."""

    @classmethod
    def from_settings(cls, keys: JwksClient, settings: Settings) -> Self:
        return cls(
            keys,
            issuer=settings.jwt_issuer,
            audience=settings.jwt_audience,
            algorithms=settings.jwt_algorithms,
            tenants_claim=settings.jwt_tenants_claim,
            permissions_claim=settings.jwt_permissions_claim,
            subject_claim=settings.jwt_subject_claim,
        )

    def __init__(
        self,
        keys: JwksClient,
        *,
        issuer: str,
        audience: str,
        algorithms: Sequence[str],
        tenants_claim: str,
        permissions_claim: str,
        subject_claim: str,
    ):
        self._keys = keys
        self._issuer = issuer
        self._audience = audience
        self._algorithms = algorithms
        self._tenants_claim = tenants_claim
        self._permissions_claim = permissions_claim
        self._subject_claim = subject_claim
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
            return await self.verify(token.strip())
        except TokenRejectedError as error:
            if error.part == "exp" and isinstance(error.__cause__, jwt.ExpiredSignatureError):
                raise credential_expired(error.diagnosis) from error
            raise UnauthenticatedError(
                "token is not valid", reason="CREDENTIAL_INVALID", diagnosis=error.diagnosis
            ) from error

    async def verify(self, token: str) -> Credential:
        """The credential of a token. Raises TokenRejectedError, and UnavailableError without keys.

        A verified token is cached, but not for longer than its key is in the key set.
        """
        if (cached := self._verified.get(token)) is not None:
            key_id, key, credential = cached
            if await self._keys.get_key(key_id) is key:
                if credential.expires_at <= time.time():
                    raise _expired(credential.expires_at, key_id) from jwt.ExpiredSignatureError()
                return credential
            self._verified.pop(token, None)
        try:
            key_id, current_key, credential = await self._verify(token)
        except (TokenRejectedError, UnavailableError):
            raise
        except Exception as error:  # a forged token can make the parsers raise anything
            raise TokenRejectedError(
                "token", expected="a signed JSON Web Token", found=type(error).__qualname__
            ) from error
        if len(self._verified) >= MAX_CACHED_TOKENS:
            del self._verified[next(iter(self._verified))]
        self._verified[token] = key_id, current_key, credential
        return credential

    async def _verify(self, token: str) -> tuple[str, jwt.PyJWK, Credential]:
        key_id = jwt.get_unverified_header(token).get("kid")
        if key_id is None:
            raise TokenRejectedError("kid", expected="the id of a key", found="nothing")
        key = await self._keys.get_key(key_id)
        if key is None:
            raise TokenRejectedError(
                "kid", expected="the id of a key in the key set", found=quote(key_id)
            )
        try:
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
            return key_id, key, self._credential(claims, key_id)
        except Exception as error:
            if isinstance(error, TokenRejectedError):
                raise
            raise self._rejection(token, key, key_id, error) from error

    def _credential(self, claims: Mapping[str, Any], key_id: str) -> Credential:
        name = self._tenants_claim
        try:
            tenants = parse_tenants(claims.get(name))
        except ValueError as error:
            raise TokenRejectedError(
                name,
                expected='a list of tenant ids, or "*"',
                found=_kind(claims, name),
                key_id=key_id,
            ) from error
        name = self._permissions_claim
        permissions = claims.get(name, "")
        if isinstance(permissions, str):
            permissions = permissions.split()
        if not isinstance(permissions, list) or not all(isinstance(p, str) for p in permissions):
            raise TokenRejectedError(
                name,
                expected="permissions: a list, or a text separated by spaces",
                found=_kind(claims, name),
                key_id=key_id,
            )
        subject = claims.get(self._subject_claim)
        return Credential(
            tenants=tenants,
            permissions=frozenset(
                permission for permission in Permission if permission in permissions
            ),
            expires_at=float(claims["exp"]),
            subject=quote(subject) if isinstance(subject, str) and subject else None,
        )

    def _rejection(
        self, token: str, key: jwt.PyJWK, key_id: str, error: Exception
    ) -> TokenRejectedError:
        """The reason why PyJWT has rejected a token, with what was expected and found."""

        def rejected(part: str, expected: str, found: str) -> TokenRejectedError:
            return TokenRejectedError(part, expected=expected, found=found, key_id=key_id)

        match error:
            case jwt.InvalidSignatureError():
                return rejected("signature", "one by this key", "another")
            case jwt.InvalidAlgorithmError():
                expected = f"one of {', '.join(self._algorithms)}, and the key's"
                return rejected("alg", expected, quote(jwt.get_unverified_header(token).get("alg")))
            case jwt.InvalidKeyError():
                return rejected("kid", "a key that is long enough", "a shorter one")
        # Only what the issuer has signed is quoted, so the signature is verified again.
        try:
            claims = jwt.decode(token, key, algorithms=self._algorithms, options=NO_CLAIM_CHECKS)
        except Exception:
            return rejected("token", "a signed JSON Web Token", type(error).__qualname__)
        match error:
            case jwt.ExpiredSignatureError():
                return _expired(claims["exp"], key_id)
            case jwt.MissingRequiredClaimError() if error.claim == "exp":
                return rejected("exp", "the time of expiry", "nothing")
            case jwt.ImmatureSignatureError():
                return rejected(
                    "nbf", f"at most {int(time.time())}, the time now", quote(claims["nbf"])
                )
            case jwt.InvalidIssuerError() | jwt.MissingRequiredClaimError(claim="iss"):
                return rejected("iss", quote(self._issuer), quote(claims.get("iss")))
            case jwt.InvalidAudienceError() | jwt.MissingRequiredClaimError(claim="aud"):
                return rejected("aud", quote(self._audience), quote(claims.get("aud")))
            case InvalidSubjectError():
                return rejected("sub", "a text", _kind(claims, "sub"))
        for name in ("exp", "nbf"):
            try:
                int(claims.get(name, 0))
            except (ValueError, TypeError, OverflowError):
                return rejected(name, "a number of seconds", quote(claims[name]))
        return rejected("token", "valid claims", type(error).__qualname__)


def _expired(expires_at: float, key_id: str) -> TokenRejectedError:
    return TokenRejectedError(
        "exp",
        expected=f"later than {int(time.time())}, the time now",
        found=quote(expires_at),
        key_id=key_id,
    )


def _kind(claims: Mapping[str, Any], name: str) -> str:
    """What a claim holds, without its value, which may be anything."""
    if name not in claims:
        return "nothing"
    match claims[name]:
        case str():
            return "a text"
        case []:
            return "an empty list"
        case list():
            return "a list with something else"
        case _:
            return "something else"
