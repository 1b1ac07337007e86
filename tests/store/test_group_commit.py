"""Group commit of the messages of many callers, and reads on the pipelined connection."""

import asyncio
import bisect
import contextlib
import itertools
from collections.abc import AsyncIterator
from typing import Any

import psycopg
import pytest
from grpc import StatusCode
from support.client import Api, an_id, refused
from support.database import execute, raise_on_insert, session_locked
from support.messages import sequences

from chat_ticket.v1.chat_message_pb2 import GetChatMessageRequest
from chat_ticket.v1.chat_session_pb2 import GetChatSessionRequest
from chat_ticket.v1.chat_ticket_pb2 import GetTicketRequest
from chat_ticket_svc.store import group_commit


@pytest.fixture(autouse=True)
def together(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many messages each shared statement had; none goes before a moment has passed."""
    sizes: list[int] = []
    write = group_commit.GroupCommitWriter._write_batch

    async def gathered(self: Any, batch: Any) -> None:
        sizes.append(len(batch))
        await write(self, batch)
        await asyncio.sleep(0.05)

    monkeypatch.setattr(group_commit.GroupCommitWriter, "_write_batch", gathered)
    return sizes


@contextlib.asynccontextmanager
async def another(api: Api) -> AsyncIterator[Api]:
    """Another tenant's client of the same server."""
    async with Api(api.address, f"another {api.tenant}") as other:
        yield other


class TestTogether:
    async def test_messages_of_many_callers_are_one_statement(
        self, api: Api, together: list[int]
    ) -> None:
        """Each in its session, at its place, for its tenant."""
        async with another(api) as other:
            ours = [await api.session() for _ in range(3)]
            theirs = await other.session(id=ours[0].id)
            calls = [
                (of, session.id, f"{number} {of.tenant}")
                for number in range(8)
                for of, session in ((api, ours[0]), (api, ours[1]), (other, theirs))
            ]
            created = await asyncio.gather(
                *(of.message(session_id, content) for of, session_id, content in calls)
            )
            assert max(together) > 8
            for of, session_id in ((api, ours[0].id), (api, ours[1].id), (other, theirs.id)):
                assert await sequences(of, session_id) == list(range(1, 9))
            for (of, session_id, content), message in zip(calls, created, strict=True):
                request = GetChatMessageRequest(message_id=message.id)
                assert (await of.messages.GetChatMessage(request)).message == message
                assert (message.session_id, message.content) == (session_id, content)
            assert await sequences(api, ours[2].id) == []

    async def test_times_increase_with_the_sequences(self, api: Api, together: list[int]) -> None:
        """The order of creation is that of the times as well."""
        session = await api.session()
        created = await asyncio.gather(*(api.message(session.id) for _ in range(20)))
        assert max(together) > 8
        in_order = sorted(created, key=lambda message: message.sequence)
        times = [message.create_time.ToNanoseconds() for message in in_order]
        assert times == sorted(set(times))
        found = await api.sessions.GetChatSession(GetChatSessionRequest(session_id=session.id))
        assert found.session.update_time == in_order[-1].create_time
        assert found.session.revision == 20

    async def test_text_is_stored_as_sent(self, api: Api, together: list[int]) -> None:
        """Also characters with a meaning in PostgreSQL's array format."""
        session = await api.session()
        texts = ['"', "\\", '\\"', "{a,b}", "NULL", "null", ",", " ", "\n", "\x01", "\u202e😀", "'"]
        created = await asyncio.gather(*(api.message(session.id, text) for text in texts))
        assert max(together) > 4
        assert [message.content for message in created] == texts
        for message in created:
            request = GetChatMessageRequest(message_id=message.id)
            assert (await api.messages.GetChatMessage(request)).message == message

    async def test_metadata_comes_back_as_stored(self, api: Api) -> None:
        """Present or absent, of each message by itself."""
        session = await api.session()
        sent = ["", '{"b":1,  "a":"\\""}', "", "{}"]
        created = await asyncio.gather(
            *(api.message(session.id, metadata_json=metadata) for metadata in sent)
        )
        stored = ["", '{"a": "\\"", "b": 1}', "", "{}"]
        assert [message.metadata_json for message in created] == stored


class TestAlone:
    """A message that fails does not affect the others of its statement."""

    async def test_rejected_message(
        self, start_server: Any, fresh_database: str, together: list[int]
    ) -> None:
        """Only the message with the invalid row fails."""
        api = await start_server(fresh_database)
        session = await api.session()
        raise_on_insert(
            fresh_database,
            "IF NEW.content = 'bad' THEN RAISE 'no' USING ERRCODE = '22000'; END IF",
            table="chat_messages",
        )
        calls = [api.message(session.id, "bad" if n == 5 else "good") for n in range(10)]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        ends = list(itertools.accumulate(together))
        assert together[bisect.bisect_right(ends, 5)] > 1, "it was alone"
        bad = answers.pop(5)
        with refused(StatusCode.INVALID_ARGUMENT):
            raise bad
        assert sorted(message.sequence for message in answers) == list(range(1, 10))

    async def test_absent_session(self, api: Api) -> None:
        """And another tenant's."""
        async with another(api) as other:
            session, foreign = await api.session(), await other.session()
            calls = [
                *(api.message(session.id) for _ in range(4)),
                api.message(an_id()),
                api.message(foreign.id),
            ]
            *good, absent, not_ours = await asyncio.gather(*calls, return_exceptions=True)
            for answer in (absent, not_ours):
                with refused(StatusCode.NOT_FOUND, "CHAT_SESSION_NOT_FOUND"):
                    raise answer
            assert sorted(message.sequence for message in good) == [1, 2, 3, 4]
            assert await sequences(other, foreign.id) == []

    async def test_repeated_and_conflicting_ids(self, api: Api) -> None:
        """A repeat gets what is stored; other content under the same id is rejected."""
        session = await api.session()
        first = await api.message(session.id, "first")
        new = an_id()
        calls = [
            api.message(session.id, "first", id=first.id),
            api.message(session.id, "other", id=first.id),
            *(api.message(session.id, "new", id=new) for _ in range(3)),
        ]
        repeat, conflict, *same = await asyncio.gather(*calls, return_exceptions=True)
        assert repeat == first
        with refused(StatusCode.ALREADY_EXISTS, "CHAT_MESSAGE_ALREADY_EXISTS"):
            raise conflict
        assert same == [same[0]] * 3
        assert await sequences(api, session.id) == [1, 2]

    async def test_locked_session(self, start_server: Any, fresh_database: str) -> None:
        """A locked session does not delay appends to other sessions."""
        api = await start_server(fresh_database, lock_timeout_ms=9000)
        locked_session, free = await api.session(), await api.session()
        with session_locked(fresh_database, locked_session.id):
            waiting = asyncio.ensure_future(api.message(locked_session.id))
            async with asyncio.timeout(5):
                created = await asyncio.gather(*(api.message(free.id) for _ in range(5)))
            assert not waiting.done()
        assert sorted(message.sequence for message in created) == [1, 2, 3, 4, 5]
        assert (await waiting).sequence == 1

    async def test_lost_connection(
        self, start_server: Any, fresh_database: str, together: list[int]
    ) -> None:
        """The outcome of all is unknown; each is stored once when its call succeeds."""
        api = await start_server(fresh_database)
        session = await api.session()
        execute(fresh_database, "CREATE SEQUENCE attempts")
        raise_on_insert(
            fresh_database,
            "IF nextval('attempts') = 3 THEN PERFORM pg_terminate_backend(pg_backend_pid());"
            " END IF",
            table="chat_messages",
        )
        created = await asyncio.gather(*(api.message(session.id) for _ in range(12)))
        assert max(together) > 3
        assert sorted(message.sequence for message in created) == list(range(1, 13))
        assert await sequences(api, session.id) == list(range(1, 13))

    async def test_unknown_outcome(
        self, start_server: Any, fresh_database: str, cluster: Any
    ) -> None:
        """OUTCOME_UNKNOWN if the connection broke and no other one is available."""
        api = await start_server(fresh_database)
        session = await api.session()
        name = fresh_database.partition("?")[0].rpartition("/")[2]
        raise_on_insert(
            fresh_database,
            "PERFORM pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid();"
            " PERFORM pg_terminate_backend(pg_backend_pid())",
            table="chat_messages",
        )
        cluster.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
        with refused(StatusCode.UNAVAILABLE, "OUTCOME_UNKNOWN"):
            await api.message(session.id)

    async def test_cancelled_call(self, api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
        """A message whose caller leaves before it is sent is dropped; others are stored."""
        session = await api.session()
        go = asyncio.Event()
        write = group_commit.GroupCommitWriter._write_batch

        async def blocked_write(self: Any, batch: Any) -> None:
            await go.wait()
            await write(self, batch)

        monkeypatch.setattr(group_commit.GroupCommitWriter, "_write_batch", blocked_write)
        calls = []
        for content in ("sent", "waits", "leaves", "waits"):
            calls.append(asyncio.ensure_future(api.message(session.id, content)))
            await asyncio.sleep(0.1)
        calls[0].cancel()
        calls[2].cancel()
        await asyncio.sleep(0.1)
        go.set()
        answers = await asyncio.gather(*calls, return_exceptions=True)
        assert [answers[n].sequence for n in (1, 3)] == [2, 3]
        assert await sequences(api, session.id) == [1, 2, 3]


class TestReads:
    async def test_reads_go_on_after_a_lost_connection(
        self, start_server: Any, fresh_database: str
    ) -> None:
        """Reads in flight are retried on another connection."""
        api = await start_server(fresh_database)
        session = await api.session()
        request = GetChatSessionRequest(session_id=session.id)

        async def read() -> None:
            for _ in range(20):
                await asyncio.sleep(0.01)
                assert (await api.sessions.GetChatSession(request)).session == session

        readers = [asyncio.create_task(read()) for _ in range(8)]
        async with await psycopg.AsyncConnection.connect(
            fresh_database, autocommit=True
        ) as connection:
            await asyncio.sleep(0.1)
            await connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
        answers = await asyncio.gather(*readers, return_exceptions=True)
        assert answers == [None] * 8

    async def test_a_read_that_fails_fails_alone(
        self, start_server: Any, fresh_database: str
    ) -> None:
        """Others of the same moment, on the same connection, get their answers."""
        api = await start_server(fresh_database, lock_timeout_ms=300)
        session = await api.session()
        message = await api.message(session.id)
        of_session = GetChatSessionRequest(session_id=session.id)
        of_message = GetChatMessageRequest(message_id=message.id)
        async with await psycopg.AsyncConnection.connect(fresh_database) as connection:
            await connection.execute("LOCK TABLE chat_messages IN ACCESS EXCLUSIVE MODE")
            answers = await asyncio.gather(
                api.sessions.GetChatSession(of_session),
                api.messages.GetChatMessage(of_message),
                *(api.sessions.GetChatSession(of_session) for _ in range(5)),
                return_exceptions=True,
            )
        with refused(StatusCode.ABORTED, "CONTENTION"):
            raise answers.pop(1)
        assert {answer.session.id for answer in answers} == {session.id}

    @pytest.mark.direct("its sessions' settings are PgBouncer's")
    async def test_statements_of_cancelled_calls_are_dropped(
        self, start_server: Any, fresh_database: str
    ) -> None:
        """Statements of cancelled callers are dropped if they were not sent yet."""
        api = await start_server(
            fresh_database, lock_timeout_ms=100, quotas={"tenant_calls_in_flight": 200}
        )
        session = await api.session()
        message = GetChatMessageRequest(message_id=(await api.message(session.id)).id)
        await api.messages.GetChatMessage(message)
        async with await psycopg.AsyncConnection.connect(fresh_database) as connection:
            await connection.execute("LOCK TABLE chat_messages IN ACCESS EXCLUSIVE MODE")
            calls = [asyncio.ensure_future(api.messages.GetChatMessage(message)) for _ in range(99)]
            await asyncio.sleep(0.2)
            for call in calls:
                call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)
            async with asyncio.timeout(5):
                await api.sessions.GetChatSession(GetChatSessionRequest(session_id=session.id))

    async def test_statement_that_could_not_be_prepared(
        self, start_server: Any, fresh_database: str
    ) -> None:
        """Is prepared when it can be, and those that count on it fail by nothing but themselves."""
        api = await start_server(fresh_database, lock_timeout_ms=100)
        message = GetChatMessageRequest(message_id=an_id())
        async with await psycopg.AsyncConnection.connect(fresh_database) as connection:
            await connection.execute("LOCK TABLE chat_messages IN ACCESS EXCLUSIVE MODE")
            calls = (api.messages.GetChatMessage(message) for _ in range(8))
            for answer in await asyncio.gather(*calls, return_exceptions=True):
                with refused(StatusCode.ABORTED, "CONTENTION"):
                    raise answer
        request = GetTicketRequest(ticket_id=an_id())
        execute(fresh_database, "ALTER TABLE tickets RENAME TO away")
        with refused(StatusCode.INTERNAL):
            await api.tickets.GetTicket(request)
        execute(fresh_database, "ALTER TABLE away RENAME TO tickets")
        with refused(StatusCode.NOT_FOUND):
            await api.tickets.GetTicket(request)
