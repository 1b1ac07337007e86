"""Writers of one tenant whose transactions end in another order than they began.

Those by the API are short. Those by SQL change several sessions and tickets, and wait before they
commit or roll back. What they did is in the database's audit: they keep no record.
"""

import asyncio
import contextlib
import random
import uuid
from collections.abc import Callable
from typing import Any

import grpc.aio
import psycopg
from google.protobuf.field_mask_pb2 import FieldMask
from support import tickets
from support.client import Api

from chat_ticket.v1 import resources_pb2 as r
from chat_ticket.v1.chat_session_pb2 import DeleteChatSessionRequest, UpdateChatSessionRequest

SHORT_WRITERS, LONG_WRITERS = 3, 5
SESSIONS = 600  # at first: more than a page of the feed
WAIT_SECONDS = 0.2  # that a long transaction waits at a time, at most
LONG_WAIT_SECONDS = 2.0  # that a few of them wait
USERS = ("ada", "grace", "linus")
TEAMS = ("billing", "sales", "support")

CREATE_SESSIONS = """
INSERT INTO chat_sessions (tenant_id, id, user_id, labels)
SELECT %(tenant)s, new.id, %(user)s, jsonb_build_object('team', %(team)s::text)
  FROM unnest(%(ids)s::uuid[]) AS new (id)
"""
CHANGE_SESSION = """
UPDATE chat_sessions
   SET revision = revision + 1, updated_at = next_change_time(updated_at),
       status = %(status)s, title = %(title)s, labels = jsonb_build_object('team', %(team)s::text)
 WHERE tenant_id = %(tenant)s AND id = %(id)s
"""
LOCK_SESSION = "SELECT FROM chat_sessions WHERE tenant_id = %(tenant)s AND id = %(id)s FOR UPDATE"
DELETE_SESSION = """
DELETE FROM chat_sessions WHERE tenant_id = %(tenant)s AND id = %(id)s AND NOT has_ticket
"""
CREATE_TICKET = "INSERT INTO tickets (tenant_id, id, title) VALUES (%(tenant)s, %(id)s, %(title)s)"
LINK = """
INSERT INTO chat_tickets (tenant_id, session_id, ticket_id)
SELECT tenant_id, id, %(ticket)s FROM chat_sessions
 WHERE tenant_id = %(tenant)s AND id = %(id)s AND NOT has_ticket AND status <> 'archived'
"""
UNLINK = "DELETE FROM chat_tickets WHERE tenant_id = %(tenant)s AND session_id = %(id)s"
CHANGE_TICKET = """
UPDATE tickets SET status = %(status)s, title = %(title)s, updated_at = next_change_time(updated_at)
 WHERE tenant_id = %(tenant)s AND id = %(id)s
"""
DELETE_TICKET = """
DELETE FROM tickets t WHERE tenant_id = %(tenant)s AND id = %(id)s AND NOT EXISTS (
    SELECT FROM chat_tickets ct WHERE ct.tenant_id = t.tenant_id AND ct.ticket_id = t.id)
"""


