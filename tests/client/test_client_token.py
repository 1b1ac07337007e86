"""The token of the Python client, which it sends and renews."""

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
from support.authority import Authority, Key
from support.client import an_id
from support.client_calls import (
    NewClient,
    contents_of,
    create_message,
    create_session_id,
    event_kind,
    watch_all,
)
from support.server import serving

from chat_ticket import errors
from chat_ticket.client import AsyncChatTicketClient
from chat_ticket.v1.chat_session_pb2 import (
    GetChatSessionRequest,
)
from chat_ticket_svc.server import Server

KEY = Key()


@pytest_asyncio.fixture
async def guarded(database: str, tmp_path: Path) -> AsyncIterator[Server]:
    """A server that asks for tokens of KEY."""
    settings = {"auth": "jwt", **KEY.trusted(tmp_path)}
    async with serving(database, watch_heartbeat_seconds=0.2, **settings) as server:
        yield server


class TestToken:
    async def test_token_is_a_string_or_a_callable_called_for_each_request(
        self,
        guarded: Server,
        connect: NewClient,
        client_class: type[AsyncChatTicketClient],
        tenant: str,
    ) -> None:
        """Of a function, or of a coroutine function where there is an event loop."""
        asked = 0

        def fresh() -> str:
            nonlocal asked
            asked += 1
            return KEY.token(tenants=[tenant])

        async def waited() -> str:
            await asyncio.sleep(0)
            return fresh()

        tokens: list[Any] = [KEY.token(tenants=[tenant]), fresh]
        if client_class is AsyncChatTicketClient:
            tokens.append(waited)
        for token in tokens:
            client = connect(guarded.port, token=token, tenant=None)
            await create_message(client, await create_session_id(client))
        assert asked == 2 * (len(tokens) - 1)

    async def test_token_is_sent_with_channel_credentials(
        self, database: str, tmp_path: Path, connect: NewClient, tenant: str
    ) -> None:
        """Over TLS, to a server of the authority that they trust."""
        authority = Authority()
        certificate = authority.server().write(tmp_path / "tls")
        settings = {"auth": "jwt", **KEY.trusted(tmp_path), **certificate}
        async with serving(database, **settings) as server:
            token, trust = KEY.token(tenants=[tenant]), authority.trusted_by()
            client = connect(server.port, token=token, credentials=trust)
            await create_message(client, await create_session_id(client))
            other_tenant = connect(server.port, token=token, credentials=Authority().trusted_by())
            with pytest.raises(errors.UnavailableError):
                await create_session_id(other_tenant)

    async def test_call_raises_the_error_of_the_token_callable(
        self, guarded: Server, connect: NewClient
    ) -> None:
        """Nothing is sent without it."""

        def broken() -> str:
            raise LookupError("no token")

        with pytest.raises(LookupError):
            await create_session_id(connect(guarded.port, token=broken))

    async def test_is_not_sent_in_plain_text_to_other_machines(
        self, client_class: type[AsyncChatTicketClient]
    ) -> None:
        """Not by any spelling of a target, of which one address elsewhere is enough."""
        for target in (
            "chat.example:443",
            "dns:///chat.example:443",
            "dns://127.0.0.1/chat.example",
            "dns://8.8.8.8/localhost",  # an answer of another DNS server
            "10.0.0.1:50051",
            "ipv4:127.0.0.1:1,10.0.0.1:1",
            "localhost.example:50051",
            "[::2]:50051",
            "xds:///localhost",
        ):
            with pytest.raises(ValueError, match="plain text"):
                client_class(target, token="secret")
        for target in (
            "localhost:50051",
            "dns:///localhost:50051",
            "127.0.0.1:50051",
            "ipv4:127.0.0.1:1,127.0.0.2:1",
            "[::1]:50051",
            "ipv6:[::1]:50051",
            "unix:/run/chat.sock",
        ):
            await client_class(target, token="secret").close()
        secure = grpc.ssl_channel_credentials()
        await client_class("chat.example:443", token="secret", credentials=secure).close()

    async def test_must_be_one_that_grpc_sends(
        self, client_class: type[AsyncChatTicketClient]
    ) -> None:
        """An invalid token raises an error at once or in the call. It is not shown or retried.

        A file often has a line break at its end.
        """
        for bad in ({"token": "secret\n"}, {"tenant": "secret\n"}, {"tenant": "café"}):
            with pytest.raises(ValueError, match="not printable ASCII") as caught:
                client_class("localhost:1", **bad)  # type: ignore[arg-type]
            assert "secret" not in str(caught.value)
        async with client_class("localhost:1", token=lambda: "secret\n") as client:
            with pytest.raises(ValueError, match="token: not printable ASCII"):
                await client.sessions.GetChatSession(GetChatSessionRequest())
            with pytest.raises(ValueError, match="token: not printable ASCII"):
                await anext(client.watch(an_id()))

    async def test_watch_gets_a_new_token_when_the_old_one_expires(
        self, guarded: Server, connect: NewClient, tenant: str
    ) -> None:
        """The watch continues without a gap."""
        tokens_sent: list[str] = []

        def fresh() -> str:
            tokens_sent.append(KEY.token(tenants=[tenant], exp=int(time.time()) + 2))
            return tokens_sent[-1]

        client = connect(guarded.port, token=fresh)
        session_id = await create_session_id(client)
        before, delivered = len(tokens_sent), []
        async with asyncio.timeout(20):
            async for event in client.watch(session_id):
                delivered.append(event)
                if event_kind(event) == "caught_up":
                    await create_message(client, session_id, "one")
                    before = len(tokens_sent)
                if len(tokens_sent) > before + 1 and "two" not in contents_of(delivered):
                    before = len(tokens_sent) + 1_000
                    await create_message(client, session_id, "two")
                if "two" in contents_of(delivered):
                    break
        assert [each for each in map(event_kind, delivered) if each != "heartbeat"] == [
            "session",
            "caught_up",
            "messages_created",
            "messages_created",
        ]
        assert contents_of(delivered) == ["one", "two"]

    async def test_token_that_keeps_expiring_during_a_quiet_watch_is_renewed(
        self, database: str, connect: NewClient, tenant: str, tmp_path: Path
    ) -> None:
        """The server has accepted each of the tokens, so their source works."""
        given: list[str] = []

        def short_lived() -> str:
            given.append(KEY.token(tenants=[tenant], exp=int(time.time()) + 1))
            return given[-1]

        settings = {"auth": "jwt", **KEY.trusted(tmp_path)}
        async with serving(database, watch_heartbeat_seconds=60, **settings) as server:
            writer = connect(server.port, token=KEY.token(tenants=[tenant]))
            session_id = await create_session_id(writer)
            watch = connect(server.port, token=short_lived).watch(session_id)
            async with asyncio.timeout(30):
                assert [event_kind(await anext(watch)), event_kind(await anext(watch))] == [
                    "session",
                    "caught_up",
                ]
                event = asyncio.ensure_future(anext(watch))
                while len(given) < 5 and not event.done():
                    await asyncio.sleep(0.02)
                await create_message(writer, session_id, "late")
                assert contents_of([await event]) == ["late"]

    async def test_expired_token_string_ends_watch(
        self, guarded: Server, connect: NewClient, tenant: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        """At once: a string cannot be renewed."""
        caplog.set_level("INFO", "chat_ticket.client")
        token = KEY.token(tenants=[tenant], exp=int(time.time()) + 2)
        client = connect(guarded.port, token=token)
        session_id = await create_session_id(client)
        with pytest.raises(errors.UnauthenticatedError, match="CREDENTIAL_EXPIRED"):
            await asyncio.wait_for(watch_all(client, session_id), 20)
        assert "again" not in caplog.text

    async def test_token_that_is_always_expired_ends_watch(
        self, guarded: Server, connect: NewClient
    ) -> None:
        """After a few attempts."""
        client = connect(guarded.port, token=lambda: KEY.token(exp=int(time.time()) - 5))
        with pytest.raises(errors.UnauthenticatedError):
            async with asyncio.timeout(30):
                await anext(client.watch(an_id()))
