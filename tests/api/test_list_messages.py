"""ListChatMessages: a stream that ends."""

import asyncio
from typing import Any

import psycopg
import pytest
from grpc import StatusCode
from support.client import Api, a_file, an_id, refused
from support.cluster import Cluster
from support.messages import ASSISTANT, USER, batches, read_rest, sequences, session_with_messages

from chat_ticket.v1.chat_message_pb2 import (
    CHAT_MESSAGE_ORDER_ASC,
    CHAT_MESSAGE_ORDER_DESC,
    DeleteChatMessageRequest,
    GetChatMessageRequest,
    ListChatMessagesRequest,
    ListChatMessagesResponse,
)
from chat_ticket.v1.chat_session_pb2 import DeleteChatSessionRequest, GetChatSessionRequest


async def test_session_comes_first_and_once(api: Api) -> None:
    """The first response has the session, as it was when the call began."""
    session_id = await session_with_messages(api, 40)
    first, *rest = await batches(api, session_id)
    request = GetChatSessionRequest(session_id=session_id)
    assert first.session == (await api.sessions.GetChatSession(request)).session
    assert rest
    assert not any(response.HasField("session") for response in rest)


async def test_listed_messages_equal_those_of_get(api: Api, database: str) -> None:
    """Byte for byte, for all lengths: the list writes the wire format itself."""
    session = await api.session()
    file = a_file(file_name="ä" * 100, file_url="https://files.example/" + "x" * 1500)
    created = [
        await api.message(session.id, content, role=role, metadata_json=metadata, attachments=files)
        for content, role, metadata, files in (
            ("x", USER, "", []),
            ("x" * 127, ASSISTANT, '{"a": 1}', []),
            ("x" * 128, USER, "{}", [file]),
            ("ä" * 1000, USER, '{"b": "%s"}' % ("y" * 127), [file] * 20),
            ("x" * 16383, ASSISTANT, "", []),
            ("x" * 16384, USER, '{"c": "%s"}' % ("z" * 16384), [a_file()]),
            ("x" * 262144, USER, '{"d": "%s"}' % ("z" * 65000), []),
            ('"\\{},NULL\x01\u202e😀', USER, "", []),
        )
    ]
    # As old and as new as the database takes, and with numbers of every length.
    times = (
        "2000-01-01",
        "1970-01-01 00:00:01",
        "9999-12-31 23:59:59.999999",
        "2026-01-01 0:0:0.0001",
    )
    numbers = (200, 16383, 16384, 2097152, 268435455, 268435456, 34359738368, 2**62)
    async with await psycopg.AsyncConnection.connect(database, autocommit=True) as connection:
        await connection.execute(
            "UPDATE chat_sessions SET revision = %s WHERE tenant_id = %s", (2**62, api.tenant)
        )
        await connection.execute("ALTER TABLE chat_messages DISABLE TRIGGER USER")
        for index, (message, number) in enumerate(zip(created, numbers, strict=True)):
            await connection.execute(
                "UPDATE chat_messages SET sequence = %s, revision = %s, created_at = %s"
                " WHERE tenant_id = %s AND id = %s",
                (number, number + index % 2, times[index % 4], api.tenant, message.id),
            )
        await connection.execute("ALTER TABLE chat_messages ENABLE TRIGGER USER")
    stored = [
        (await api.messages.GetChatMessage(GetChatMessageRequest(message_id=message.id))).message
        for message in created
    ]
    assert [message.sequence for message in stored] == list(numbers)
    call = api.channel.unary_stream("/chat_ticket.v1.ChatMessageService/ListChatMessages")
    request = ListChatMessagesRequest(session_id=session.id).SerializeToString()
    listed = []
    async for data in call(request, metadata=[("x-tenant-id", api.tenant)]):
        response = ListChatMessagesResponse.FromString(data)
        assert response.SerializeToString() == data
        listed += response.messages
    assert listed == stored


