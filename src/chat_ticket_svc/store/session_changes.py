"""What changed in a session after a revision: one page in one statement, so in one snapshot."""

from typing import Literal, NamedTuple

from chat_ticket_svc.store import messages
from chat_ticket_svc.store.database import PIPELINED_MAX_BYTES, PIPELINED_MAX_ROWS, Database
from chat_ticket_svc.store.messages import Message
from chat_ticket_svc.store.sessions import Session

# A change takes a revision of its own, so `revision` orders the three kinds and cuts between any
# two. Everything in the snapshot is at or below the session's revision in it. The condition
# `revision > sequence` follows from the other two, and is there for the partial index.
PAGE = f"""
WITH session AS (
    SELECT id::text, tenant_id, status, has_ticket, revision,
           (extract(epoch FROM created_at) * 1000000)::bigint AS created_at,
           (extract(epoch FROM updated_at) * 1000000)::bigint AS updated_at
      FROM chat_sessions
     WHERE tenant_id = %(tenant_id)s AND id = %(session_id)s::uuid
), change AS (
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
          (SELECT 'deleted', t.revision, t.message_id::text, NULL, NULL, NULL, NULL, '', NULL,
                  NULL, NULL
             FROM chat_message_tombstones t
            WHERE t.tenant_id = %(tenant_id)s AND t.session_id = %(session_id)s::uuid
              AND t.revision > %(after)s
            ORDER BY t.revision LIMIT %(limit)s)
          ORDER BY at LIMIT %(limit)s
      ) AS found
)
SELECT session.*, change.*
  FROM session
  LEFT JOIN change ON change.total <= %(bytes)s OR change.total = change.size
 ORDER BY change.at
"""


class Change(NamedTuple):
    """One change to a message; `message` is None when it was deleted."""

    kind: Literal["created", "updated", "deleted"]
    revision: int
    message_id: str
    message: Message | None


class Page(NamedTuple):
    """The next changes in order, the session in the same snapshot, and whether more follow."""

    session: Session
    changes: list[Change]
    more: bool

    @property
    def revision(self) -> int:
        """Everything up to here is in this page, or in those before."""
        return self.changes[-1].revision if self.more else self.session.revision


async def page(
    db: Database, tenant_id: str, session_id: str, *, after: int, limit: int
) -> Page | None:
    """The first changes after a revision, or None when there is no such session."""
    are_few = limit <= PIPELINED_MAX_ROWS
    params = {
        "tenant_id": tenant_id,
        "session_id": session_id,
        "after": after,
        "limit": limit,
        "bytes": PIPELINED_MAX_BYTES if are_few else messages.PAGE_BYTES,
    }
    if are_few:
        rows = await db.fetch_pipelined(PAGE, params)
    else:
        rows = await db.fetch_all(PAGE, params, lambda *row: row)
    if not rows:
        return None
    width = len(Session._fields)
    session = Session._make(rows[0][:width])
    if rows[0][width] is None:
        return Page(session, [], more=False)
    fetched = rows[0][-3]
    changes = []
    for row in rows:
        kind, revision, *columns, _, _, _ = row[width:]
        message = None if kind == "deleted" else messages.make(*columns)
        changes.append(Change(kind, revision, columns[0], message))
    return Page(session, changes, more=len(rows) < fetched or fetched == limit)
