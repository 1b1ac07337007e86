"""`allow_missing`: a delete that can be repeated, as it is OK when there is nothing to delete."""

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable
from typing import Any

import grpc.aio
import psycopg
import pytest
from grpc import StatusCode
from support.attachments import get_attachment
from support.client import Api, an_id, refused
from support.database import execute, session_locked, terminate_at_commit, wait_for_lock_waiters
from support.messages import get_message
from support.sessions import get_session
from support.tickets import SOLVED, get_chat_ticket, get_ticket, unlink, update_ticket
from support.watching import watching

from chat_ticket.v1 import chat_session_pb2_grpc
from chat_ticket.v1.chat_attachment_pb2 import DeleteChatAttachmentRequest
from chat_ticket.v1.chat_message_pb2 import DeleteChatMessageRequest
from chat_ticket.v1.chat_session_pb2 import DeleteChatSessionRequest
from chat_ticket.v1.chat_ticket_pb2 import DeleteChatTicketRequest, DeleteTicketRequest
from chat_ticket_svc.store.transaction import Transaction


@dataclasses.dataclass(frozen=True)
class Kind:
    """How a resource is made, read and deleted, and the table that it is in."""

    table: str
    make: Callable[[Api], Awaitable[str]]
    get: Callable[[Api, str], Awaitable[Any]]
    delete: Callable[..., Awaitable[Any]]


async def a_session(api: Api) -> str:
    return (await api.session()).id


async def a_message(api: Api) -> str:
    return (await api.message(await a_session(api))).id


async def an_attachment(api: Api) -> str:
    return (await api.attachment(await a_message(api))).id


async def a_chat_ticket(api: Api) -> str:
    return (await api.escalate(await a_session(api))).id


async def a_ticket(api: Api) -> str:
    link = await api.escalate(await a_session(api))
    await unlink(api, link.id)
    return link.ticket_id


async def delete_session(api: Api, session_id: str, **fields: Any) -> Any:
    request = DeleteChatSessionRequest(session_id=session_id, **fields)
    return await api.sessions.DeleteChatSession(request)


async def delete_message(api: Api, message_id: str, **fields: Any) -> Any:
    request = DeleteChatMessageRequest(message_id=message_id, **fields)
    return await api.messages.DeleteChatMessage(request)


async def delete_attachment(api: Api, attachment_id: str, **fields: Any) -> Any:
    request = DeleteChatAttachmentRequest(attachment_id=attachment_id, **fields)
    return await api.attachments.DeleteChatAttachment(request)


async def delete_chat_ticket(api: Api, chat_ticket_id: str, **fields: Any) -> Any:
    request = DeleteChatTicketRequest(chat_ticket_id=chat_ticket_id, **fields)
    return await api.tickets.DeleteChatTicket(request)


async def delete_ticket(api: Api, ticket_id: str, **fields: Any) -> Any:
    request = DeleteTicketRequest(ticket_id=ticket_id, **fields)
    return await api.tickets.DeleteTicket(request)


KINDS = {
    "CHAT_SESSION": Kind("chat_sessions", a_session, get_session, delete_session),
    "CHAT_MESSAGE": Kind("chat_messages", a_message, get_message, delete_message),
    "CHAT_ATTACHMENT": Kind("chat_attachments", an_attachment, get_attachment, delete_attachment),
    "CHAT_TICKET": Kind("chat_tickets", a_chat_ticket, get_chat_ticket, delete_chat_ticket),
    "TICKET": Kind("tickets", a_ticket, get_ticket, delete_ticket),
}


