"""The JSON web key set, fetched from a URL or read from a file."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import jwt
import pytest
import pytest_asyncio
from grpc import StatusCode
from support.authority import Key, KeyServer, key_set
from support.client import refused
from support.jwt_server import KEY, JwtServer
from support.sessions import list_sessions

from chat_ticket.v1.chat_session_pb2 import ListChatSessionsRequest
from chat_ticket_svc.access import jwks
from chat_ticket_svc.config import ConfigurationError


class TestKeys:
    """The key set at a URL or in a file. The intervals are shortened."""

    @pytest.fixture(autouse=True)
    def _short_intervals(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(jwks, "COOLDOWN_SECONDS", 0.1)
        monkeypatch.setattr(jwks, "REFRESH_SECONDS", 0.5)
        monkeypatch.setattr(jwks, "FETCH_TIMEOUT_SECONDS", 2)

    @pytest_asyncio.fixture
    async def keys(self) -> AsyncIterator[KeyServer]:
        async with KeyServer(KEY).running() as keys:
            yield keys

    async def accepts(self, server: JwtServer, key: Key) -> bool:
        try:
            await list_sessions(await server.api(key.token(), "acme"))
        except grpc.aio.AioRpcError as error:
            assert error.code() is StatusCode.UNAUTHENTICATED
            return False
        return True

    async def until(self, server: JwtServer, key: Key, accepted: bool) -> None:
        async with asyncio.timeout(10):
            while await self.accepts(server, key) is not accepted:
                await asyncio.sleep(0.05)

    async def test_keys_rotate_at_a_url(self, start_jwt_server: Any, keys: KeyServer) -> None:
        """A new key is fetched when a token names it. A withdrawn key expires."""
        server = await start_jwt_server(jwks=keys.url)
        assert await self.accepts(server, KEY)
        new = Key("new")
        keys.body = key_set(KEY, new)
        await asyncio.sleep(0.3)
        assert await self.accepts(server, new), "by the first call that needs it"
        assert await self.accepts(server, KEY)
        keys.body = key_set(new)
        await self.until(server, KEY, False)
        assert await self.accepts(server, new)

    async def test_cached_token_depends_on_its_key(
        self, start_jwt_server: Any, keys: KeyServer
    ) -> None:
        """It is rejected once its key is withdrawn, or replaced under the same id."""
        server = await start_jwt_server(jwks=keys.url)
        token = KEY.token()
        api = await server.api(token, "acme")
        await list_sessions(api)
        keys.body = key_set(Key(KEY.key_id))
        async with asyncio.timeout(10):
            with contextlib.suppress(grpc.aio.AioRpcError):
                while await list_sessions(api) is not None:
                    await asyncio.sleep(0.05)
        with refused(StatusCode.UNAUTHENTICATED, "CREDENTIAL_INVALID"):
            await list_sessions(api)

    async def test_keys_rotate_in_a_file(self, start_jwt_server: Any, tmp_path: Path) -> None:
        """In the same way as at a URL."""
        path = tmp_path / "keys.json"
        path.write_bytes(key_set(KEY))
        server = await start_jwt_server(jwks=str(path))
        new = Key("new")
        path.write_bytes(key_set(new))
        await asyncio.sleep(0.3)
        assert await self.accepts(server, new)
        assert not await self.accepts(server, KEY)

    async def test_unknown_key_ids_do_not_hammer_the_key_server(
        self, start_jwt_server: Any, keys: KeyServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Any number of tokens with unknown key ids cause a single fetch."""
        monkeypatch.setattr(jwks, "COOLDOWN_SECONDS", 30)
        monkeypatch.setattr(jwks, "REFRESH_SECONDS", 30)
        server = await start_jwt_server(jwks=keys.url)
        assert keys.requests == 1
        api = await server.api("", "acme")
        call = api.channel.unary_unary("/chat_ticket.v1.ChatSessionService/ListChatSessions")

        async def forged(number: int) -> None:
            token = jwt.encode(Key.claims(), KEY.private, "ES256", headers={"kid": str(number)})
            with refused(StatusCode.UNAUTHENTICATED, "CREDENTIAL_INVALID"):
                await call(b"", metadata=[("authorization", f"Bearer {token}")])

        await asyncio.gather(*(forged(number) for number in range(200)))
        assert keys.requests == 1
        monkeypatch.setattr(jwks, "COOLDOWN_SECONDS", 0)
        keys.answering.clear()
        waiting = asyncio.gather(*(forged(number) for number in range(50)))
        async with asyncio.timeout(10):
            while keys.requests < 2:
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)
        assert keys.requests == 2, "one for all who wait"
        monkeypatch.setattr(jwks, "COOLDOWN_SECONDS", 30)
        keys.answering.set()
        await waiting
        assert keys.requests == 2

    async def test_proxy_is_not_used_over_http(
        self, start_jwt_server: Any, keys: KeyServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Without TLS a proxy could replace the keys with its own."""
        forger = Key()
        async with KeyServer(forger).running() as proxy:
            for name in ("HTTP_PROXY", "ALL_PROXY"):  # gRPC's own clients read the lower case
                monkeypatch.setenv(name, proxy.url)
            for name in ("NO_PROXY", "no_proxy"):
                monkeypatch.delenv(name, raising=False)
            server = await start_jwt_server(jwks=keys.url)
            assert await self.accepts(server, KEY)
            assert not await self.accepts(server, forger)
            assert not proxy.requests

    async def test_slow_key_server_does_not_delay_cached_keys(
        self, start_jwt_server: Any, keys: KeyServer
    ) -> None:
        """Fetches run in the background. Calls that need one wait for a bounded time."""
        server = await start_jwt_server(jwks=keys.url)
        keys.answering.clear()
        await asyncio.sleep(0.3)
        unknown = asyncio.create_task(self.accepts(server, Key("unknown")))
        for _ in range(20):
            assert await self.accepts(server, KEY)
        assert not unknown.done()
        async with asyncio.timeout(10):
            assert not await unknown

    async def test_cancelled_caller_does_not_cancel_the_fetch(
        self, start_jwt_server: Any, keys: KeyServer
    ) -> None:
        """Other callers that wait for the same fetch get their key."""
        server = await start_jwt_server(jwks=keys.url)
        new = Key("new")
        keys.body = key_set(KEY, new)
        await asyncio.sleep(0.2)
        keys.answering.clear()
        asked = keys.requests
        leaving, staying = [await server.api(new.token(), "acme") for _ in range(2)]
        leaves = leaving.sessions.ListChatSessions(ListChatSessionsRequest())
        stays = asyncio.create_task(list_sessions(staying))
        while keys.requests == asked:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)
        leaves.cancel()
        await asyncio.sleep(0.2)
        assert not stays.done()
        keys.answering.set()
        await stays

    async def test_last_keys_stay_when_a_fetch_fails(
        self, start_jwt_server: Any, keys: KeyServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Whatever the server answers. The fetch is repeated."""
        server = await start_jwt_server(jwks=keys.url)
        monkeypatch.setattr(jwks, "REFRESH_SECONDS", 0.1)
        monkeypatch.setattr(jwks, "COOLDOWN_SECONDS", 0)
        good_head = keys.head
        other = key_set(Key("other"))
        broken = [
            (good_head, b"{"),
            (good_head, b'{"keys": []}'),
            (good_head, b"[]"),
            (good_head, b'{"keys": [{"kty": "EC", "kid": "one"}]}'),
            (b"HTTP/1.1 500 No\r\nConnection: close\r\n", other),
            (f"HTTP/1.1 302 F\r\nLocation: {keys.url}/elsewhere\r\n".encode(), other),
            (good_head, other.ljust(1024 * 1024 + 1)),
        ]
        for keys.head, keys.body in broken:
            asked = keys.requests
            async with asyncio.timeout(10):
                while keys.requests < asked + 2:
                    await asyncio.sleep(0.05)
            assert await self.accepts(server, KEY), keys.body[:50]
        new = Key("new")
        keys.head, keys.body = good_head, key_set(new)
        await self.until(server, new, True)

    async def test_key_server_that_is_down_at_start(
        self, start_jwt_server: Any, keys: KeyServer
    ) -> None:
        """Calls fail with UNAVAILABLE until the keys are fetched."""
        good_body, keys.body = keys.body, b"not yet"
        server = await start_jwt_server(jwks=keys.url)
        with refused(StatusCode.UNAVAILABLE, "KEYS_UNAVAILABLE") as refusal:
            await list_sessions(await server.api(KEY.token(), "acme"))
        assert "RetryInfo" in refusal.details
        keys.body = good_body
        async with asyncio.timeout(10):
            while True:
                with contextlib.suppress(grpc.aio.AioRpcError):
                    await list_sessions(await server.api(KEY.token(), "acme"))
                    break
                await asyncio.sleep(0.05)

    @pytest.mark.parametrize("content", [None, "", "{}", '{"keys": []}', '{"keys": [{}]}'])
    async def test_file_without_keys_is_a_configuration_error(
        self, start_jwt_server: Any, tmp_path: Path, content: str | None
    ) -> None:
        """The server does not start."""
        path = tmp_path / "keys.json"
        if content is not None:
            path.write_text(content)
        with pytest.raises(ConfigurationError, match="CHAT_TICKET_JWKS"):
            await start_jwt_server(jwks=str(path))
