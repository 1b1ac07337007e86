"""In which order things come, and on which page: every list, every token, every batch."""

import base64
import itertools
from typing import Any

import pytest
from grpc import StatusCode
from support.attachments import delete_attachment
from support.client import Api, a_file, an_id, refused
from support.database import execute
from support.messages import (
    ASSISTANT,
    USER,
    batches,
    create_batch,
    delete_message,
    get_message,
    sequences,
    session_with_messages,
    set_metadata,
    user_message,
)
from support.sessions import RESOLVED, get_session, set_status
from support.watching import watching

from chat_ticket.v1 import resources_pb2 as r
from chat_ticket.v1.chat_attachment_pb2 import (
    ListChatAttachmentsRequest,
)
from chat_ticket.v1.chat_message_pb2 import (
    CHAT_MESSAGE_ORDER_DESC,
    SearchChatMessagesRequest,
)
from chat_ticket.v1.chat_session_pb2 import (
    CHAT_SESSION_ORDER_CREATE_TIME,
    CHAT_SESSION_ORDER_UPDATE_TIME,
    ListChatSessionsRequest,
)
from chat_ticket.v1.chat_ticket_pb2 import (
    ListChatTicketsRequest,
    ListTicketsRequest,
)
from chat_ticket_svc.services import paging


async def test_newest_first_filters_like_oldest_first(api: Api) -> None:
    """Both orders have the same range, roles and empty answer."""
    session_id = await session_with_messages(api, 100)
    for fields in (
        {"after_sequence": 60},
        {"before_sequence": 41},
        {"after_sequence": 10, "before_sequence": 12},
        {"after_sequence": 100},
        {"roles": [USER]},
        {"roles": [ASSISTANT], "after_sequence": 50, "before_sequence": 60},
    ):
        expected = (await sequences(api, session_id, **fields))[::-1]
        found = await sequences(api, session_id, order=CHAT_MESSAGE_ORDER_DESC, **fields)
        assert found == expected, fields
    session = await api.session()
    [response] = await batches(api, session.id, order=CHAT_MESSAGE_ORDER_DESC)
    assert response.session == session


@pytest.mark.parametrize("order", [1, 2])
async def test_batch_is_at_most_1_mib_with_all_its_parts(api: Api, order: int) -> None:
    """Content, metadata and attachments all count, in both orders; none is lost."""
    session = await api.session()
    files = [a_file(file_url="https://files.example/" + "a" * 2000)] * 20
    for _ in range(14):
        await api.message(session.id, metadata_json='{"a": "' + "b" * 60_000 + '"}')
        await api.message(session.id, attachments=files)
        await api.message(session.id, "c" * 100_000)
    responses = await batches(api, session.id, order=order)
    assert all(response.ByteSize() <= 1024 * 1024 for response in responses)
    listed = [message.sequence for response in responses for message in response.messages]
    assert sorted(listed) == list(range(1, 43))
    assert listed in (sorted(listed), sorted(listed)[::-1])


async def test_message_over_1_mib_is_a_batch_of_its_own(start_server: Any, database: str) -> None:
    """Where the limits are raised, one message may be more than a batch: it is not passed over."""
    api = await start_server(database, limits={"content_bytes": 2 * 1024 * 1024})
    session = await api.session()
    for content in ("small", "x" * 1_500_000, "small"):
        await api.message(session.id, content)
    for order in (1, 2):
        assert len(await sequences(api, session.id, order=order)) == 3
    async with watching(api, session.id) as watcher:
        await watcher.until("caught_up")
        assert watcher.created == [1, 2, 3]


async def test_order_does_not_come_from_an_index_by_luck(
    start_server: Any, fresh_database: str
) -> None:
    """Rows that lie in any order, and are read without an index, come in the right one."""
    api = await start_server(fresh_database)
    session = await api.session()
    ids = [
        message_id
        for message_id, _ in await create_batch(api, session.id, [user_message("x")] * 140)
    ]
    for message_id in ids[60::-1]:
        await set_metadata(api, message_id, "{}")  # revisions 141 to 201
    for message_id in ids[:100:-1]:
        await delete_message(api, message_id)  # 202 to 240
    await create_batch(api, session.id, [user_message("x")] * 40)  # 241 to 280
    for table, key in (("chat_messages", "id"), ("chat_message_tombstones", "message_id")):
        execute(
            fresh_database,
            f"CREATE INDEX shuffled ON {table} (md5({key}::text))",
            f"CLUSTER {table} USING shuffled",
            "DROP INDEX shuffled",
        )
    for kind in ("indexscan", "indexonlyscan", "bitmapscan"):
        execute(
            fresh_database,
            "DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET"
            f" enable_{kind} = off', current_database()); END $$",
        )
    api = await start_server(fresh_database)
    there = [*range(1, 102), *range(241, 281)]
    assert await sequences(api, session.id) == there
    assert await sequences(api, session.id, order=CHAT_MESSAGE_ORDER_DESC) == there[::-1]
    async with watching(api, session.id) as watcher:
        await watcher.until("caught_up")
        assert watcher.created == there
    async with watching(api, session.id, after=140) as watcher:
        watcher.messages = {message_id: r.ChatMessage() for message_id in ids}
        delivered: dict[str, list[int]] = {}
        while "caught_up" not in watcher.kinds:
            revision = (await watcher.next()).revision
            delivered.setdefault(watcher.kinds[-1], []).append(revision)
        assert delivered["message_updated"] == list(range(141, 202))
        assert delivered["message_deleted"] == list(range(202, 241))
        assert watcher.created == list(range(241, 281))
    async with watching(api, session.id, after=201) as watcher:
        events = [await watcher.next() for _ in range(40)]
        assert [event.revision for event in events[1:]] == list(range(202, 241))