@pytest.fixture(params=KINDS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def kind(name: str) -> Kind:
    return KINDS[name]


async def test_what_does_not_exist_is_ok(api: Api, other: Api, name: str, kind: Kind) -> None:
    """Also what another tenant has, which stays. Without `allow_missing` it is NOT_FOUND."""
    theirs = await kind.make(other)
    for absent in (an_id(), theirs):
        assert (await kind.delete(api, absent, allow_missing=True)).ByteSize() == 0
        with refused(StatusCode.NOT_FOUND, f"{name}_NOT_FOUND"):
            await kind.delete(api, absent)
    assert (await kind.get(other, theirs)).id == theirs


async def test_what_exists_is_deleted(api: Api, name: str, kind: Kind) -> None:
    """And a repeat is OK."""
    id_ = await kind.make(api)
    for _ in range(2):
        assert (await kind.delete(api, id_, allow_missing=True)).ByteSize() == 0
        with refused(StatusCode.NOT_FOUND, f"{name}_NOT_FOUND"):
            await kind.get(api, id_)


async def test_deleted_by_another_at_the_same_time(api: Api, kind: Kind) -> None:
    """Of sixteen calls one deletes it, and all are OK."""
    id_ = await kind.make(api)
    await asyncio.gather(*(kind.delete(api, id_, allow_missing=True) for _ in range(16)))


@pytest.mark.parametrize("allow_missing", [True, False])
async def test_deleted_by_another_during_the_wait_for_its_lock(
    api: Api, database: str, kind: Kind, name: str, allow_missing: bool
) -> None:
    """It was there when the call began."""
    id_ = await kind.make(api)
    async with await psycopg.AsyncConnection.connect(database) as deleting:
        if name != "TICKET":  # which has no session
            await deleting.execute(
                "SELECT FROM chat_sessions WHERE tenant_id = %s FOR UPDATE", [api.tenant]
            )
        await deleting.execute(f"DELETE FROM {kind.table} WHERE id = %s", [id_])
        call = asyncio.create_task(kind.delete(api, id_, allow_missing=allow_missing))
        await wait_for_lock_waiters(database, 1)
        await deleting.commit()
    if allow_missing:
        await call
    else:
        with refused(StatusCode.NOT_FOUND, f"{name}_NOT_FOUND"):
            await call


@pytest.fixture
def lost_answers(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The connection is lost when the deletion of each table in this list is committed.

    A table is taken off the list then.
    """
    tables: list[str] = []
    deletes: set[int] = set()
    fetch_all, execute = Transaction.fetch_all, Transaction.execute

    async def note(transaction: Any, sql: str, *, in_transaction: bool) -> None:
        is_delete = any(f"DELETE FROM {table}\n" in f"{sql}\n" for table in tables) or any(
            f"DELETE FROM {table} " in sql for table in tables
        )
        if is_delete:
            deletes.add(id(transaction))
        if id(transaction) in deletes and (sql == "COMMIT" or not in_transaction):
            tables.clear()
            await transaction._connection.close()
            raise psycopg.OperationalError("the answer is lost")

    async def fetch_all_and_lose(transaction: Any, sql: Any, *args: Any, **named: Any) -> Any:
        rows = await fetch_all(transaction, sql, *args, **named)
        status = transaction._connection.info.transaction_status
        in_transaction = status is not psycopg.pq.TransactionStatus.IDLE
        await note(transaction, sql, in_transaction=in_transaction)
        return rows

    async def execute_and_lose(transaction: Any, sql: Any, params: Any) -> None:
        await execute(transaction, sql, params)
        await note(transaction, sql, in_transaction=True)

    monkeypatch.setattr(Transaction, "fetch_all", fetch_all_and_lose)
    monkeypatch.setattr(Transaction, "execute", execute_and_lose)
    return tables


@pytest.mark.parametrize("allow_missing", [True, False])
async def test_lost_answer_of_the_database(
    api: Api, kind: Kind, name: str, lost_answers: list[str], allow_missing: bool
) -> None:
    """The service repeats the delete by itself, if the caller could do so."""
    id_ = await kind.make(api)
    lost_answers.append(kind.table)
    if allow_missing:
        await kind.delete(api, id_, allow_missing=True)
    else:
        with refused(StatusCode.UNAVAILABLE, "OUTCOME_UNKNOWN"):
            await kind.delete(api, id_)
    assert not lost_answers
    with refused(StatusCode.NOT_FOUND, f"{name}_NOT_FOUND"):
        await kind.get(api, id_)


@pytest.mark.parametrize("condition", [{"etag": "1"}, {"expected_revision": 1}])
async def test_lost_answer_to_a_conditional_delete(
    api: Api, lost_answers: list[str], condition: dict[str, Any]
) -> None:
    """What is gone meets no condition, so this is repeated too."""
    message_id = await a_message(api)
    lost_answers.append("chat_messages")
    await delete_message(api, message_id, allow_missing=True, **condition)
    assert not lost_answers
    await delete_message(api, message_id, allow_missing=True, **condition)
    with refused(StatusCode.NOT_FOUND, "CHAT_MESSAGE_NOT_FOUND"):
        await delete_message(api, message_id, **condition)


@pytest.mark.parametrize("name", ["CHAT_SESSION", "CHAT_MESSAGE", "CHAT_ATTACHMENT", "CHAT_TICKET"])
async def test_watchers_learn_of_a_deletion_whose_answer_was_lost(
    start_server: Any, database: str, lost_answers: list[str], kind: Kind
) -> None:
    """Although the repeat has found nothing to delete. The server does not poll."""
    api = await start_server(database, watch_poll_interval_seconds=3600)
    id_ = await kind.make(api)
    with psycopg.connect(database) as connection:
        [session_id, revision] = connection.execute(
            "SELECT id::text, revision FROM chat_sessions WHERE tenant_id = %s", [api.tenant]
        ).fetchone()
    async with watching(api, session_id) as watcher:
        await watcher.until("caught_up")
        lost_answers.append(kind.table)
        await kind.delete(api, id_, allow_missing=True)
        if kind.table == "chat_sessions":
            await watcher.until("session_deleted")
        else:
            await watcher.until_revision(revision + 1)


async def test_outcome_that_stays_unknown_can_be_repeated(
    start_server: Any, fresh_database: str, kind: Kind
) -> None:
    """The error carries RetryInfo, and the call, repeated as it is, is OK."""
    api = await start_server(fresh_database, pool_size=2)
    id_ = await kind.make(api)
    terminate_at_commit(fresh_database, kind.table, "DELETE")
    with refused(StatusCode.UNAVAILABLE, "OUTCOME_UNKNOWN") as refusal:
        await kind.delete(api, id_, allow_missing=True)
    assert "RetryInfo" in refusal.details
    execute(fresh_database, f"DROP TRIGGER hang_up ON {kind.table}")
    await kind.delete(api, id_, allow_missing=True)
    with refused(StatusCode.NOT_FOUND):
        await kind.get(api, id_)


class TestOtherErrors:
    """`allow_missing` hides none of them."""

    async def test_malformed_id(self, api: Api, kind: Kind) -> None:
        """It cannot be the id of anything."""
        for bad in ("", "no id", "0" * 32 + "\0"):
            with refused(StatusCode.INVALID_ARGUMENT) as refusal:
                await kind.delete(api, bad, allow_missing=True)
            assert len(refusal.fields) == 1

    async def test_locked_session(self, start_server: Any, database: str) -> None:
        """It is there, and another has it."""
        api = await start_server(database, lock_timeout_ms=100)
        message = await api.message((await api.session()).id)
        with (
            session_locked(database, message.session_id),
            refused(StatusCode.ABORTED, "CONTENTION"),
        ):
            await delete_message(api, message.id, allow_missing=True)

    async def test_active_ticket(self, api: Api) -> None:
        """The session stays."""
        session = await api.session()
        await api.escalate(session.id)
        with refused(StatusCode.FAILED_PRECONDITION, "SESSION_HAS_ACTIVE_TICKET"):
            await delete_session(api, session.id, allow_missing=True)
        assert (await get_session(api, session.id)).has_ticket

    async def test_linked_ticket(self, api: Api) -> None:
        """The ticket stays."""
        link = await api.escalate((await api.session()).id)
        await update_ticket(api, link.ticket_id, status=SOLVED)
        with refused(StatusCode.FAILED_PRECONDITION, "TICKET_LINKED"):
            await delete_ticket(api, link.ticket_id, allow_missing=True)
        assert (await get_ticket(api, link.ticket_id)).id == link.ticket_id

    @pytest.mark.parametrize("condition", [{"etag": "2"}, {"expected_revision": 0}])
    async def test_condition_of_a_message(self, api: Api, condition: dict[str, Any]) -> None:
        """The message stays."""
        message_id = await a_message(api)
        with refused(StatusCode.ABORTED, "ETAG_MISMATCH"):
            await delete_message(api, message_id, allow_missing=True, **condition)
        assert (await get_message(api, message_id)).id == message_id

    async def test_stale_etag(self, api: Api) -> None:
        """Only a session that exists has another etag."""
        session = await api.session()
        await api.message(session.id)
        with refused(StatusCode.ABORTED, "ETAG_MISMATCH"):
            await delete_session(api, session.id, etag=session.etag, allow_missing=True)
        await delete_session(api, session.id, etag="1", allow_missing=True)
        await delete_session(api, session.id, etag=session.etag, allow_missing=True)


async def test_large_session_is_ok_for_all_who_delete_it(
    start_server: Any, fresh_database: str
) -> None:
    """The first call leaves, and the others wait for its deletion, with `allow_missing` or not."""
    api = await start_server(fresh_database)
    session, with_etag = await api.session(), await api.session()
    for each in (session, with_etag):
        await api.message(each.id)
    execute(
        fresh_database,
        "UPDATE chat_sessions SET revision = 1000000",
        "CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN PERFORM pg_sleep(1); RETURN OLD; END $$",
        "CREATE TRIGGER wait BEFORE DELETE ON chat_messages FOR EACH ROW EXECUTE FUNCTION wait()",
    )
    stub = chat_session_pb2_grpc.ChatSessionServiceStub(api.channel)
    request = DeleteChatSessionRequest(session_id=session.id, allow_missing=True)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.DeleteChatSession(request, metadata=api.sessions._metadata, timeout=0.3)
    assert caught.value.code() is StatusCode.DEADLINE_EXCEEDED
    await asyncio.gather(
        *(delete_session(api, session.id, allow_missing=each) for each in (True, False, True))
    )
    await delete_session(api, session.id, allow_missing=True)
    with refused(StatusCode.NOT_FOUND, "CHAT_SESSION_NOT_FOUND"):
        await delete_session(api, session.id)
    # Calls with different etags are different deletions, of which the later one finds nothing.
    await asyncio.gather(
        *(delete_session(api, with_etag.id, allow_missing=True, etag=e) for e in ("", "1000000"))
    )
