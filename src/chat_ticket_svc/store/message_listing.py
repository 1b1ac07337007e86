"""Pages of a session's messages, in the bytes that PostgreSQL sends.

The cost of a list is what is done for each row, so rows are not decoded. Text stays UTF-8 bytes, as
stored, and a time stays an integer. convert.py encodes these rows as the response.
"""

import itertools
from operator import itemgetter
from typing import LiteralString, NamedTuple

from chat_ticket_svc.store import messages, sessions
from chat_ticket_svc.store.columns import BOOL, BYTES, INTEGER, TEXT, type_ids
from chat_ticket_svc.store.database import PIPELINED_MAX_ROWS, Database
from chat_ticket_svc.store.sessions import Session
from chat_ticket_svc.store.transaction import Transaction

# id, sequence, revision, role, content, metadata, created_at, attachments, language_code, state,
# author_kind, author_id, redacted, size, session_revision, epoch.
# `created_at` is in microseconds since PostgreSQL's epoch, 2000-01-01. `attachments` is a JSON
# array of the columns of the attachments. A message that exceeds the size limit of the read has no
# content, metadata or attachments. Only the first row has the session's revision and epoch.
Row = tuple[
    bytes, int, int, bytes, bytes, bytes | None, int, bytes | None, bytes | None, bytes | None,
    bytes | None, bytes | None, bool, int, int | None, str | None,
]  # fmt: skip
ROW_TYPES = (
    BYTES, INTEGER, INTEGER, BYTES, BYTES, BYTES, INTEGER, BYTES, BYTES, BYTES,
    BYTES, BYTES, BOOL, INTEGER, INTEGER, TEXT,
)  # fmt: skip
sequence, content, size = itemgetter(1), itemgetter(4), itemgetter(13)
history = itemgetter(14, 15)

SESSION_TYPES = type_ids(Session)


class MessagePage(NamedTuple):
    """Messages in order, and whether more may follow.

    `revision` and `epoch` are those of the session in the same snapshot. The first page also has
    the whole session.
    """

    session: Session | None
    revision: int
    epoch: str
    rows: list[Row]
    more: bool


# The first read of a page omits the contents of messages over this size, and of those over an equal
# share of PAGE_BYTES. The page ends before the first of them, so no page exceeds PAGE_BYTES.
# A page that begins with a large message is read again without this limit, up to PAGE_BYTES.
FIRST_READ_MESSAGE_BYTES = 2048
UNLIMITED_BYTES = 2**31 - 1


IS_FIRST_ROW = "m.sequence IS NOT DISTINCT FROM (SELECT sequence FROM page LIMIT 1)"

SESSION = f"""
  LEFT JOIN LATERAL (
      SELECT {sessions.COLUMNS}
       WHERE {IS_FIRST_ROW} OFFSET 0
  ) AS session ON true
"""