async def test_rows_of_one_microsecond_are_on_one_page_each(
    start_server: Any, fresh_database: str
) -> None:
    """Where times are equal the ids decide: every list meets each row once."""
    api = await start_server(fresh_database)
    sessions = [await api.session() for _ in range(5)]
    message = await api.message(sessions[0].id, "walnut", attachments=[a_file()] * 5)
    for session in sessions:
        await api.message(session.id, "walnut")
        ticket_id = (await api.escalate(session.id)).ticket_id
    for session in [await api.session() for _ in range(4)]:
        await api.escalate(session.id, ticket_id=ticket_id)
    for table in ("chat_sessions", "chat_messages", "chat_attachments", "tickets", "chat_tickets"):
        execute(fresh_database, f"UPDATE {table} SET created_at = '2026-01-01'")
    execute(fresh_database, "UPDATE chat_sessions SET updated_at = '2026-01-01'")
    for call, request, field, count in (
        (api.sessions.ListChatSessions, ListChatSessionsRequest(order_by=1), "sessions", 9),
        (api.sessions.ListChatSessions, ListChatSessionsRequest(order_by=2), "sessions", 9),
        (api.tickets.ListTickets, ListTicketsRequest(), "tickets", 5),
        (
            api.tickets.ListChatTickets,
            ListChatTicketsRequest(ticket_id=ticket_id),
            "chat_tickets",
            5,
        ),
        (
            api.attachments.ListChatAttachments,
            ListChatAttachmentsRequest(message_id=message.id),
            "attachments",
            5,
        ),
        (
            api.attachments.ListChatAttachments,
            ListChatAttachmentsRequest(session_id=sessions[0].id),
            "attachments",
            5,
        ),
        (api.messages.SearchChatMessages, SearchChatMessagesRequest(query="walnut"), "hits", 6),
    ):
        request.page_size, found = 2, []
        while page := await call(request):
            found += [getattr(row, "id", "") or row.message_id for row in getattr(page, field)]
            request.page_token = page.next_page_token
            if not request.page_token:
                break
        assert len(found) == len(set(found)) == count, request


async def test_token_of_another_list_is_rejected(api: Api) -> None:
    """Also where both calls have no filters and pages of the same shape."""
    for _ in range(2):
        await api.escalate((await api.session()).id)
    page = await api.tickets.ListTickets(ListTicketsRequest(page_size=1))
    with refused(StatusCode.INVALID_ARGUMENT) as refusal:
        request = ListChatSessionsRequest(page_token=page.next_page_token)
        await api.sessions.ListChatSessions(request)
    assert list(refusal.fields) == ["page_token"]


async def test_full_last_page_is_the_last(api: Api) -> None:
    """A token promises more: a page that ends where the list ends has none."""
    for _ in range(4):
        await api.session()
    for size, more in ((3, True), (4, False), (5, False)):
        page = await api.sessions.ListChatSessions(ListChatSessionsRequest(page_size=size))
        assert bool(page.next_page_token) == more


async def test_forged_token_is_rejected(api: Api) -> None:
    """Whatever a token decodes to, it is a bad field and not an internal error."""
    request = ListChatSessionsRequest()
    forged = [
        base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")
        for text in ("5", "[]", "{}", "null", "x", '"é"', "[" * 100_000)
    ]
    positions: tuple[tuple[Any, ...], ...] = (
        (),
        (1,),
        (1, an_id(), 1),
        ("1", an_id()),
        (-1, an_id()),
        (2**62, an_id()),
        (10**30, an_id()),
        (1, "x"),
        (1, 1),
    )
    forged += [paging.encode_token(api.tenant, request, *position) for position in positions]
    for token in forged:
        with refused(StatusCode.INVALID_ARGUMENT) as refusal:
            await api.sessions.ListChatSessions(ListChatSessionsRequest(page_token=token))
        assert list(refusal.fields) == ["page_token"], token[:50]


async def test_page_stops_at_1000(api: Api, database: str) -> None:
    """Whatever page_size asks for."""
    execute(
        database,
        "INSERT INTO chat_sessions (tenant_id, id)"
        f" SELECT '{api.tenant}', gen_random_uuid() FROM generate_series(1, 1001)",
    )
    page = await api.sessions.ListChatSessions(ListChatSessionsRequest(page_size=2000))
    assert len(page.sessions) == 1000
    assert page.next_page_token