async def test_large_messages_come_in_small_batches(api: Api) -> None:
    """A megabyte each at most, among small ones too, and in either order."""
    session = await api.session()
    for size in (10, 2000, 200_000, 200_000, 10, 3000, *[250_000] * 6, 10):
        await api.message(session.id, "x" * size)
    for order in (CHAT_MESSAGE_ORDER_ASC, CHAT_MESSAGE_ORDER_DESC):
        found = await batches(api, session.id, order=order)
        assert max(response.ByteSize() for response in found) < 1.1 * 2**20
        listed = [message.sequence for response in found for message in response.messages]
        assert listed == sorted(range(1, 14), reverse=order == CHAT_MESSAGE_ORDER_DESC)
    assert len(await sequences(api, session.id, limit=9)) == 9


async def test_empty_session_is_one_response(api: Api) -> None:
    """The response has the session even without messages."""
    session = await api.session()
    [response] = await batches(api, session.id)
    assert response == ListChatMessagesResponse(session=session)


async def test_listed_messages_are_complete(api: Api) -> None:
    """With content, metadata and attachments: the seeds' queries 1 and 2 in one call."""
    session = await api.session()
    created = [
        await api.message(session.id, "one", metadata_json='{"a": 1}'),
        await api.message(session.id, "two", attachments=[a_file(), a_file(file_name="b")]),
    ]
    [response] = await batches(api, session.id)
    assert list(response.messages) == created


async def test_batches_double_from_small_to_500(api: Api) -> None:
    """The first batch is small, so that it arrives soon; none has more than 500 messages."""
    session_id = await session_with_messages(api, 1700)
    sizes = [len(response.messages) for response in await batches(api, session_id)]
    assert sizes == [32, 64, 128, 256, 500, 500, 220]


async def test_a_large_message_among_small_ones_is_in_its_place(api: Api) -> None:
    """Two batches of small messages are read at once, and a message may not fit in with them."""
    session_id = await session_with_messages(api, 2100)
    await api.message(session_id, "x" * 1000)
    await api.message(session_id, "y")
    for order in (CHAT_MESSAGE_ORDER_ASC, CHAT_MESSAGE_ORDER_DESC):
        found = await batches(api, session_id, order=order)
        listed = [message for response in found for message in response.messages]
        expected = sorted(range(1, 2103), reverse=order == CHAT_MESSAGE_ORDER_DESC)
        assert [message.sequence for message in listed] == expected
        assert all(message.content for message in listed)
        assert max(len(response.messages) for response in found) == 500


async def test_batch_is_at_most_1_mib(api: Api) -> None:
    """Large messages come in smaller batches, the largest alone, none lost."""
    session = await api.session()
    contents = ["a" * 200_000] * 7 + ["b" * 256 * 1024] * 5 + ["c"] * 3
    for content in contents:
        await api.message(session.id, content, metadata_json='{"a": 1}')
    responses = await batches(api, session.id)
    assert all(response.ByteSize() <= 1024 * 1024 for response in responses)
    listed = [message.content for response in responses for message in response.messages]
    assert listed == contents


async def test_every_range_order_limit_and_role(api: Api) -> None:
    """after and before are exclusive; limit counts; roles filter; both orders."""
    session_id = await session_with_messages(api, 100)
    everything = list(range(1, 101))
    for fields, expected in (
        ({}, everything),
        ({"order": CHAT_MESSAGE_ORDER_DESC}, everything[::-1]),
        ({"after_sequence": 60}, list(range(61, 101))),
        ({"before_sequence": 41}, list(range(1, 41))),
        ({"after_sequence": 10, "before_sequence": 12}, [11]),
        ({"after_sequence": 10, "before_sequence": 11}, []),
        ({"after_sequence": 100}, []),
        ({"after_sequence": 2**63 - 1}, []),
        ({"limit": 1}, [1]),
        ({"limit": 32}, everything[:32]),
        ({"limit": 33}, everything[:33]),
        ({"limit": 1000}, everything),
        ({"limit": 5, "order": CHAT_MESSAGE_ORDER_DESC}, [100, 99, 98, 97, 96]),
        (
            {"limit": 40, "order": CHAT_MESSAGE_ORDER_DESC, "before_sequence": 90},
            list(range(89, 49, -1)),
        ),
        ({"roles": [USER]}, everything[::2]),
        ({"roles": [USER, ASSISTANT]}, everything),
        ({"roles": [ASSISTANT], "limit": 3, "after_sequence": 50}, [52, 54, 56]),
    ):
        assert await sequences(api, session_id, **fields) == expected, fields


