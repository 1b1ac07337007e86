"""WatchChatSessions: where a stream begins, what it tells, and where it resumes."""

import contextlib
from collections.abc import Awaitable, Iterator
from typing import Any

import psycopg
import pytest
from grpc import StatusCode
from support.attachments import delete_attachment, update_attachment
from support.client import Api, a_file, refused
from support.database import execute
from support.drafts import write_message
from support.feeds import caught_up_feed, following_feed, position_of, until_xmin_passes
from support.messages import (
    create_batch,
    delete_message,
    redact_message,
    set_metadata,
    user_message,
)
from support.sessions import (
    ACTIVE,
    RESOLVED,
    delete_session,
    get_session,
    set_status,
    update_session,
)
from support.tickets import (
    SOLVED,
    create_ticket,
    delete_ticket,
    get_ticket,
    unlink,
    update_ticket,
)

from chat_ticket.v1 import resources_pb2 as r
from chat_ticket.v1.chat_session_pb2 import ListChatSessionsRequest
from chat_ticket.v1.chat_ticket_pb2 import ListTicketsRequest
from chat_ticket_svc.watch import change_feed

pytestmark = pytest.mark.usefixtures("feed_turn")


class TestBegin:
    async def test_from_now(self, api: Api) -> None:
        """Nothing of what was there, and everything that changes then."""
        before = await api.session()
        await create_ticket(api)
        async with caught_up_feed(api) as first:
            await first.settle(api)  # so that no transaction is older than `before`
            async with following_feed(api) as feed:
                await feed.until("caught_up")
                assert feed.told == [("caught_up", "")]
                changed = await set_status(api, before.id, RESOLVED)
                created = await api.session()
                assert {*await feed.settle(api)} == {
                    ("caught_up", ""),
                    ("session", before.id),
                    ("session", created.id),
                }
        assert feed.sessions == {before.id: changed, created.id: created}

    async def test_from_the_beginning(self, api: Api, other: Api, database: str) -> None:
        """All sessions and tickets that exist, each once. Those that are gone are not named."""
        sessions = [await api.session(title=f"Session {n}") for n in range(5)]
        link = await api.escalate(sessions[0].id)
        ticket = await create_ticket(api)
        gone, gone_ticket = await api.session(), await create_ticket(api)
        await delete_session(api, gone.id)
        await delete_ticket(api, gone_ticket.id)
        last = await other.session()
        # Otherwise a transaction of another test would hold up the last changes, the deletions too.
        await until_xmin_passes(database, await position_of(database, last.id))
        async with caught_up_feed(api, from_beginning=True) as feed:
            assert feed.sessions == {
                session.id: await get_session(api, session.id) for session in sessions
            }
            assert feed.tickets == {
                link.ticket_id: await get_ticket(api, link.ticket_id),
                ticket.id: ticket,
            }
            assert len(feed.told) == 5 + 2 + 1
            assert feed.told[-1] == ("caught_up", "")

    async def test_of_a_tenant_that_has_nothing(self, api: Api) -> None:
        """It has caught up at once, and tells what comes first."""
        async with caught_up_feed(api, from_beginning=True) as feed:
            assert feed.told == [("caught_up", "")]
            session = await api.session()
            await feed.until("session", session.id)

    async def test_has_caught_up_once(self, api: Api) -> None:
        """In every stream, wherever it begins."""
        session = await api.session()
        cursor = ""
        for fields in ({}, {"from_beginning": True}, {"cursor": "the last"}):
            if fields.get("cursor"):
                fields = {"cursor": cursor}
            async with caught_up_feed(api, **fields) as feed:
                await api.message(session.id)
                assert (await feed.settle(api)).count(("caught_up", "")) == 1
                cursor = feed.cursor


async def test_every_change_of_a_session_is_told(api: Api) -> None:
    """Of the session, of what is in it, and of its ticket: with the session as it is then."""
    session_id = (await api.session()).id
    message = await api.message(session_id, attachments=[a_file()])
    [file] = message.attachments
    ticket = await create_ticket(api)
    async with caught_up_feed(api) as feed:

        async def is_told(change: Awaitable[Any]) -> Any:
            result = await change
            session = await get_session(api, session_id)
            assert session.revision > feed.revision_of(session_id), "it is a change"
            await feed.until_revision(session)
            assert feed.sessions[session_id] == session
            return result

        await is_told(api.message(session_id))
        await is_told(create_batch(api, session_id, [user_message("x")] * 3))
        await is_told(write_message(api, session_id))
        await is_told(set_metadata(api, message.id, "{}"))
        await is_told(update_attachment(api, file.id, "https://files.example/another"))
        await is_told(api.attachment(message.id))
        await is_told(delete_attachment(api, file.id))
        await is_told(redact_message(api, message.id))
        await is_told(delete_message(api, message.id))
        await is_told(update_session(api, session_id, "title", title="A title"))
        await is_told(update_session(api, session_id, "labels.a", labels={"a": "b"}))
        await is_told(set_status(api, session_id, RESOLVED))
        link = await is_told(api.escalate(session_id, ticket_id=ticket.id))
        await is_told(update_ticket(api, ticket.id, status=SOLVED))
        await is_told(unlink(api, link.id))
        await delete_session(api, session_id)
        await feed.until("session_deleted", session_id)