class FeedWriters:
    """Eight writers, until they have made about `count` changes."""

    def __init__(
        self,
        api: Callable[[int], Api],
        database_url: str,
        tenant: str,
        count: int,
        chance: random.Random,
    ):
        self._api = api
        self._database_url = database_url
        self._tenant = tenant
        self._count = count
        self._chance = chance
        self._sessions: list[str] = []
        self._tickets: list[str] = []
        self._links: list[str] = []
        self.changes = 0

    async def create_sessions(self) -> None:
        """Those that all writers change, in one transaction for each user."""
        async with await self._connect() as connection:
            for _ in USERS:
                async with connection.transaction():
                    await self._create(connection, self._chance, SESSIONS // len(USERS))

    async def write(self) -> None:
        writers = [self._write_short] * SHORT_WRITERS + [self._write_long] * LONG_WRITERS
        async with asyncio.TaskGroup() as group:
            for number, write in enumerate(writers):
                group.create_task(write(number, random.Random(self._chance.random())))

    async def _connect(self) -> psycopg.AsyncConnection[Any]:
        return await psycopg.AsyncConnection.connect(
            self._database_url, autocommit=True, options="-c deadlock_timeout=50ms"
        )

    # ---- Short transactions ----

    async def _write_short(self, number: int, chance: random.Random) -> None:
        while self.changes < self._count:
            number += 1
            with contextlib.suppress(grpc.aio.AioRpcError):
                await self._call(self._api(number), chance)
                self.changes += 1

    async def _call(self, api: Api, chance: random.Random) -> None:
        session_id = chance.choice(self._sessions)
        ticket_id = chance.choice(self._tickets or [str(uuid.uuid4())])
        [kind] = chance.choices(
            ("message", "session", "create", "escalate", "ticket", "unlink", "delete",
             "delete ticket"),
            (30, 25, 10, 10, 10, 5, 5, 5),
        )  # fmt: skip
        match kind:
            case "message":
                await api.message(session_id)
            case "session":
                await self._update_session(api, session_id, chance)
            case "create":
                labels = {"team": chance.choice(TEAMS)}
                session = await api.session(user_id=chance.choice(USERS), labels=labels)
                self._sessions.append(session.id)
            case "escalate":
                chat_ticket = await api.escalate(session_id)
                self._links.append(chat_ticket.id)
                self._tickets.append(chat_ticket.ticket_id)
            case "ticket":
                status = chance.choice((tickets.PENDING, tickets.SOLVED, tickets.CLOSED))
                await tickets.update_ticket(api, ticket_id, status=status)
            case "unlink" if self._links:
                await tickets.unlink(api, _take(self._links, chance))
            case "delete":
                request = DeleteChatSessionRequest(session_id=_take(self._sessions, chance))
                await api.sessions.DeleteChatSession(request)
            case "delete ticket":
                await tickets.delete_ticket(api, ticket_id)

    async def _update_session(self, api: Api, session_id: str, chance: random.Random) -> None:
        """Change what a filter looks at."""
        session = r.ChatSession(id=session_id)
        if chance.random() < 0.5:
            session.status = chance.choice(
                (r.CHAT_SESSION_STATUS_ACTIVE, r.CHAT_SESSION_STATUS_RESOLVED)
            )
            path = "status"
        else:
            session.labels["team"] = chance.choice(TEAMS)
            path = "labels"
        request = UpdateChatSessionRequest(session=session, update_mask=FieldMask(paths=[path]))
        await api.sessions.UpdateChatSession(request)

    # ---- Long transactions ----

    async def _write_long(self, _: int, chance: random.Random) -> None:
        async with await self._connect() as connection:
            while self.changes < self._count:
                # Two that wait for one another, and links to what another one has deleted.
                with contextlib.suppress(
                    psycopg.errors.DeadlockDetected, psycopg.errors.IntegrityError
                ):
                    await self._transact(connection, chance)

    async def _transact(
        self, connection: psycopg.AsyncConnection[Any], chance: random.Random
    ) -> None:
        count = chance.randint(1, 30)
        ids = sorted({chance.choice(self._sessions) for _ in range(count)})
        [kind] = chance.choices(
            ("change", "lock first", "create", "delete", "ticket"), (5, 2, 2, 1, 2)
        )
        if kind == "delete":
            self._sessions = [each for each in self._sessions if each not in ids]
        changes = 0
        async with connection.transaction() as transaction:
            if kind == "lock first":
                await connection.execute(LOCK_SESSION, self._of(ids[0]))
                await _wait(chance)
            elif kind == "create":
                changes += await self._create(connection, chance, count)
            for session_id in ids:
                changes += await self._change(connection, kind, session_id, chance)
                if chance.random() < 0.1:
                    await _wait(chance)
            if chance.random() < 0.2:
                async with connection.transaction() as savepoint:
                    await self._change(connection, "change", ids[-1], chance)
                    raise psycopg.Rollback(savepoint)
            await _wait(chance)
            if chance.random() < 0.2:
                raise psycopg.Rollback(transaction)
            self.changes += changes

    async def _create(
        self, connection: psycopg.AsyncConnection[Any], chance: random.Random, count: int
    ) -> int:
        ids = [str(uuid.uuid4()) for _ in range(count)]
        params = {"ids": ids, "user": chance.choice(USERS), "team": chance.choice(TEAMS)}
        await connection.execute(CREATE_SESSIONS, {"tenant": self._tenant, **params})
        self._sessions += ids
        return count

    async def _change(
        self,
        connection: psycopg.AsyncConnection[Any],
        kind: str,
        session_id: str,
        chance: random.Random,
    ) -> int:
        """Do something of this kind, and return how many rows it changed."""
        title = f"title {chance.randrange(10**6)}"
        statements: list[tuple[str, dict[str, Any]]] = []
        if kind == "delete":
            statements.append((DELETE_SESSION, self._of(session_id)))
            if self._tickets:
                statements.append((DELETE_TICKET, self._of(chance.choice(self._tickets))))
        elif kind == "ticket" and chance.random() < 0.5:
            ticket_id = str(uuid.uuid4())
            statements.append((CREATE_TICKET, self._of(ticket_id, title=title)))
            statements.append((LINK, self._of(session_id, ticket=ticket_id)))
            self._tickets.append(ticket_id)
        elif kind == "ticket" and self._tickets:
            status = chance.choice(("open", "solved", "closed"))
            ticket = self._of(chance.choice(self._tickets), status=status, title=title)
            statements.append((CHANGE_TICKET, ticket))
            statements.append((UNLINK, self._of(session_id)))
        else:
            changed = {
                "status": chance.choice(("active", "resolved")),
                "team": chance.choice(TEAMS),
            }
            statements.append((CHANGE_SESSION, self._of(session_id, title=title, **changed)))
        changes = 0
        for sql, params in statements:
            changes += (await connection.execute(sql, params)).rowcount
        return changes

    def _of(self, each: str, **params: Any) -> dict[str, Any]:
        return {"tenant": self._tenant, "id": each, **params}


def _take(ids: list[str], chance: random.Random) -> str:
    return ids.pop(chance.randrange(len(ids)))


async def _wait(chance: random.Random) -> None:
    seconds = LONG_WAIT_SECONDS if chance.random() < 0.005 else WAIT_SECONDS * chance.random() ** 4
    await asyncio.sleep(seconds)
