"""`watch` of the Python client, which resumes by itself."""

import asyncio
import re

import pytest
from support.client import an_id
from support.client_calls import (
    NewClient,
    contents_of,
    create_message,
    create_session_id,
    event_kind,
    only_asyncio,
    until,
    watch_all,
)
from support.client_servers import free_port
from support.database import execute
from support.server import serving

from chat_ticket import errors
from chat_ticket.client import AsyncChatTicketClient
from chat_ticket.v1 import resources_pb2 as r
from chat_ticket.v1.chat_message_pb2 import (
    BatchCreateChatMessagesRequest,
)
from chat_ticket.v1.chat_session_pb2 import (
    DeleteChatSessionRequest,
    UpdateChatSessionRequest,
)


class TestWatch:
    async def test_leaving_the_loop_ends_the_stream(
        self, database: str, connect: NewClient
    ) -> None:
        """At the server too, which keeps no state of an ended stream."""
        async with serving(database) as server:
            client = connect(server.port)
            session_id = await create_session_id(client)
            async for event in client.watch(session_id):
                if event_kind(event) == "caught_up":
                    assert server._watch_hub.watcher_count == 1
                    break
            await until(lambda: server._watch_hub.watcher_count == 0)

    @only_asyncio
    @pytest.mark.parametrize("waiting", [True, False])
    async def test_cancelling_the_task_ends_the_stream(
        self, database: str, connect: NewClient, waiting: bool
    ) -> None:
        """Whether it waits for an event or handles one."""

        async def watch() -> None:
            async for event in client.watch(session_id):
                if event_kind(event) == "caught_up":
                    caught_up.set()
                    if not waiting:
                        await asyncio.sleep(60)

        async with serving(database) as server:
            client, caught_up = connect(server.port), asyncio.Event()
            session_id = await create_session_id(client)
            task = asyncio.create_task(watch())
            await caught_up.wait()
            assert server._watch_hub.watcher_count == 1
            await asyncio.sleep(0.05)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await until(lambda: server._watch_hub.watcher_count == 0)

    @only_asyncio
    async def test_callers_timeout_is_not_an_error_of_the_client(
        self, client: AsyncChatTicketClient
    ) -> None:
        """The client does not treat it as a silent stream."""
        session_id = await create_session_id(client)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(watch_all(client, session_id), 0.3)

    async def test_slow_consumer_loses_nothing(
        self, database: str, connect: NewClient, caplog: pytest.LogCaptureFixture
    ) -> None:
        """The server ends the stream of a slow reader; the watch resumes."""
        caplog.set_level("INFO", "chat_ticket.client")
        async with serving(database, stream_write_timeout_seconds=0.3) as server:
            client = connect(server.port)
            session_id = await create_session_id(client)
            # One word, which costs the search little.
            message = r.ChatMessage(role=r.CHAT_MESSAGE_ROLE_USER, content="x" * 5000)
            for _ in range(10):  # more than gRPC keeps for who does not read
                request = BatchCreateChatMessagesRequest(
                    session_id=session_id, messages=[message] * 200
                )
                await client.messages.BatchCreateChatMessages(request)
            sequences: list[int] = []
            kinds: list[str] = []
            async with asyncio.timeout(30):
                async for event in client.watch(session_id):
                    kinds.append(event_kind(event))
                    sequences += [m.sequence for m in event.messages_created.messages]
                    if len(kinds) == 1:
                        await until(lambda: server._watch_hub.watcher_count == 0)
                    if event_kind(event) == "caught_up":
                        break
        assert "SLOW_READER" in caplog.text
        assert sequences == list(range(1, 2001))
        assert kinds.count("session") == 1

    async def test_watch_waits_for_a_free_stream(self, database: str, connect: NewClient) -> None:
        """An error with RetryInfo does not end the watch."""
        async with serving(database, quotas={"session_streams": 1}) as server:
            client = connect(server.port)
            session_id = await create_session_id(client)
            first = client.watch(session_id)
            await anext(first)
            second = asyncio.ensure_future(anext(client.watch(session_id)))
            await asyncio.sleep(0.5)
            assert not second.done()
            await first.aclose()
            async with asyncio.timeout(10):
                assert event_kind(await second) == "session"

    async def test_changes_during_a_disconnect_are_delivered_once(
        self, database: str, connect: NewClient, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A change of status as the session, again; no second session or caught_up otherwise.

        And a server that drains is not asked again before the second that it asks for.
        """
        caplog.set_level("INFO", "chat_ticket.client")
        port, delivered = free_port(), []
        async with serving(database) as other:
            client, elsewhere = connect(port), connect(other.port)
            session_id = await create_session_id(elsewhere)
            events = client.watch(session_id)

            async def read_until(last: str) -> None:
                async with asyncio.timeout(20):
                    while not delivered or event_kind(delivered[-1]) != last:
                        delivered.append(await anext(events))

            async with serving(database, port=port):
                await read_until("caught_up")
            change = UpdateChatSessionRequest(session=r.ChatSession(id=session_id))
            change.session.status = r.CHAT_SESSION_STATUS_RESOLVED
            change.update_mask.paths.append("status")
            await elsewhere.sessions.UpdateChatSession(change)
            await create_message(elsewhere, session_id)
            async with serving(database, port=port):
                await read_until("messages_created")
            await elsewhere.sessions.DeleteChatSession(
                DeleteChatSessionRequest(session_id=session_id)
            )
            async with serving(database, port=port):
                await read_until("session_deleted")
                with pytest.raises(StopAsyncIteration):
                    await anext(events)
        assert [event_kind(event) for event in delivered] == [
            "session",
            "caught_up",
            "session",
            "messages_created",
            "session_deleted",
        ]
        assert [event.revision for event in delivered] == [0, 0, 0, 2, 2]
        pauses = re.findall(r"in ([\d.]+) s: DRAINING", caplog.text)
        assert pauses
        assert all(float(pause) >= 1 for pause in pauses)

    async def test_position_moves_over_a_break(self, database: str, connect: NewClient) -> None:
        """The status changed and changed back, without an event. A heartbeat has the position.

        At once, and not by the next heartbeat of the server.
        """
        port, delivered = free_port(), []
        async with serving(database) as other:
            client, elsewhere = connect(port), connect(other.port)
            session_id = await create_session_id(elsewhere)
            events = client.watch(session_id)
            async with serving(database, port=port):
                delivered += [await anext(events), await anext(events)]
            for status in (r.CHAT_SESSION_STATUS_RESOLVED, r.CHAT_SESSION_STATUS_ACTIVE):
                change = UpdateChatSessionRequest(session=r.ChatSession(id=session_id))
                change.session.status = status
                change.update_mask.paths.append("status")
                await elsewhere.sessions.UpdateChatSession(change)
            async with serving(database, port=port), asyncio.timeout(10):
                delivered.append(await anext(events))
            await events.aclose()
        assert [event_kind(event) for event in delivered] == ["session", "caught_up", "heartbeat"]
        assert [event.revision for event in delivered] == [0, 0, 2]

    async def test_session_created_again_is_another_one(
        self, database: str, connect: NewClient
    ) -> None:
        """Which must not be; but when it is, the one that was watched is gone."""
        port, session_id = free_port(), an_id()
        async with serving(database) as other:
            client, elsewhere = connect(port), connect(other.port)
            await create_session_id(elsewhere, id=session_id)
            events = client.watch(session_id)
            async with serving(database, port=port):
                assert event_kind(await anext(events)) == "session"
                assert event_kind(await anext(events)) == "caught_up"
            request = DeleteChatSessionRequest(session_id=session_id)
            await elsewhere.sessions.DeleteChatSession(request)
            execute(database, "DELETE FROM chat_session_tombstones")  # as a sweep does, later
            await create_session_id(elsewhere, id=session_id)
            async with serving(database, port=port), asyncio.timeout(20):
                assert event_kind(await anext(events)) == "session_deleted"

    async def test_closed_client_ends_it(self, database: str, connect: NewClient) -> None:
        """Soon, and not by going on for ever."""
        async with serving(database) as server:
            client = connect(server.port)
            session_id = await create_session_id(client)
            events = client.watch(session_id)
            await anext(events)
            await anext(events)
            waiting = asyncio.ensure_future(anext(events))
            await asyncio.sleep(0.1)
            await client.close()
            async with asyncio.timeout(10):
                with pytest.raises(errors.CallCancelledError, match="the client is closed"):
                    await waiting

    @only_asyncio
    async def test_one_client_watches_a_thousand_sessions(
        self, client: AsyncChatTicketClient
    ) -> None:
        """As many as the tenant's quota; the synchronous client has a test in the threads' file."""

        async def watch_first(session_id: str) -> str:
            kinds = []
            async for event in client.watch(session_id):
                kinds.append(event_kind(event))
                if kinds[-1] == "caught_up":
                    watching.append(session_id)
                if kinds[-1] == "messages_created":
                    return contents_of([event])[0]
            return ""

        watching: list[str] = []
        session_ids: list[str] = []
        for _ in range(50):  # fewer at once than the quota of calls in flight
            session_ids += await asyncio.gather(*(create_session_id(client) for _ in range(20)))
        async with asyncio.timeout(60):
            watches = [asyncio.create_task(watch_first(each)) for each in session_ids]
            while len(watching) < 1000:
                assert not any(watch.done() for watch in watches)
                await asyncio.sleep(0.05)
            for number in range(0, 1000, 90):
                await create_message(client, session_ids[number], f"message {number}")
                assert await watches[number] == f"message {number}"
            for watch in watches:
                watch.cancel()
            await asyncio.gather(*watches, return_exceptions=True)