def _statement(order: LiteralString, *, first: bool = False) -> LiteralString:
    """A page of messages. No row means no session; one row without a message means no message left.

    On the first page, the first row has the session too. The others do not, as labels can be long.

    Attachments are looked up per message. With a join, the planner may read all attachments of the
    tenant, or compare all attachments of the page with each message. EXISTS is faster than an
    aggregate over no rows. OFFSET 0 keeps the planner from turning EXISTS into a hash of all
    attachments.

    The planner does not see values that come from a SELECT. If it did, it would plan each page of
    long sessions anew, which takes twice as long as to read the first one.
    """
    return f"""
WITH page AS MATERIALIZED (
    SELECT m.id, m.sequence, m.revision, m.role, m.content, m.metadata::text AS metadata,
           m.created_at, m.language_code, m.state, m.author_kind, m.author_id, m.redacted,
           CASE WHEN EXISTS (
               SELECT FROM chat_attachments a
                WHERE a.tenant_id = m.tenant_id AND a.message_id = m.id OFFSET 0)
           THEN {messages.ATTACHMENTS}::text END AS attachments
      FROM chat_messages m
     WHERE m.tenant_id = %(tenant_id)s AND m.session_id = %(session_id)s::uuid
       AND m.sequence > (SELECT %(after)s::bigint) AND m.sequence < (SELECT %(before)s::bigint)
       AND (%(roles)s::text[] IS NULL OR m.role = ANY (%(roles)s::text[]))
     ORDER BY m.sequence {order} LIMIT (SELECT %(limit)s::bigint)
), sized AS (
    SELECT page.*,
           (256 + octet_length(content) + coalesce(octet_length(metadata), 0)
                + coalesce(octet_length(attachments), 0))::bigint AS size
      FROM page
)
SELECT {"session.*," if first else ""} m.id::text, m.sequence, m.revision, m.role,
       CASE WHEN m.size <= %(message_bytes)s THEN m.content END,
       CASE WHEN m.size <= %(message_bytes)s THEN m.metadata END,
       m.created_at,
       CASE WHEN m.size <= %(message_bytes)s THEN m.attachments END,
       m.language_code, m.state, m.author_kind, m.author_id, m.redacted, m.size,
       CASE WHEN {IS_FIRST_ROW} THEN chat_sessions.revision END,
       CASE WHEN {IS_FIRST_ROW} THEN chat_sessions.epoch END
  FROM chat_sessions
  LEFT JOIN sized m ON true
  {SESSION if first else ""}
 WHERE chat_sessions.tenant_id = %(tenant_id)s AND chat_sessions.id = %(session_id)s::uuid
 ORDER BY m.sequence {order}
"""


FIRST_ASC = _statement("ASC", first=True)
FIRST_DESC = _statement("DESC", first=True)
LIST_ASC = _statement("ASC")
LIST_DESC = _statement("DESC")


async def page(
    db: Database | Transaction,
    tenant_id: str,
    session_id: str,
    *,
    first: bool,
    after: int,
    before: int,
    descending: bool,
    roles: list[str] | None,
    limit: int,
) -> MessagePage:
    """The messages with after < sequence < before, in order; fewer than `limit` if large."""
    params = {
        "tenant_id": tenant_id,
        "session_id": session_id,
        "after": after,
        "before": before,
        "roles": roles,
    }

    async def read(
        *, limit: int, message_bytes: int
    ) -> tuple[tuple[Session | None, int, str], list[Row]]:
        bounds = {**params, "limit": limit, "message_bytes": message_bytes}
        session = None
        if first:
            # A filter on roles may skip many messages. That is too slow for a shared connection.
            fetch = db.fetch_typed
            if (
                isinstance(db, Database)
                and limit <= PIPELINED_MAX_ROWS
                and message_bytes <= FIRST_READ_MESSAGE_BYTES
                and roles is None
            ):
                fetch = db.fetch_pipelined
            session_rows = await fetch(
                FIRST_DESC if descending else FIRST_ASC, bounds, SESSION_TYPES + ROW_TYPES
            )
            width = len(SESSION_TYPES)
            rows = [row[width:] for row in session_rows]
            session = Session._make(session_rows[0][:width]) if session_rows else None
        else:
            rows = await db.fetch_typed(LIST_DESC if descending else LIST_ASC, bounds, ROW_TYPES)
        if not rows:
            raise sessions.not_found(session_id)
        return (session, *history(rows[0])), rows if size(rows[0]) else []

    message_bytes = min(FIRST_READ_MESSAGE_BYTES, messages.PAGE_BYTES // limit)
    found, rows = await read(limit=limit, message_bytes=message_bytes)
    if rows and content(rows[0]) is None:
        found, rows = await read(limit=_count_that_fits(rows), message_bytes=UNLIMITED_BYTES)
        return MessagePage(*found, rows, more=bool(rows))
    contents = list(map(content, rows))
    end = contents.index(None) if None in contents else len(rows)
    return MessagePage(*found, rows[:end], more=end < len(rows) or len(rows) == limit)


def _count_that_fits(rows: list[Row]) -> int:
    """How many of these messages fit into a page; at least one."""
    totals = itertools.accumulate(map(size, rows))
    return max(1, [total <= messages.PAGE_BYTES for total in totals].count(True))
