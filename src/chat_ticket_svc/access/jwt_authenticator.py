"""Callers that prove themselves by a JSON Web Token, signed with a key that we are told of.

The claims are `iss`, `aud` and `exp` of RFC 7519, `scope` of RFC 8693 (our permissions, by
spaces; others are ignored), and `tenants`: a list of tenant ids, or "*" for all.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import grpc.aio
import httpx
import jwt
import structlog

from chat_ticket_svc.access.credential import (
    Credential,
    Metadata,
    Permission,
    expired,
    tenants_of,
    values,
)
from chat_ticket_svc.config import ConfigurationError
from chat_ticket_svc.errors import UnauthenticatedError, UnavailableError

log = structlog.get_logger()

Context = grpc.aio.ServicerContext[Any, Any]

# A key that was withdrawn is forgotten after this time.
REFRESH_SECONDS = 60
# Whoever invents key ids makes us ask for the keys no more often than this.
COOLDOWN_SECONDS = 10
FETCH_TIMEOUT_SECONDS = 3
MAX_KEY_SET_BYTES = 1024 * 1024
MAX_KEYS = 100
# How many tokens that were found valid are remembered: checking a signature costs a tenth of a
# millisecond, and a caller comes with the same token again and again.
MAX_TOKENS = 1000


class JwksClient:
    """The public keys of a JSON Web Key Set (RFC 7517) at a URL or in a file, by key id.

    It is read again from time to time, and when a token names a key that is not in it. While it
    cannot be read, the keys that were read last stay.
    """

    def __init__(self, location: str):
        self._location = location
        self._keys: dict[str, jwt.PyJWK] | None = None
        self._reading: asyncio.Task[None] | None = None
        self._asked_at = -math.inf
        self._refreshing: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Read the keys. ConfigurationError for a file that has none.

        A server of keys that does not answer is only logged: it is asked again.
        """
        self._asked_at = asyncio.get_running_loop().time()
        try:
            self._keys = await self._fetch()
        except Exception as error:
            if not self._is_url:
                raise _unreadable("file", error) from error
            self._failed(error)
        self._refreshing = asyncio.create_task(self._refresh())

    async def ids(self) -> list[str]:
        """Those of the keys that there are now. ConfigurationError when none are to be had."""
        try:
            return sorted(await self._fetch())
        except Exception as error:
            raise _unreadable("URL" if self._is_url else "file", error) from error

    async def close(self) -> None:
        tasks = [task for task in (self._refreshing, self._reading) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def get(self, key_id: str) -> jwt.PyJWK | None:
        """The key of this id. UnavailableError when the keys have never been read."""
        if self._keys is None or key_id not in self._keys:
            await self._read_soon()
        if self._keys is None:
            raise UnavailableError(
                "the keys that tokens are checked with are out of reach", reason="KEYS_UNAVAILABLE"
            )
        return self._keys.get(key_id)

    @property
    def _is_url(self) -> bool:
        return urlsplit(self._location).scheme in ("https", "http")

    async def _refresh(self) -> None:
        while True:
            await asyncio.sleep(REFRESH_SECONDS)
            await self._read_soon()

    async def _read_soon(self) -> None:
        """Read once for everybody who waits, unless that was done a moment ago."""
        now = asyncio.get_running_loop().time()
        idle = self._reading is None or self._reading.done()
        if idle and now - self._asked_at >= COOLDOWN_SECONDS:
            self._asked_at = now
            self._reading = asyncio.create_task(self._read())
        if self._reading is not None:
            await asyncio.shield(self._reading)

    async def _read(self) -> None:
        try:
            self._keys = await self._fetch()
        except Exception as error:  # whatever it is, the keys of before are the best there is
            self._failed(error)

    def _failed(self, error: Exception) -> None:
        log.warning("could not read the keys of tokens", error=type(error).__qualname__)

    async def _fetch(self) -> dict[str, jwt.PyJWK]:
        if self._is_url:
            async with asyncio.timeout(FETCH_TIMEOUT_SECONDS):
                data = await self._download()
        else:
            data = await asyncio.to_thread(Path(self._location).read_bytes)
        return await asyncio.to_thread(_parsed, data)

    async def _download(self) -> bytes:
        data = bytearray()
        # A proxy of the environment sees through http, and could answer with keys of its own.
        is_https = urlsplit(self._location).scheme == "https"
        async with (
            httpx.AsyncClient(timeout=FETCH_TIMEOUT_SECONDS, trust_env=is_https) as client,
            client.stream("GET", self._location) as response,
        ):
            response.raise_for_status()
            async for chunk in response.aiter_bytes():
                data += chunk
                if len(data) > MAX_KEY_SET_BYTES:
                    raise ValueError("too large for a set of keys")
        return bytes(data)


def _unreadable(what: str, error: Exception) -> ConfigurationError:
    return ConfigurationError(
        f"CHAT_TICKET_JWKS: names no readable {what} with a JSON Web Key Set, in which"
        f" a key has a kid ({type(error).__qualname__})"
    )


def _parsed(data: bytes) -> dict[str, jwt.PyJWK]:
    """The keys of a key set that can be used; ValueError when there is none."""
    found = {}
    for entry in json.loads(data)["keys"][:MAX_KEYS]:
        # A private key has no place in a key set, and takes seconds to look at.
        if not isinstance(entry, dict) or "d" in entry or entry.get("use", "sig") != "sig":
            continue
        if isinstance(key_id := entry.get("kid"), str):
            with contextlib.suppress(jwt.PyJWTError, TypeError, ValueError):
                found[key_id] = jwt.PyJWK(entry)
    if not found:
        raise ValueError("no key with an id")
    return found


class JwtAuthenticator:
    """Turns the bearer token of a call into a credential."""

    def __init__(self, keys: JwksClient, *, issuer: str, audience: str, algorithms: Sequence[str]):
        self._keys = keys
        self._issuer = issuer
        self._audience = audience
        self._algorithms = algorithms
        # With the key that each was signed by: it has to be among the keys still.
        self._valid: dict[str, tuple[str, jwt.PyJWK, Credential]] = {}

    async def authenticate(self, _context: Context, metadata: Metadata) -> Credential:
        given = values(metadata, "authorization")
        if not given:
            raise UnauthenticatedError(
                "the metadata key authorization is missing", reason="CREDENTIAL_REQUIRED"
            )
        scheme, _, token = str(given[0]).partition(" ")
        if len(given) > 1 or scheme.lower() != "bearer":
            raise UnauthenticatedError(
                "the metadata key authorization is not one bearer token",
                reason="CREDENTIAL_INVALID",
            )
        try:
            return await self._verified(token.strip())
        except UnavailableError:
            raise
        except jwt.ExpiredSignatureError as error:
            raise expired() from error
        except Exception as error:  # whatever a forged token makes the parsers raise
            log.debug("token refused", error=type(error).__qualname__)
            raise UnauthenticatedError(
                "the token is not valid here", reason="CREDENTIAL_INVALID"
            ) from error

    async def _verified(self, token: str) -> Credential:
        if (known := self._valid.get(token)) is not None:
            key_id, key, credential = known
            if await self._keys.get(key_id) is key:
                if credential.expires_at <= time.time():
                    raise jwt.ExpiredSignatureError
                return credential
            self._valid.pop(token, None)
        key_id = jwt.get_unverified_header(token)["kid"]
        found = await self._keys.get(key_id)
        if found is None:
            raise jwt.InvalidKeyError
        credential = self._read(token, found)
        if len(self._valid) >= MAX_TOKENS:
            del self._valid[next(iter(self._valid))]
        self._valid[token] = key_id, found, credential
        return credential

    def _read(self, token: str, key: jwt.PyJWK) -> Credential:
        claims = jwt.decode(
            token,
            key,
            algorithms=self._algorithms,
            issuer=self._issuer,
            audience=self._audience,
            options={
                "require": ["exp", "iss", "aud"],
                # Says when a token was made, and nothing about whether it is valid.
                "verify_iat": False,
                "enforce_minimum_key_length": True,
            },
        )
        granted = claims.get("scope", "").split()
        return Credential(
            tenants=tenants_of(claims["tenants"]),
            permissions=frozenset(each for each in Permission if each in granted),
            expires_at=float(claims["exp"]),
        )