async def test_order_is_of_times_not_of_ids(api: Api) -> None:
    """Ids that clients choose may be in any order: lists are in that of the creations."""
    ids = sorted(an_id() for _ in range(5))
    chosen = [ids[n] for n in (2, 4, 0, 3, 1)]
    for session_id in chosen:
        await api.session(id=session_id)
    page = await api.sessions.ListChatSessions(ListChatSessionsRequest())
    assert [session.id for session in page.sessions] == chosen[::-1]
    message = await api.message(chosen[0])
    for attachment_id in chosen:
        await api.attachment(message.id, id=attachment_id)
    files = await api.attachments.ListChatAttachments(
        ListChatAttachmentsRequest(message_id=message.id)
    )
    assert [attachment.id for attachment in files.attachments] == chosen
    tickets = [
        await api.escalate(each, chat_ticket_id=each, ticket=r.Ticket(id=each, title="x"))
        for each in chosen
    ]
    listed = await api.tickets.ListTickets(ListTicketsRequest())
    assert [ticket.id for ticket in listed.tickets] == [t.ticket_id for t in tickets[::-1]]


async def test_session_is_updated_when_its_last_row_was_created(api: Api) -> None:
    """Each row of a batch has a time of its own, and update_time is the last of them."""
    session = await api.session()
    created = await create_batch(
        api, session.id, [user_message("a"), user_message("b", attachments=[a_file()] * 3)]
    )
    first, last = [await get_message(api, message_id) for message_id, _ in created]
    rows = [first, last, *last.attachments]
    times = [row.create_time.ToNanoseconds() for row in rows]
    assert times == sorted(set(times))
    updated = (await get_session(api, session.id)).update_time.ToNanoseconds()
    assert updated == times[-1]
    assert (await api.message(session.id)).create_time.ToNanoseconds() > updated


async def test_clock_that_is_set_back(api: Api, database: str) -> None:
    """Times follow the sequence, also behind what an earlier clock has written."""
    session = await api.session()
    execute(
        database,
        "UPDATE chat_sessions SET updated_at = now() + interval '1 hour'"
        f" WHERE id = '{session.id}'",
    )
    ahead = (await get_session(api, session.id)).update_time.ToNanoseconds()
    message = await api.message(session.id)
    rows = [message, await api.attachment(message.id), await api.message(session.id)]
    times = [ahead, *(row.create_time.ToNanoseconds() for row in rows)]
    assert times == sorted(set(times))


async def test_updates_around_a_full_hour(api: Api, database: str) -> None:
    """In order and in their ranges, whichever hour an update belongs to."""
    times = [
        f"2026-01-0{day} {time}+00"
        for day, time in (
            (1, "23:59:59.999998"),
            (1, "23:59:59.999999"),
            (2, "00:00:00"),
            (2, "00:00:00.000001"),
            (2, "00:59:59.999999"),
            (2, "01:00:00"),
        )
    ]
    ids = [(await api.session()).id for _ in times]
    for session_id, time in zip(ids, times, strict=True):
        # The list relies on it that a session is created before it is updated.
        change = f"created_at = '{time}'::timestamptz - interval '1 day', updated_at = '{time}'"
        execute(database, f"UPDATE chat_sessions SET {change} WHERE id = '{session_id}'")
    updated = [(await get_session(api, session_id)).update_time for session_id in ids]
    request = ListChatSessionsRequest(page_size=2)
    for first, last in itertools.combinations(range(len(ids)), 2):
        request.start_update_time.CopyFrom(updated[first])
        request.end_update_time.CopyFrom(updated[last])
        for request.order_by in (CHAT_SESSION_ORDER_CREATE_TIME, CHAT_SESSION_ORDER_UPDATE_TIME):
            found = []
            request.page_token = ""
            for _ in ids:
                page = await api.sessions.ListChatSessions(request)
                found += [session.id for session in page.sessions]
                request.page_token = page.next_page_token
                if not request.page_token:
                    break
            assert found == ids[first:last][::-1]


async def test_every_change_moves_revision_and_update_time(api: Api) -> None:
    """One revision each, and a later time: a list by update_time misses no change."""
    session = await api.session()
    message = await api.message(session.id)
    attachment_id = an_id()
    before = await get_session(api, session.id)
    for change in (
        lambda: set_metadata(api, message.id, "{}"),
        lambda: api.attachment(message.id, id=attachment_id),
        lambda: delete_attachment(api, attachment_id),
        lambda: set_status(api, session.id, RESOLVED),
        lambda: delete_message(api, message.id),
    ):
        await change()
        after = await get_session(api, session.id)
        assert after.revision == before.revision + 1
        assert after.update_time.ToNanoseconds() > before.update_time.ToNanoseconds()
        before = after
