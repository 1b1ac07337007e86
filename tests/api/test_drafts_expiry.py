"""Lost writers: their drafts become INCOMPLETE messages, by exactly one of several servers."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import psycopg
import pytest
import pytest_asyncio
from support.client import Api, an_id
from support.database import session_locked
from support.drafts import (
    INCOMPLETE,
    a_start,
    get_draft,
    leave_draft,
    list_drafts,
    start_finished,
    stop_draft,
    unstarted,
    writing,
)
from support.messages import batches, get_message, sequences
from support.server import serving
from support.sessions import ARCHIVED, get_revision, set_status
from support.watching import assert_same_state, watching

from chat_ticket.v1 import resources_pb2 as r
from chat_ticket_svc import errors
from chat_ticket_svc.server import Server
from chat_ticket_svc.store import draft_expiry, drafts, expired_drafts

LOST = "finished the draft of a lost writer"


@pytest_asyncio.fixture(scope="module", autouse=True)
async def impatient_server(database: str) -> AsyncIterator[Server]:
    """One of three servers on the worker's database that look for lost writers all the time.

    A writer of this one counts as lost after a second.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(draft_expiry, "SWEEP_SECONDS", 0.02)
        async with serving(database), serving(database), serving(database, draft_seconds=1) as one:
            yield one


@pytest_asyncio.fixture
async def impatient(impatient_server: Server, tenant: str) -> AsyncIterator[Api]:
    async with Api(f"127.0.0.1:{impatient_server.port}", tenant) as api:
        yield api


Expire = Callable[..., Awaitable[None]]


@pytest.fixture
def expire(database: str) -> Expire:
    """`await expire(draft_id, …)`: let the writers of these drafts be lost now."""

    async def expire(*draft_ids: str) -> None:
        async with await psycopg.AsyncConnection.connect(database, autocommit=True) as connection:
            await connection.execute(
                "UPDATE chat_drafts SET expires_at = clock_timestamp() WHERE id = ANY (%s::uuid[])",
                [list(draft_ids)],
            )

    return expire


async def wait_until_ended(api: Api, session_id: str) -> None:
    """Return when the session has no open draft."""
    async with asyncio.timeout(10):
        while await list_drafts(api, session_id):
            await asyncio.sleep(0.01)


