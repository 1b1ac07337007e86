"""All data of a tenant, or of one of its users: counting it, and reading it from the oldest on."""

from typing import NamedTuple
from uuid import UUID

from chat_ticket_svc.store import sessions, tickets
from chat_ticket_svc.store.database import Database
from chat_ticket_svc.store.sessions import Session
from chat_ticket_svc.store.tickets import Ticket

# Limits of one page.
SESSIONS_PER_PAGE = 20
TICKETS_PER_PAGE = 500

NEXT_TENANT = """
SELECT tenant_id COLLATE "C" FROM chat_sessions
 WHERE tenant_id > %(after)s
 ORDER BY chat_sessions.tenant_id
 LIMIT 1
"""

COUNT = """
SELECT (SELECT count(*) FROM chat_sessions WHERE tenant_id = %(tenant_id)s),
       (SELECT count(*) FROM chat_messages WHERE tenant_id = %(tenant_id)s),
       (SELECT count(*) FROM chat_attachments WHERE tenant_id = %(tenant_id)s),
       (SELECT count(*) FROM chat_message_tombstones WHERE tenant_id = %(tenant_id)s),
       (SELECT count(*) FROM chat_drafts WHERE tenant_id = %(tenant_id)s),
       (SELECT count(*) FROM chat_tickets WHERE tenant_id = %(tenant_id)s),
       (SELECT count(*) FROM tickets WHERE tenant_id = %(tenant_id)s),
       (SELECT count(*) FROM tickets
         WHERE tenant_id = %(tenant_id)s AND status IN ('open', 'pending')),
       0,
       (SELECT count(*) FROM tenant_settings WHERE tenant_id = %(tenant_id)s)
"""

COUNT_OF_USER = """
WITH session AS MATERIALIZED (
    SELECT id FROM chat_sessions
     WHERE tenant_id = %(tenant_id)s AND user_id = %(user_id)s::text
), chat_ticket AS MATERIALIZED (
    SELECT ticket_id FROM chat_tickets
     WHERE tenant_id = %(tenant_id)s AND session_id IN (SELECT id FROM session)
), ticket AS MATERIALIZED (
    SELECT status,
           EXISTS (SELECT FROM chat_tickets ct
                    WHERE ct.tenant_id = %(tenant_id)s AND ct.ticket_id = t.id
                      AND ct.session_id NOT IN (SELECT id FROM session)) AS is_shared
      FROM tickets t
     WHERE t.tenant_id = %(tenant_id)s AND t.id IN (SELECT ticket_id FROM chat_ticket)
)
SELECT (SELECT count(*) FROM session),
       (SELECT count(*) FROM chat_messages
         WHERE tenant_id = %(tenant_id)s AND session_id IN (SELECT id FROM session)),
       (SELECT count(*) FROM chat_attachments a
          JOIN chat_messages m ON m.tenant_id = a.tenant_id AND m.id = a.message_id
         WHERE a.tenant_id = %(tenant_id)s AND m.tenant_id = %(tenant_id)s
           AND m.session_id IN (SELECT id FROM session)),
       (SELECT count(*) FROM chat_message_tombstones
         WHERE tenant_id = %(tenant_id)s AND session_id IN (SELECT id FROM session)),
       (SELECT count(*) FROM chat_drafts
         WHERE tenant_id = %(tenant_id)s AND session_id IN (SELECT id FROM session)),
       (SELECT count(*) FROM chat_ticket),
       (SELECT count(*) FROM ticket),
       (SELECT count(*) FROM ticket WHERE status IN ('open', 'pending')),
       (SELECT count(*) FROM ticket WHERE is_shared),
       0
"""

OLDEST_SESSIONS = f"""
SELECT {sessions.COLUMNS} FROM chat_sessions
 WHERE tenant_id = %(tenant_id)s
   AND (%(user_id)s::text IS NULL OR user_id = %(user_id)s::text)
   AND (created_at, id) > ('epoch'::timestamptz + %(after_time)s * interval '1 microsecond',
                           %(after_id)s::uuid)
 ORDER BY created_at, chat_sessions.id
 LIMIT %(limit)s
"""

