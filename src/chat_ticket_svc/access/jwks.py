"""A client of a JSON Web Key Set (RFC 7517): the public keys that verify tokens."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import jwt
import structlog

from chat_ticket_svc.config import ConfigurationError
from chat_ticket_svc.errors import UnavailableError
from chat_ticket_svc.tasks import cancel_and_wait

log = structlog.get_logger()

# A key that was withdrawn is accepted for at most this long.
REFRESH_SECONDS = 60
# Tokens with invented key ids cannot cause more than one fetch in this time.
COOLDOWN_SECONDS = 10
FETCH_TIMEOUT_SECONDS = 3
MAX_KEY_SET_BYTES = 1024 * 1024
MAX_KEYS = 100


class JwksClient:
    """The public keys of a key set at a URL or in a file, by key id.

    The key set is fetched again at intervals, and when a token names an unknown key. If a fetch
    fails, the last keys stay in effect.
    """

    def __init__(self, location: str):
        self._location = location
        self._keys: dict[str, jwt.PyJWK] | None = None
        self._last_fetch_at = -math.inf
        self._fetch_task: asyncio.Task[None] | None = None
        self._refresh_task: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Fetch the keys. Raises ConfigurationError for a file without keys.

        A failure to fetch from a URL is only logged, because the fetch is repeated.
        """
        self._last_fetch_at = asyncio.get_running_loop().time()
        try:
            self._keys = await self._fetch()
        except Exception as error:
            if not self._is_url:
                raise _configuration_error("file", error) from error
            self._log_failure(error)
        self._refresh_task = asyncio.create_task(self._refresh_periodically())

    async def close(self) -> None:
        await cancel_and_wait(self._refresh_task, self._fetch_task)

    async def fetch_key_ids(self) -> list[str]:
        """Fetch the keys and return their ids. Raises ConfigurationError if that fails."""
        try:
            return sorted(await self._fetch())
        except Exception as error:
            raise _configuration_error("URL" if self._is_url else "file", error) from error

    async def get_key(self, key_id: str) -> jwt.PyJWK | None:
        """The key with this id, if any. Raises UnavailableError until a fetch has succeeded."""
        if self._keys is None or key_id not in self._keys:
            await self._refresh()
        if self._keys is None:
            raise UnavailableError(
                "keys that verify tokens are not available", reason="KEYS_UNAVAILABLE"
            )
        return self._keys.get(key_id)

    @property
    def _is_url(self) -> bool:
        return urlsplit(self._location).scheme in ("https", "http")

    async def _refresh_periodically(self) -> None:
        while True:
            await asyncio.sleep(REFRESH_SECONDS)
            await self._refresh()

    async def _refresh(self) -> None:
        """Fetch the keys, once for all concurrent callers. Does nothing during the cooldown."""
        now = asyncio.get_running_loop().time()
        is_idle = self._fetch_task is None or self._fetch_task.done()
        if is_idle and now - self._last_fetch_at >= COOLDOWN_SECONDS:
            self._last_fetch_at = now
            self._fetch_task = asyncio.create_task(self._replace_keys())
        if self._fetch_task is not None:
            # Shielded, because other callers may wait for the same fetch.
            await asyncio.shield(self._fetch_task)

    async def _replace_keys(self) -> None:
        try:
            self._keys = await self._fetch()
        except Exception as error:  # after any error the last keys stay in effect
            self._log_failure(error)

    def _log_failure(self, error: Exception) -> None:
        log.warning("could not fetch the key set", error=type(error).__qualname__)

    async def _fetch(self) -> dict[str, jwt.PyJWK]:
        if self._is_url:
            async with asyncio.timeout(FETCH_TIMEOUT_SECONDS):
                data = await self._download()
        else:
            data = await asyncio.to_thread(Path(self._location).read_bytes)
        return await asyncio.to_thread(_parse_key_set, data)

    async def _download(self) -> bytes:
        data = bytearray()
        # Over http, a proxy from the environment could replace the keys with its own.
        is_https = urlsplit(self._location).scheme == "https"
        async with (
            httpx.AsyncClient(timeout=FETCH_TIMEOUT_SECONDS, trust_env=is_https) as client,
            client.stream("GET", self._location) as response,
        ):
            response.raise_for_status()
            async for chunk in response.aiter_bytes():
                data += chunk
                if len(data) > MAX_KEY_SET_BYTES:
                    raise ValueError("key set is too large")
        return bytes(data)


def _configuration_error(kind: str, error: Exception) -> ConfigurationError:
    return ConfigurationError(
        f"CHAT_TICKET_JWKS: must be a readable {kind} that contains a JSON Web Key Set with at"
        f" least one key that has a kid ({type(error).__qualname__})"
    )


def _parse_key_set(data: bytes) -> dict[str, jwt.PyJWK]:
    """The usable keys of a key set. Raises ValueError if there is none."""
    keys = {}
    for entry in json.loads(data)["keys"][:MAX_KEYS]:
        # A private key ("d") does not belong in a key set, and takes seconds to load.
        if not isinstance(entry, dict) or "d" in entry or entry.get("use", "sig") != "sig":
            continue
        if isinstance(key_id := entry.get("kid"), str):
            with contextlib.suppress(jwt.PyJWTError, TypeError, ValueError):
                keys[key_id] = jwt.PyJWK(entry)
    if not keys:
        raise ValueError("key set has no usable key")
    return keys
