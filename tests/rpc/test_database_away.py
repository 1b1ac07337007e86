"""The service while its database is stopped, restarts, or has no connection to spare."""

import asyncio
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from grpc import StatusCode
from support.attachments import delete_attachment
from support.client import Api, a_file, an_id, refused
from support.database import (
    raise_on_insert,
    session_locked,
    terminate_at_commit,
    wait_for_lock_waiters,
)
from support.messages import delete_message, session_with_messages, set_metadata
from support.sessions import ACTIVE, ARCHIVED, RESOLVED, set_status
from support.tickets import unlink

from chat_ticket.v1.chat_message_pb2 import (
    ListChatMessagesRequest,
    SearchChatMessagesRequest,
)
from chat_ticket.v1.chat_session_pb2 import (
    DeleteChatSessionRequest,
    GetChatSessionRequest,
    ListChatSessionsRequest,
)
from chat_ticket_svc.embedded import EmbeddedPostgres
from chat_ticket_svc.store import connection_queue


class TestDatabaseAway:
    @pytest.fixture
    def postgres(self, served_data: Path) -> Iterator[EmbeddedPostgres]:
        """A PostgreSQL that the test may stop."""
        with EmbeddedPostgres(served_data, durable=False) as postgres:
            yield postgres

    async def health(self, api: Api) -> int:
        from grpc_health.v1.health_pb2 import HealthCheckRequest

        return (await api.health.Check(HealthCheckRequest())).status  # type: ignore[no-any-return]

    async def until_health(self, api: Api, status: int) -> None:
        async with asyncio.timeout(15):
            while await self.health(api) != status:
                await asyncio.sleep(0.1)

    async def test_every_call_is_unavailable_until_the_database_is_back(
        self, start_server: Any, postgres: EmbeddedPostgres
    ) -> None:
        """Calls and streams are UNAVAILABLE, health is NOT_SERVING, and no restart is needed."""
        api = await start_server(postgres.url("chat_ticket"))
        session = await api.session()
        await self.until_health(api, 1)
        postgres.stop()
        calls = (
            api.sessions.GetChatSession(GetChatSessionRequest(session_id=session.id)),
            api.sessions.ListChatSessions(ListChatSessionsRequest()),
            api.messages.SearchChatMessages(SearchChatMessagesRequest(query="x")),
            api.messages.ListChatMessages(ListChatMessagesRequest(session_id=session.id)).read(),
        )
        for call in calls:
            with refused(StatusCode.UNAVAILABLE, "DATABASE_UNAVAILABLE") as refusal:
                await call
            assert "RetryInfo" in refusal.details
        with refused(StatusCode.UNAVAILABLE):
            await api.message(session.id)
        await self.until_health(api, 2)
        postgres.start()
        await self.until_health(api, 1)
        assert (await api.message(session.id)).sequence == 1

    async def test_restart_is_survived_without_an_error(
        self, start_server: Any, postgres: EmbeddedPostgres
    ) -> None:
        """Dead connections are replaced once and the call repeated: reads and creates succeed."""
        api = await start_server(postgres.url("chat_ticket"))
        session = await api.session()
        await asyncio.gather(*(api.message(session.id) for _ in range(20)))
        postgres.stop()
        postgres.start()
        request = GetChatSessionRequest(session_id=session.id)
        answers = await asyncio.gather(
            *(api.sessions.GetChatSession(request) for _ in range(10)),
            *(api.message(session.id) for _ in range(10)),
        )
        assert answers[0].session.id == session.id
        sequences = sorted(message.sequence for message in answers[10:])
        assert sequences == list(range(21, 31)), "each created once"

    async def test_starts_without_a_database(
        self, start_server: Any, postgres: EmbeddedPostgres, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """The server starts as NOT_SERVING, and serves when the database is up. The log says so."""
        postgres.stop()
        api = await start_server(postgres.url("chat_ticket"))
        assert await self.health(api) == 2
        postgres.start()
        await self.until_health(api, 1)
        assert (await api.session()).revision == 0
        await asyncio.sleep(1)  # until the listener connects again
        captured = capsys.readouterr()
        logged = captured.out + captured.err
        assert re.search(r"listener cannot connect .*no server has this socket", logged)
        assert re.search(r"listener is connected .*failed_attempts=\d+", logged)
        assert "lost its connection" not in logged

    async def test_connection_lost_in_a_write_is_an_unknown_outcome(
        self, start_server: Any, fresh_database: str
    ) -> None:
        """A delete that may have happened is OUTCOME_UNKNOWN; a create is retried by its id."""
        api = await start_server(fresh_database, pool_size=2)
        session = await api.session()
        terminate_at_commit(fresh_database, "chat_sessions", "DELETE")
        with refused(StatusCode.UNAVAILABLE, "OUTCOME_UNKNOWN") as refusal:
            request = DeleteChatSessionRequest(session_id=session.id)
            await api.sessions.DeleteChatSession(request)
        assert "RetryInfo" in refusal.details
        raise_on_insert(
            fresh_database,
            "IF nextval('attempts') = 1 THEN PERFORM pg_terminate_backend(pg_backend_pid());"
            " END IF",
        )
        session_id = an_id()
        assert (await api.session(id=session_id)).id == session_id

    async def test_full_queue_is_rejected_at_once(
        self, start_server: Any, fresh_database: str
    ) -> None:
        """Beyond the calls that may wait for a connection, the next is RESOURCE_EXHAUSTED."""
        api = await start_server(fresh_database, pool_size=1)
        locked = [(await api.session()).id for _ in range(8)]
        with session_locked(fresh_database, *locked):
            calls = [asyncio.create_task(api.message(session_id)) for session_id in locked]
            done, waiting = await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
            for call in done:
                with refused(StatusCode.RESOURCE_EXHAUSTED, "POOL_QUEUE_FULL") as refusal:
                    await call
                assert "RetryInfo" in refusal.details
        answers = await asyncio.gather(*waiting, return_exceptions=True)
        stored = [answer for answer in answers if not isinstance(answer, BaseException)]
        assert stored
        assert {message.sequence for message in stored} == {1}

    async def test_busy_pool_is_no_dead_database(
        self, start_server: Any, fresh_database: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A call that waits too long for the tenant's busy connections is POOL_TIMEOUT."""
        monkeypatch.setattr(connection_queue, "LEASE_TIMEOUT_SECONDS", 0.2)
        api = await start_server(fresh_database, pool_size=1)
        locked, free = await api.session(), await api.session()
        with session_locked(fresh_database, locked.id):
            waiting = asyncio.create_task(set_status(api, locked.id, RESOLVED))
            await wait_for_lock_waiters(fresh_database, 1)
            with refused(StatusCode.RESOURCE_EXHAUSTED, "POOL_TIMEOUT") as refusal:
                await set_status(api, free.id, RESOLVED)
            assert "RetryInfo" in refusal.details
        assert (await waiting).status == RESOLVED

    async def test_locked_session_leaves_connections_to_others(
        self, start_server: Any, fresh_database: str
    ) -> None:
        """However many calls wait for one session, its tenant's other calls are answered at once.

        Those that wait are served in their order when the lock is gone, or are CONTENTION when it
        is held for longer than the lock timeout.
        """
        api = await start_server(fresh_database, pool_size=6, lock_timeout_ms=1000)
        session, free = await api.session(), await api.session()
        files = [a_file(id=an_id()) for _ in range(2)]
        message = await api.message(session.id, attachments=files)
        doomed = await api.message(session.id)
        link = await api.escalate(session.id)
        changes = [
            *(api.message(session.id) for _ in range(8)),
            *(api.message(session.id, attachments=[a_file()]) for _ in range(8)),
            *(set_metadata(api, message.id, f'{{"a": {n}}}') for n in range(4)),
            *(api.attachment(message.id) for _ in range(4)),
            delete_attachment(api, files[0].id),
            delete_message(api, doomed.id),
            unlink(api, link.id),
        ]
        with session_locked(fresh_database, session.id):
            waiting = [asyncio.create_task(change) for change in changes]
            await wait_for_lock_waiters(fresh_database, 2)
            async with asyncio.timeout(0.8):
                for n in range(10):
                    await set_status(api, free.id, RESOLVED if n % 2 else ACTIVE)
            assert not any(task.done() for task in waiting)
        await asyncio.gather(*waiting)
        with session_locked(fresh_database, session.id):
            waiting = [asyncio.create_task(set_status(api, session.id, ARCHIVED)) for _ in range(9)]
            for task in waiting:
                with refused(StatusCode.ABORTED, "CONTENTION"):
                    await task

    async def test_cancelled_calls_do_not_fill_the_queue(
        self, start_server: Any, fresh_database: str
    ) -> None:
        """Only those who still wait count."""
        api = await start_server(fresh_database, pool_size=1)
        session = await api.session()
        request = ListChatSessionsRequest()
        with session_locked(fresh_database, session.id):
            writing = asyncio.create_task(api.message(session.id))
            await asyncio.sleep(0.2)
            waiting = [
                asyncio.ensure_future(api.sessions.ListChatSessions(request)) for _ in range(4)
            ]
            await asyncio.sleep(0.2)
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
            await asyncio.sleep(0.2)
            last = asyncio.ensure_future(api.sessions.ListChatSessions(request))
            await asyncio.sleep(0.2)
            assert not last.done(), "refused though nobody else waits"
        assert [found.id for found in (await last).sessions] == [session.id]
        assert (await writing).sequence == 1

    async def test_searches_leave_connections_to_others(
        self, start_server: Any, fresh_database: str
    ) -> None:
        """However many searches run, another tenant's calls are answered."""
        api = await start_server(fresh_database, pool_size=3)
        session = await api.session()
        with psycopg.connect(fresh_database) as connection:
            connection.execute("LOCK TABLE chat_messages IN ACCESS EXCLUSIVE MODE")
            searches = [
                asyncio.ensure_future(
                    api.messages.SearchChatMessages(SearchChatMessagesRequest(query="x"))
                )
                for _ in range(6)
            ]
            await asyncio.sleep(0.3)
            request = GetChatSessionRequest(session_id=session.id)
            assert (await api.sessions.GetChatSession(request)).session.id == session.id
        await asyncio.gather(*searches)

    async def test_clients_that_leave_are_no_errors(
        self, api: Api, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """A stream that is cancelled while it is written to is not an internal error."""
        session_id = await session_with_messages(api, 2000, "x" * 500)
        request = ListChatMessagesRequest(session_id=session_id)
        for n in range(150):
            call = api.messages.ListChatMessages(request)
            await asyncio.sleep(0.0004 * (n % 50))
            call.cancel()
        await api.session()
        captured = capsys.readouterr()
        assert "internal error" not in captured.out + captured.err