async def test_end_is_fixed_when_the_call_begins(api: Api) -> None:
    """Messages that are appended while the caller reads are not in the list."""
    session_id = await session_with_messages(api, 300)
    request = ListChatMessagesRequest(session_id=session_id)
    listed = []
    async for response in api.messages.ListChatMessages(request):
        listed += [message.sequence for message in response.messages]
        await api.message(session_id)
    assert listed == list(range(1, 301))


async def test_resume_after_a_break(api: Api) -> None:
    """Called again after the last sequence received, nothing repeats and nothing is missing."""
    session_id = await session_with_messages(api, 200)
    call = api.messages.ListChatMessages(ListChatMessagesRequest(session_id=session_id))
    received = [message.sequence for message in (await call.read()).messages]
    call.cancel()
    received += await sequences(api, session_id, after_sequence=received[-1])
    assert received == list(range(1, 201))


async def test_deleted_messages_leave_gaps(api: Api) -> None:
    """Sequences are never reused."""
    session = await api.session()
    messages = [await api.message(session.id) for _ in range(3)]
    await api.messages.DeleteChatMessage(DeleteChatMessageRequest(message_id=messages[1].id))
    await api.message(session.id)
    assert await sequences(api, session.id) == [1, 3, 5]


async def test_session_deleted_in_the_middle_is_not_a_short_list(api: Api) -> None:
    """What could not be read is not passed over: the stream ends with NOT_FOUND."""
    session_id = await session_with_messages(api, 3000, "x" * 2000)
    call = api.messages.ListChatMessages(ListChatMessagesRequest(session_id=session_id))
    await call.read()
    await api.sessions.DeleteChatSession(DeleteChatSessionRequest(session_id=session_id))
    with refused(StatusCode.NOT_FOUND, "CHAT_SESSION_NOT_FOUND"):
        await read_rest(call)


async def test_absent_and_foreign_are_not_found(api: Api, other: Api) -> None:
    """Nobody reads another tenant's messages."""
    theirs = await session_with_messages(other, 1)
    for session_id in (theirs, an_id()):
        with refused(StatusCode.NOT_FOUND, "CHAT_SESSION_NOT_FOUND"):
            await batches(api, session_id)


async def test_bad_fields_are_rejected_together(api: Api) -> None:
    """Negative numbers and unknown enum values, in one answer."""
    fields = {"after_sequence": -1, "before_sequence": -1, "limit": -1, "order": 9, "roles": [7]}
    with refused(StatusCode.INVALID_ARGUMENT) as refusal:
        await batches(api, "x", **fields)
    assert set(refusal.fields) == {"session_id", *(set(fields) - {"roles"}), "roles[0]"}


async def test_stream_uses_no_connection_while_the_caller_reads(
    start_server: Any, fresh_database: str
) -> None:
    """With one connection in the pool, slow readers do not block other calls."""
    api = await start_server(fresh_database, pool_size=1)
    session_id = await session_with_messages(api, 5000, "x" * 1000)
    calls = [
        api.messages.ListChatMessages(ListChatMessagesRequest(session_id=session_id))
        for _ in range(3)
    ]
    for call in calls:
        await call.read()
    await asyncio.sleep(0.5)
    assert (await api.message(session_id)).sequence == 5001
    for call in calls:
        call.cancel()


async def test_slow_reader_is_disconnected_from_list(start_server: Any, database: str) -> None:
    """RESOURCE_EXHAUSTED after the bound, not a stream that waits for ever."""
    api = await start_server(database, stream_write_timeout_seconds=0.3)
    session_id = await session_with_messages(api, 5000, "x" * 2000)
    call = api.messages.ListChatMessages(ListChatMessagesRequest(session_id=session_id))
    await call.read()
    await asyncio.sleep(1)
    with refused(StatusCode.RESOURCE_EXHAUSTED, "SLOW_READER") as refusal:
        await read_rest(call)
    assert "RetryInfo" in refusal.details


