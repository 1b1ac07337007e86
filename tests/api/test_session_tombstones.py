"""The id of a deleted session is not used again: a late repeat of its creation is rejected."""

import asyncio
from typing import Any

import psycopg
import pytest
from grpc import StatusCode
from support.client import Api, an_id, refused
from support.database import store_database, wait_for_lock_waiters
from support.messages import delete_message
from support.sessions import delete_session, get_session

from chat_ticket.v1 import resources_pb2 as r
from chat_ticket_svc.store import erasure, tenants
from chat_ticket_svc.store.database import Database

DELETED = "CHAT_SESSION_DELETED"


async def test_id_of_a_deleted_session_is_rejected(api: Api) -> None:
    """The error names the session, and the session stays away."""
    session = await api.session()
    await api.message(session.id)
    await delete_session(api, session.id)
    for status in (r.CHAT_SESSION_STATUS_UNSPECIFIED, r.CHAT_SESSION_STATUS_ARCHIVED):
        with refused(StatusCode.ALREADY_EXISTS, DELETED) as refusal:
            await api.session(id=session.id.upper(), status=status)
        assert refusal.text == f"id {session.id} belongs to a deleted chat session"
        info = refusal.details["ResourceInfo"]
        assert (info.resource_type, info.resource_name) == ("chat_session", session.id)
        assert "RetryInfo" not in refusal.details
    with refused(StatusCode.NOT_FOUND, "CHAT_SESSION_NOT_FOUND"):
        await get_session(api, session.id)


async def test_another_tenant_may_use_the_id(api: Api, other: Api) -> None:
    """It has not deleted anything."""
    session = await api.session()
    await delete_session(api, session.id)
    assert (await other.session(id=session.id)).id == session.id


@pytest.mark.parametrize("committed", [True, False])
async def test_create_waits_for_a_deletion_of_the_same_id(
    api: Api, database: str, committed: bool
) -> None:
    """Then the session is deleted, or it is the one that was there."""
    session = await api.session()
    async with await psycopg.AsyncConnection.connect(database) as deleting:
        await deleting.execute("DELETE FROM chat_sessions WHERE id = %s", [session.id])
        creating = asyncio.create_task(api.session(id=session.id))
        await wait_for_lock_waiters(database, 1)
        await (deleting.commit() if committed else deleting.rollback())
        if committed:
            with refused(StatusCode.ALREADY_EXISTS, DELETED):
                await creating
        else:
            assert await creating == session


async def test_deletion_just_after_the_id_was_found_taken(
    api: Api, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the two statements of a create."""
    session = await api.session()
    fetch_by_key = Database.fetch_by_key

    async def delete_before(db: Database, sql: Any, *arguments: Any, **named: Any) -> Any:
        async with await psycopg.AsyncConnection.connect(database) as connection:
            await connection.execute("DELETE FROM chat_sessions WHERE id = %s", [session.id])
        return await fetch_by_key(db, sql, *arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(Database, "fetch_by_key", delete_before)
        with refused(StatusCode.ALREADY_EXISTS, DELETED):
            await api.session(id=session.id)


async def test_no_create_survives_a_deletion(api: Api) -> None:
    """Of creates that race with the deletion, none brings the session back."""
    for _ in range(10):
        session_id = (await api.session()).id
        creates = [api.session(id=session_id) for _ in range(8)]
        outcomes = await asyncio.gather(
            *creates[:4], delete_session(api, session_id), *creates[4:], return_exceptions=True
        )
        assert outcomes[4] is None
        with refused(StatusCode.NOT_FOUND):
            await get_session(api, session_id)
        with refused(StatusCode.ALREADY_EXISTS, DELETED):
            await api.session(id=session_id)


async def test_erased_tenant_keeps_the_ids_alone(api: Api, database: str) -> None:
    """They are no data: a tenant that has nothing else counts as erased."""
    session_ids = sorted([(await api.session()).id for _ in range(3)])
    await api.message(session_ids[0], "a secret")
    async with store_database(database) as db:
        async for _ in erasure.erase(db, api.tenant, active_tickets=False):
            pass
        assert not any(await tenants.count(db, api.tenant))
    with psycopg.connect(database) as connection:
        rows = connection.execute(
            "SELECT to_jsonb(t) - '{deleted_at,feed_position,feed_bucket}'::text[]"
            " FROM chat_session_tombstones t WHERE tenant_id = %s ORDER BY session_id",
            [api.tenant],
        ).fetchall()
    assert [row for (row,) in rows] == [
        {"tenant_id": api.tenant, "session_id": session_id} for session_id in session_ids
    ]
    with refused(StatusCode.ALREADY_EXISTS, DELETED):
        await api.session(id=session_ids[0])


async def test_message_for_a_deleted_session_is_not_found(api: Api) -> None:
    """As for any session that does not exist."""
    session_id = (await api.session()).id
    await delete_session(api, session_id)
    for absent in (session_id, an_id()):
        with refused(StatusCode.NOT_FOUND, "CHAT_SESSION_NOT_FOUND"):
            await api.message(absent)


async def test_messages_of_a_deleted_session_leave_no_tombstone(api: Api, database: str) -> None:
    """Those of messages are deleted with the session, as its own is enough."""
    session_id = (await api.session()).id
    await delete_message(api, (await api.message(session_id)).id)
    await delete_session(api, session_id)
    with psycopg.connect(database) as connection:
        [count] = connection.execute(
            "SELECT count(*) FROM chat_message_tombstones WHERE tenant_id = %s", [api.tenant]
        ).fetchone()
    assert count == 0