OLDEST_TICKETS = f"""
SELECT {tickets.TICKET_COLUMNS} FROM tickets t
 WHERE t.tenant_id = %(tenant_id)s
   AND (NOT %(active)s OR t.status IN ('open', 'pending'))
   AND (t.created_at, t.id) > ('epoch'::timestamptz + %(after_time)s * interval '1 microsecond',
                               %(after_id)s::uuid)
 ORDER BY t.created_at, t.id
 LIMIT %(limit)s
"""

# From the few sessions of the user to their tickets, and not through all tickets of the tenant.
OLDEST_TICKETS_OF_USER = f"""
WITH linked AS MATERIALIZED (
    SELECT DISTINCT ct.ticket_id
      FROM chat_sessions s
      JOIN chat_tickets ct ON ct.tenant_id = s.tenant_id AND ct.session_id = s.id
     WHERE s.tenant_id = %(tenant_id)s AND s.user_id = %(user_id)s::text
)
SELECT {tickets.TICKET_COLUMNS} FROM linked
  JOIN tickets t ON t.tenant_id = %(tenant_id)s AND t.id = linked.ticket_id
 WHERE (NOT %(active)s OR t.status IN ('open', 'pending'))
   AND (t.created_at, t.id) > ('epoch'::timestamptz + %(after_time)s * interval '1 microsecond',
                               %(after_id)s::uuid)
 ORDER BY t.created_at, t.id
 LIMIT %(limit)s
"""


class Count(NamedTuple):
    """How many rows a tenant or a user has in each table.

    `active_tickets` are open or pending. The tickets of a user are those of the user's sessions.
    `shared_tickets` of them are also those of other sessions.
    """

    sessions: int
    messages: int
    attachments: int
    tombstones: int
    drafts: int
    chat_tickets: int
    tickets: int
    active_tickets: int
    shared_tickets: int
    settings: int


async def next_tenant(db: Database, after: str) -> str | None:
    """The first tenant in order after this one that has sessions."""
    rows = await db.fetch_all(NEXT_TENANT, {"after": after}, str)
    return rows[0] if rows else None


async def count(db: Database, tenant_id: str, user_id: str | None = None) -> Count:
    """The rows of a tenant, or of a user."""
    params = {"tenant_id": tenant_id, "user_id": user_id}
    [counts] = await db.fetch_all(COUNT if user_id is None else COUNT_OF_USER, params, Count)
    return counts


async def oldest_sessions(
    db: Database, tenant_id: str, user_id: str | None = None, after: Session | None = None
) -> list[Session]:
    """A page of the sessions of a tenant or a user, oldest first, after the given one."""
    params = {
        "tenant_id": tenant_id,
        "user_id": user_id,
        **_cursor_params(after),
        "limit": SESSIONS_PER_PAGE,
    }
    return await db.fetch_all(OLDEST_SESSIONS, params, Session, prepare=False)


async def oldest_tickets(
    db: Database,
    tenant_id: str,
    user_id: str | None = None,
    after: Ticket | None = None,
    *,
    active: bool = False,
) -> list[Ticket]:
    """A page of the tickets of a tenant or a user, oldest first, after the given one.

    With `active`, only open or pending ones.
    """
    params = {
        "tenant_id": tenant_id,
        "user_id": user_id,
        **_cursor_params(after),
        "active": active,
        "limit": TICKETS_PER_PAGE,
    }
    return await db.fetch_all(
        OLDEST_TICKETS if user_id is None else OLDEST_TICKETS_OF_USER, params, Ticket
    )


def _cursor_params(after: Session | Ticket | None) -> dict[str, int | str]:
    if after is None:
        return {"after_time": 0, "after_id": str(UUID(int=0))}
    return {"after_time": after.created_at, "after_id": after.id}
