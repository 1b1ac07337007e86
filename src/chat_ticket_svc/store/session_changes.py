"""The changes to a session after a revision. One statement reads a page, so it is one snapshot."""

from typing import Literal, NamedTuple

from chat_ticket_svc.store import messages, sessions, tickets
from chat_ticket_svc.store.database import PIPELINED_MAX_BYTES, PIPELINED_MAX_ROWS, Database
from chat_ticket_svc.store.messages import Message
from chat_ticket_svc.store.sessions import Session
from chat_ticket_svc.store.tickets import ChatTicket

# The row of a deleted message has its id, content for messages.SIZE, and NULL in all other columns.
_TOMBSTONE = {"id": "t.message_id::text", "content": "''"}
TOMBSTONE_COLUMNS = ", ".join(_TOMBSTONE.get(name, "NULL") for name in Message._fields)

# As JSON, or NULL. Of a session without a ticket no other table is read.
CHAT_TICKET = f"""
    (SELECT json_build_array({tickets.CHAT_TICKET_COLUMNS})
       FROM chat_tickets ct JOIN tickets t ON t.tenant_id = ct.tenant_id AND t.id = ct.ticket_id
      WHERE chat_sessions.has_ticket
        AND ct.tenant_id = %(tenant_id)s AND ct.session_id = %(session_id)s::uuid)
"""

# Every change has a revision of its own, so `revision` orders the three kinds of changes, and a
# page can end after any of them. No revision in the snapshot exceeds the session's. The condition
# `revision > sequence` is implied by the other two. It lets the partial index be used. Only the
# first row has the session, whose labels can be long.
PAGE = f"""
WITH change AS (
    SELECT *, count(*) OVER () AS fetched, {messages.SIZE} AS size,
           sum({messages.SIZE}) OVER (ORDER BY at) AS total
      FROM (
          (SELECT 'created' AS kind, m.sequence AS at, {messages.COLUMNS}
             FROM chat_messages m
            WHERE m.tenant_id = %(tenant_id)s AND m.session_id = %(session_id)s::uuid
              AND m.sequence > %(after)s
            ORDER BY m.sequence LIMIT %(limit)s)
          UNION ALL
          (SELECT 'updated', m.revision, {messages.COLUMNS}
             FROM chat_messages m
            WHERE m.tenant_id = %(tenant_id)s AND m.session_id = %(session_id)s::uuid
              AND m.sequence <= %(after)s AND m.revision > %(after)s
              AND m.revision > m.sequence
            ORDER BY m.revision LIMIT %(limit)s)
          UNION ALL
          (SELECT 'deleted', t.revision, {TOMBSTONE_COLUMNS}
             FROM chat_message_tombstones t
            WHERE t.tenant_id = %(tenant_id)s AND t.session_id = %(session_id)s::uuid
              AND t.revision > %(after)s
            ORDER BY t.revision LIMIT %(limit)s)
          ORDER BY at LIMIT %(limit)s
      ) AS changes
)
SELECT session.*, change.*
  FROM chat_sessions
  LEFT JOIN change ON change.total <= %(bytes)s OR change.total = change.size
  LEFT JOIN LATERAL (
      SELECT {sessions.COLUMNS}, {CHAT_TICKET} AS chat_ticket
       WHERE change.at IS NOT DISTINCT FROM (SELECT min(at) FROM change) OFFSET 0
  ) AS session ON true
 WHERE chat_sessions.tenant_id = %(tenant_id)s AND chat_sessions.id = %(session_id)s::uuid
 ORDER BY change.at
"""


class Change(NamedTuple):
    """A change to a message. `message` is None if the message was deleted."""

    kind: Literal["created", "updated", "deleted"]
    revision: int
    message_id: str
    message: Message | None


class ChangePage(NamedTuple):
    """Changes in order, whether more follow, and the session with its ticket in the same snapshot.

    `chat_ticket` is None when the session has no ticket.
    """

    session: Session
    chat_ticket: ChatTicket | None
    changes: list[Change]
    more: bool

    @property
    def revision(self) -> int:
        """The position of the page: it and the pages before it have all changes up to here."""
        return self.changes[-1].revision if self.more else self.session.revision


async def page(
    db: Database, tenant_id: str, session_id: str, *, after: int, limit: int
) -> ChangePage | None:
    """The first changes after a revision, or None if the session does not exist."""
    is_pipelined = limit <= PIPELINED_MAX_ROWS
    params = {
        "tenant_id": tenant_id,
        "session_id": session_id,
        "after": after,
        "limit": limit,
        "bytes": PIPELINED_MAX_BYTES if is_pipelined else messages.PAGE_BYTES,
    }
    if is_pipelined:
        rows = await db.fetch_pipelined(PAGE, params)
    else:
        rows = await db.fetch_all(PAGE, params, lambda *row: row)
    if not rows:
        return None
    width = len(Session._fields)
    session = Session._make(rows[0][:width])
    chat_ticket = tickets.chat_ticket_from_row(*rows[0][width]) if rows[0][width] else None
    width += 1
    if rows[0][width] is None:
        return ChangePage(session, chat_ticket, [], more=False)
    fetched = rows[0][-3]
    changes = []
    for row in rows:
        kind, revision, *columns, _, _, _ = row[width:]
        message = None if kind == "deleted" else messages.from_row(*columns)
        changes.append(Change(kind, revision, columns[0], message))
    return ChangePage(session, chat_ticket, changes, more=len(rows) < fetched or fetched == limit)