async def test_every_change_of_a_ticket_is_told(api: Api) -> None:
    """With the ticket as it is then, whether a session has it or not."""
    session = await api.session()
    async with caught_up_feed(api) as feed:
        alone = await create_ticket(api)
        await feed.until("ticket", alone.id)
        assert feed.tickets[alone.id] == alone
        linked = (await api.escalate(session.id)).ticket
        await feed.until("ticket", linked.id)
        for ticket in (alone, linked):
            changed = await update_ticket(api, ticket.id, status=SOLVED, title="Another")
            while feed.tickets[ticket.id] != changed:
                await feed.next()
        await delete_ticket(api, alone.id)
        await feed.until("ticket_deleted", alone.id)


async def test_several_changes_are_told_as_the_last(api: Api, other: Api) -> None:
    """A follower that was away learns what there is now, and each thing once."""
    session = await api.session()
    gone = await api.session()
    async with caught_up_feed(api) as feed:
        await feed.settle(api)
    for _ in range(5):
        await api.message(session.id)
    short = await api.session()
    for each in (gone, short):
        await api.message(each.id)
        await delete_session(api, each.id)
    async with caught_up_feed(api, feed.cursor) as feed:
        assert sorted(feed.told[:-1]) == sorted(
            [
                ("session", session.id),
                ("session_deleted", gone.id),
                ("session_deleted", short.id),
            ]
        )
        assert feed.revision_of(session.id) == 5