class TestLostWriter:
    async def test_text_becomes_an_incomplete_message(
        self, api: Api, database: str, expire: Expire, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """One message and one revision for each draft, and one server says that it did it."""
        session = await api.session()
        ids = [await leave_draft(api, session.id, f"text {number}") for number in range(8)]
        capsys.readouterr()
        async with watching(api, session.id) as watcher:
            with session_locked(database, session.id):
                await expire(*ids)
                await asyncio.sleep(0.2)  # in which all servers find them
            await watcher.until_revision(8)
            await assert_same_state(api, watcher, session.id)
            messages = watcher.messages
        assert set(messages) == set(ids)
        for number, draft_id in enumerate(ids):
            assert messages[draft_id].content == f"text {number}"
            assert messages[draft_id].state == INCOMPLETE
        await asyncio.sleep(0.1)  # in which the other servers find that there is nothing to do
        assert await list_drafts(api, session.id) == []
        assert await sequences(api, session.id) == list(range(1, 9))
        assert await get_revision(api, session.id) == 8
        said = [line for line in capsys.readouterr().out.splitlines() if LOST in line]
        assert len([line for line in said if api.tenant in line]) == 8

    @pytest.mark.parametrize("is_locked", [False, True])
    async def test_message_has_the_fields_of_the_draft(
        self, api: Api, database: str, expire: Expire, is_locked: bool
    ) -> None:
        """Each its own: those that end together, and those that wait for their session."""
        session = await api.session()
        own = [
            {"author": r.ChatMessageAuthor(kind=2, id="bot")},
            {"author": r.ChatMessageAuthor(id="ann"), "language_code": "de"},
            {"metadata_json": '{"a": 1}'},
        ]
        ids = [await leave_draft(api, session.id, "x", **fields) for fields in own]
        with session_locked(database, session.id) if is_locked else contextlib.nullcontext():
            await expire(*ids)
            await asyncio.sleep(0.2 * is_locked)  # in which all servers find them
        await wait_until_ended(api, session.id)
        for draft_id, fields in zip(ids, own, strict=True):
            message = await get_message(api, draft_id)
            assert message.HasField("author") == ("author" in fields)
            assert {name: getattr(message, name) for name in fields} == fields

    async def test_locked_sessions_hold_up_no_other(
        self, api: Api, database: str, expire: Expire
    ) -> None:
        """Their drafts end when the locks are gone."""
        locked = [await api.session() for _ in range(5)]
        waiting = [await leave_draft(api, s.id, "text") for s in locked for _ in range(4)]
        session = await api.session()
        with session_locked(database, *(s.id for s in locked)):
            await expire(*waiting)
            await asyncio.sleep(0.1)  # in which all servers find them
            draft_id = await leave_draft(api, session.id, "text")
            await expire(draft_id)
            async with asyncio.timeout(3):
                await wait_until_ended(api, session.id)
        for s in locked:
            await wait_until_ended(api, s.id)

    async def test_empty_draft_is_dropped(self, api: Api, expire: Expire) -> None:
        """There is no message, and the id is free."""
        session = await api.session()
        draft_id = await leave_draft(api, session.id)
        await expire(draft_id)
        await wait_until_ended(api, session.id)
        assert await get_revision(api, session.id) == 0
        async with writing(api, session.id, draft_id) as stream:
            assert stream.offset == 0

    async def test_archived_session(self, api: Api, expire: Expire) -> None:
        """Its status makes no difference."""
        session = await api.session()
        draft_id = await leave_draft(api, session.id, "x")
        await set_status(api, session.id, ARCHIVED)
        await expire(draft_id)
        await wait_until_ended(api, session.id)
        assert (await get_message(api, draft_id)).state == INCOMPLETE

    async def test_writer_that_comes_back_too_late(
        self, api: Api, another_server: Api, expire: Expire
    ) -> None:
        """It gets the message, and so does who stops the draft."""
        session = await api.session()
        draft_id = await leave_draft(api, session.id, "text")
        await expire(draft_id)
        await wait_until_ended(api, session.id)
        message = await get_message(api, draft_id)
        assert message.state == INCOMPLETE
        for by in (api, another_server):
            assert await start_finished(by, session.id, draft_id) == message
            assert await stop_draft(by, draft_id) == message

    @pytest.mark.parametrize("text", ["text", ""])
    async def test_writer_whose_stream_is_open(
        self, api: Api, another_server: Api, expire: Expire, text: str
    ) -> None:
        """It is told without asking, on whatever server the draft was finished."""
        session = await api.session()
        for by in (api, another_server):
            async with writing(by, session.id) as stream:
                await stream.write(text)
                await expire(stream.draft_id)
                async with asyncio.timeout(3):
                    message = await stream.until_stopped()
            assert (message.content, message.state) == (text, INCOMPLETE if text else 0)

    async def test_writer_that_comes_back_in_the_last_moment(
        self, api: Api, another_server: Api, expire: Expire
    ) -> None:
        """It takes the draft over, or gets the message: in both cases nothing is lost."""
        for number in range(10):
            session = await api.session()
            draft_id = await leave_draft(api, session.id, "text")
            by = (api, another_server)[number % 2]
            async with unstarted(by) as stream:
                await asyncio.gather(
                    expire(draft_id), stream.send(start=a_start(session.id, draft_id))
                )
                response = await stream.next()
                if response.HasField("started"):
                    await stream.append(" and more")
                    await stream.send(finish={})
                    while (response := await stream.next()).HasField("written"):
                        pass
                ended = response.finished if response.HasField("finished") else response.stopped
                message = ended.message
            assert message.content in ("text", "text and more")
            assert message == await get_message(api, draft_id)
            assert await get_revision(api, session.id) == 1


class TestManyLostWriters:
    """All writers of a server are lost at once when it dies."""

    async def test_few_transactions_finish_their_drafts(
        self, api: Api, other: Api, expire: Expire, database: str
    ) -> None:
        """Of several tenants and sessions. In each session the oldest draft comes first."""
        texts = {api: ["one", "", "two", "three"], other: ["four", "five", "", "six"]}
        sessions = [(by, (await by.session()).id) for by in (api, other) for _ in range(3)]
        ids: list[str] = []
        for by, session_id in sessions:
            ids += [await leave_draft(by, session_id, text) for text in texts[by]]
        await expire(*ids)
        for by, session_id in sessions:
            await wait_until_ended(by, session_id)
            messages = [m for batch in await batches(by, session_id) for m in batch.messages]
            assert [message.content for message in messages] == [text for text in texts[by] if text]
            assert all(message.state == INCOMPLETE for message in messages)
            assert await get_revision(by, session_id) == 3
        with psycopg.connect(database) as connection:
            cursor = connection.execute(
                "SELECT count(*), count(DISTINCT xmin::text) FROM chat_messages"
                " WHERE id = ANY (%s::uuid[])",
                [ids],
            )
            [(count, transactions)] = cursor
        assert count == 18
        assert transactions < 9

    async def test_session_that_somebody_holds_up(
        self, api: Api, expire: Expire, database: str
    ) -> None:
        """The drafts of other sessions do not wait for it, and its own end afterwards."""
        sessions = [(await api.session()).id for _ in range(8)]
        ids = [await leave_draft(api, session_id, "text") for session_id in sessions]
        held, free = sessions[::2], sessions[1::2]
        with psycopg.connect(database) as connection:
            lock = "SELECT FROM chat_sessions WHERE id = ANY (%s::uuid[]) FOR UPDATE"
            connection.execute(lock, [held])
            await expire(*ids)
            for session_id in free:
                await wait_until_ended(api, session_id)
            for session_id in held:
                assert len(await list_drafts(api, session_id)) == 1
        for session_id in held:
            await wait_until_ended(api, session_id)
        for draft_id in ids:
            assert (await get_message(api, draft_id)).state == INCOMPLETE


async def test_lease_in_real_time(impatient: Api) -> None:
    """The draft of a silent writer ends after its lease, and one that is renewed does not.

    The lease begins anew with each text, renewal and takeover. It is over for an open stream and
    for a broken one alike.
    """
    session = await impatient.session()

    async def silent() -> None:
        async with writing(impatient, session.id) as stream:
            await stream.write("silent")
            began = time.monotonic()
            assert (await stream.until_stopped()).state == INCOMPLETE
            assert 0.9 < time.monotonic() - began < 6

    async def broken() -> None:
        draft_id = await leave_draft(impatient, session.id, "broken")
        began = time.monotonic()
        async with asyncio.timeout(8):
            while draft_id in [draft.id for draft in await list_drafts(impatient, session.id)]:
                await asyncio.sleep(0.02)
        assert 0.9 < time.monotonic() - began < 6
        assert (await get_message(impatient, draft_id)).state == INCOMPLETE

    async def renewed() -> None:
        async with writing(impatient, session.id) as stream:
            for _ in range(7):
                await stream.append("")
                await asyncio.sleep(0.25)
            await stream.append("renewed")
            assert (await stream.finish()).content == "renewed"

    async def resumed() -> None:
        draft_id = an_id()
        for _ in range(7):
            async with writing(impatient, session.id, draft_id):
                await asyncio.sleep(0.25)
        assert (await get_draft(impatient, draft_id)).content == ""

    await asyncio.gather(silent(), broken(), renewed(), resumed())


async def test_drafts_that_cannot_be_finished(
    start_server: Callable[..., Awaitable[Api]],
    fresh_database: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However many there are, the servers try again at the next sweep, and not all the time."""
    attempts = 0

    async def fail(*arguments: object, **_: object) -> None:
        nonlocal attempts
        attempts += session.id in str(arguments)
        raise errors.UnavailableError("the database is read-only", reason="DATABASE_READ_ONLY")

    monkeypatch.setattr(draft_expiry, "MAX_EXPIRED", 1)
    monkeypatch.setattr(draft_expiry, "SWEEP_SECONDS", 0.2)
    # No other server looks for the drafts of this database.
    api = await start_server(fresh_database, draft_seconds=1)
    session = await api.session()
    with monkeypatch.context() as patch:
        patch.setattr(expired_drafts, "finish", fail)
        patch.setattr(drafts, "finish", fail)
        await leave_draft(api, session.id, "text")
        await asyncio.sleep(2)
    assert 0 < attempts < 50
    await wait_until_ended(api, session.id)


async def test_writer_whose_text_waits_for_the_rate(
    start_server: Callable[..., Awaitable[Api]], database: str
) -> None:
    """It is not lost, although nothing of its text is stored for longer than its lease."""
    quotas = {"tenant_draft_bytes_per_second": 10_000}
    api = await start_server(database, quotas=quotas, draft_seconds=1)
    session = await api.session()
    async with writing(api, session.id) as stream:
        began = time.monotonic()
        await stream.append("x" * 50_000)
        await stream.until_written(50_000)
        assert time.monotonic() - began > 3