async def test_cancellation_frees_everything(start_server: Any, fresh_database: str) -> None:
    """After many cancelled streams the one connection is there for the next call."""
    api = await start_server(fresh_database, pool_size=1)
    session_id = await session_with_messages(api, 3000, "x" * 1000)
    for _ in range(30):
        call = api.messages.ListChatMessages(ListChatMessagesRequest(session_id=session_id))
        await call.read()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call.read()
    assert len(await sequences(api, session_id)) == 3000


async def test_page_uses_the_index(api: Api, database: str) -> None:
    """A page deep in a session is read in index order, without a sort of the session."""
    from chat_ticket_svc.store import message_listing

    session_id = await session_with_messages(api, 2000)
    params = {
        "tenant_id": api.tenant,
        "session_id": session_id,
        "after": 1500,
        "before": 2001,
        "roles": None,
        "limit": 100,
        "message_bytes": message_listing.FIRST_READ_MESSAGE_BYTES,
    }
    async with await psycopg.AsyncConnection.connect(database) as connection:
        await connection.execute("ANALYZE chat_messages")
        for sql in (
            message_listing.FIRST_ASC,
            message_listing.FIRST_DESC,
            message_listing.LIST_ASC,
            message_listing.LIST_DESC,
        ):
            rows = await (await connection.execute(f"EXPLAIN {sql}", params)).fetchall()
            plan = "\n".join(row[0] for row in rows)
            assert "idx_chat_messages_session" in plan
            assert "Seq Scan on chat_messages" not in plan


def test_page_of_a_long_session_is_not_planned_each_time(cluster: Cluster) -> None:
    """PostgreSQL keeps one plan, also where a page is a small part of a session."""
    from chat_ticket_svc.store import message_listing, pipelined_connection

    statement = pipelined_connection._parse(message_listing.FIRST_ASC)
    params = {
        "tenant_id": "tenant",
        "session_id": an_id(),
        "after": 0,
        "before": 2**62,
        "roles": None,
        "limit": 64,
        "message_bytes": message_listing.FIRST_READ_MESSAGE_BYTES,
    }
    values = [params[name] for name in statement.parameter_names]
    url = cluster.create()
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("SET session_replication_role = replica")
        connection.execute(
            "INSERT INTO chat_messages (tenant_id, session_id, sequence, revision, role, content)"
            " SELECT 'tenant', %s::uuid, n, n, 'user', 'x' FROM generate_series(1, 5000) AS n",
            [params["session_id"]],
        )
        connection.execute("ANALYZE chat_messages")
        connection.pgconn.prepare(b"page", statement.sql)
        for _ in range(8):
            connection.pgconn.exec_prepared(
                b"page", [None if value is None else str(value).encode() for value in values]
            )
        [plans] = connection.execute(
            "SELECT generic_plans FROM pg_prepared_statements WHERE name = 'page'"
        )
    cluster.drop(url)
    assert plans == (3,), "PostgreSQL plans the first five for their values"


def test_no_attachments_of_others_are_read(cluster: Cluster) -> None:
    """Also by the plan that is kept, when most attachments are those of another tenant."""
    from chat_ticket_svc.store import message_listing, pipelined_connection

    statement = pipelined_connection._parse(message_listing.LIST_ASC)
    url = cluster.create()
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("SET session_replication_role = replica")
        connection.execute(
            "INSERT INTO chat_attachments (tenant_id, message_id, file_url, file_name, file_type)"
            " SELECT 'other', gen_random_uuid(), 'https://x', 'x', 'text/plain'"
            " FROM generate_series(1, 5000)"
        )
        connection.execute("ANALYZE chat_attachments")
        connection.execute("SET plan_cache_mode = force_generic_plan")
        connection.execute(f"PREPARE page AS {statement.sql.decode()}")  # type: ignore[arg-type]
        nulls = ", ".join("NULL" for _ in statement.parameter_names)
        rows = connection.execute(f"EXPLAIN EXECUTE page ({nulls})").fetchall()  # type: ignore[arg-type]
    cluster.drop(url)
    plan = "\n".join(row[0] for row in rows)
    assert "on chat_attachments" in plan
    assert "Seq Scan on chat_attachments" not in plan