class TestResume:
    async def test_after_any_response(
        self, api: Api, database: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A follower that resumes after any response of a stream comes to the same state.

        In the middle of what was there at the beginning too, and whatever has changed meanwhile:
        what it was told and what it was not.
        """
        monkeypatch.setattr(change_feed, "PAGE_ROWS", 7)
        execute(
            database,
            f"INSERT INTO chat_sessions (tenant_id) SELECT '{api.tenant}'"
            "  FROM generate_series(1, 30)",
            f"INSERT INTO tickets (tenant_id, title) SELECT '{api.tenant}', 'help'"
            "  FROM generate_series(1, 20)",
        )
        sessions, tickets = await everything(api)
        async with caught_up_feed(api, from_beginning=True) as whole:
            pass
        assert len(whole.responses) > 5
        for number, session_id in enumerate(list(sessions)[:10]):
            await (delete_session(api, session_id) if number % 2 else api.message(session_id))
        for number, ticket_id in enumerate(list(tickets)[:6]):
            if number % 2:
                await delete_ticket(api, ticket_id)
            else:
                await update_ticket(api, ticket_id, status=SOLVED)
        new, now = await api.session(), await everything(api)
        for broken_after in range(len(whole.responses)):
            before = whole.responses[: broken_after + 1]
            async with following_feed(api, before[-1].cursor) as feed:
                feed.apply(*before)
                feed.told.clear()
                await feed.until("caught_up")
                assert (feed.sessions, feed.tickets) == now, broken_after
                assert ("session", new.id) in feed.told

    async def test_of_a_stream_that_tells_nothing(self, api: Api) -> None:
        """After the cursor of `caught_up` and of a heartbeat, what changes then is told."""
        async with caught_up_feed(api) as feed:
            pass
        session = await api.session()
        async with caught_up_feed(api, feed.cursor) as feed:
            assert feed.sessions == {session.id: session}

    async def test_twice_after_one_cursor(self, api: Api) -> None:
        """A cursor is not used up: two programs can resume after the same one."""
        async with caught_up_feed(api) as feed:
            pass
        session = await api.session()
        for _ in range(2):
            async with caught_up_feed(api, feed.cursor) as feed_again:
                assert [*feed_again.sessions] == [session.id]


@contextlib.contextmanager
def running_transaction(database: str, tenant: str) -> Iterator[None]:
    """A transaction that has written, and does not end."""
    with psycopg.connect(database) as connection:
        connection.execute("INSERT INTO tickets (tenant_id, title) VALUES (%s, 'x')", [tenant])
        yield
        connection.rollback()


@pytest.mark.holds_up_feeds
class TestRunningTransaction:
    """It holds up what begins after it, and nothing else."""

    async def test_session_that_changes_again_is_told(self, api: Api, database: str) -> None:
        """Its first change was before, although its last change is held up."""
        session = await api.session()
        async with caught_up_feed(api) as feed:
            await feed.settle(api)
        await api.message(session.id)
        with running_transaction(database, api.tenant):
            await api.message(session.id)
            async with following_feed(api, feed.cursor) as again:
                await again.until("session", session.id)

    async def test_session_that_has_left_is_named(self, api: Api, database: str) -> None:
        """It left before, although its last change is held up."""
        session = await api.session()
        async with caught_up_feed(api, statuses=[ACTIVE]) as feed:
            await feed.settle(api)
        await set_status(api, session.id, RESOLVED)
        with running_transaction(database, api.tenant):
            await api.message(session.id)
            async with following_feed(api, feed.cursor, statuses=[ACTIVE]) as again:
                await again.until("left", session.id)

    async def test_change_that_was_told_is_not_repeated(self, api: Api, database: str) -> None:
        """A session leaves once, although it is told while its change is held up."""
        session = await api.session()
        async with contextlib.AsyncExitStack() as stack:
            with contextlib.ExitStack() as newer:
                with running_transaction(database, api.tenant):
                    feed = await stack.enter_async_context(caught_up_feed(api, statuses=[ACTIVE]))
                    newer.enter_context(running_transaction(database, api.tenant))
                    await set_status(api, session.id, RESOLVED)
                await feed.until("left", session.id)
            await feed.settle(api)
        events = [event for response in feed.responses for event in response.events]
        assert [event.left.session_id for event in events if event.HasField("left")] == [session.id]

    async def test_what_the_beginning_told_is_not_repeated(self, api: Api, database: str) -> None:
        """A stream from the beginning tells a session once, although its creation is held up."""
        other = await api.session()
        async with contextlib.AsyncExitStack() as stack:
            with running_transaction(database, api.tenant):
                session, resolved = await api.session(), await api.session()
                await set_status(api, resolved.id, RESOLVED)
                feed = await stack.enter_async_context(
                    following_feed(api, from_beginning=True, statuses=[ACTIVE])
                )
                await feed.until("session", session.id)
            await feed.settle(api)
        events = [event for response in feed.responses for event in response.events]
        told = [event.session.id for event in events if event.HasField("session")]
        assert sorted(told) == sorted([other.id, session.id])
        assert not any(event.HasField("left") for event in events), "it was never told"


async def everything(api: Api) -> tuple[dict[str, r.ChatSession], dict[str, r.Ticket]]:
    """All sessions and tickets of a tenant."""
    sessions = await api.sessions.ListChatSessions(ListChatSessionsRequest(page_size=1000))
    tickets = await api.tickets.ListTickets(ListTicketsRequest(page_size=1000))
    return (
        {session.id: session for session in sessions.sessions},
        {ticket.id: ticket for ticket in tickets.tickets},
    )


async def violations_of(api: Api, **fields: Any) -> list[str]:
    """The fields that are wrong."""
    with refused(StatusCode.INVALID_ARGUMENT) as refusal:
        async with following_feed(api, **fields) as feed:
            await feed.next()
    return list(refusal.fields)


class TestBadInput:
    async def test_violations_are_reported_together(self, api: Api) -> None:
        """Of each filter, as in ListChatSessions."""
        labels = {"Upper": "", "a": "v" * 256, "b": "\t"}
        fields = {"statuses": [0, 99], "user_id": "a\nb", "labels": labels, "cursor": "x"}
        assert sorted(await violations_of(api, **fields)) == [
            "cursor",
            "labels[Upper]",
            "labels[a]",
            "labels[b]",
            "statuses[0]",
            "statuses[1]",
            "user_id",
        ]

    async def test_filters_have_limits(self, api: Api) -> None:
        """Of labels, statuses and the user."""
        labels = {str(n): "" for n in range(5)}
        assert await violations_of(api, labels=labels) == ["labels"]
        assert await violations_of(api, statuses=[1] * 21) == ["statuses"]
        assert await violations_of(api, user_id="x" * 256) == ["user_id"]

    async def test_begins_in_one_way(self, api: Api) -> None:
        """A stream does not begin after a cursor and at the beginning."""
        async with caught_up_feed(api) as feed:
            pass
        fields = {"cursor": feed.cursor, "from_beginning": True}
        assert await violations_of(api, **fields) == ["from_beginning"]

    async def test_cursor_is_of_its_filters(self, api: Api) -> None:
        """That of one stream is no cursor of another one."""
        filters = {"statuses": [1], "user_id": "ann", "labels": {"a": "1", "b": "2"}}
        async with caught_up_feed(api, **filters) as feed:
            pass
        for changed in (
            {"statuses": [2]},
            {"statuses": []},
            {"has_ticket": False},
            {"user_id": "bob"},
            {"labels": {"a": "2", "b": "1"}},
            {"labels": {}},
        ):
            fields = {**filters, **changed, "cursor": feed.cursor}
            assert await violations_of(api, **fields) == ["cursor"], changed
        same = {**filters, "labels": {"b": "2", "a": "1"}}
        async with caught_up_feed(api, feed.cursor, **same):
            pass

    async def test_damaged_cursor(self, api: Api) -> None:
        """Each byte of it counts."""
        async with caught_up_feed(api) as feed:
            pass
        cursor = feed.cursor
        for damaged in (cursor[:-1], cursor + "A", cursor[::-1], cursor.upper(), "x" * 8193):
            assert await violations_of(api, cursor=damaged) == ["cursor"], damaged
