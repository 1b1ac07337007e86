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
# author_kind, author_id, redacted, size, epoch.
# `created_at` is in microseconds since PostgreSQL's epoch, 2000-01-01. `attachments` is a JSON
# array of the columns of the attachments. A message that exceeds the size limit of the read has no
# content, metadata or attachments. The first row is the session's: it has only a revision and an
# epoch.
Row = tuple[
    bytes, int, int, bytes, bytes, bytes | None, int, bytes | None, bytes | None, bytes | None,
    bytes | None, bytes | None, bool, int, str | None,
]  # fmt: skip
ROW_TYPES = (
    BYTES, INTEGER, INTEGER, BYTES, BYTES, BYTES, INTEGER, BYTES, BYTES, BYTES,
    BYTES, BYTES, BOOL, INTEGER, TEXT,
)  # fmt: skip
sequence, content, size = itemgetter(1), itemgetter(4), itemgetter(13)
history = itemgetter(2, 14)

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


NO_SESSION = ", ".join(["NULL"] * len(SESSION_TYPES))


def _statement(order: LiteralString, *, first: bool = False) -> LiteralString:
    """The session's row, and a page of messages. No row means no session.

    On the first page, the session's row has the whole session. On the others it does not, as labels
    can be long.

    Attachments are looked up per message, unless the tenant has none, which saves a quarter of the
    statement. With a join, the planner may read all attachments of the tenant, or compare all
    attachments of the page with each message. EXISTS is faster than an aggregate over no rows. The
    first OFFSET 0 keeps the planner from turning EXISTS into a hash of all attachments. ORDER BY
    keeps it from reading other tenants' attachments until it finds one of this tenant.

    The second OFFSET 0 keeps it from computing the size for each column that depends on it.

    The planner does not see values that come from a SELECT. If it did, it would plan each page of
    long sessions anew, which takes twice as long as to read the first one.
    """
    return f"""
WITH page AS (
    SELECT m.id::text AS id, m.sequence, m.revision, m.role, m.content,
           m.metadata::text AS metadata, m.created_at,
           CASE WHEN coalesce((
               SELECT true FROM chat_attachments a
                WHERE a.tenant_id = %(tenant_id)s ORDER BY a.message_id LIMIT 1), false)
            AND EXISTS (
               SELECT FROM chat_attachments a
                WHERE a.tenant_id = m.tenant_id AND a.message_id = m.id OFFSET 0)
           THEN {messages.ATTACHMENTS}::text END AS attachments,
           m.language_code, m.state, m.author_kind, m.author_id, m.redacted
      FROM chat_messages m
     WHERE m.tenant_id = %(tenant_id)s AND m.session_id = %(session_id)s::uuid
       AND m.sequence > (SELECT %(after)s::bigint) AND m.sequence < (SELECT %(before)s::bigint)
       AND (%(roles)s::text[] IS NULL OR m.role = ANY (%(roles)s::text[]))
     ORDER BY m.sequence {order} LIMIT (SELECT %(limit)s::bigint)
), sized AS (
    SELECT page.*,
           (256 + octet_length(content) + coalesce(octet_length(metadata), 0)
                + coalesce(octet_length(attachments), 0))::bigint AS size
      FROM page OFFSET 0
)
SELECT {f"{sessions.COLUMNS}," if first else ""} NULL AS id, NULL AS sequence,
       chat_sessions.revision, NULL AS role, NULL AS content, NULL AS metadata,
       NULL AS created_at, NULL AS attachments, NULL AS language_code, NULL AS state,
       NULL AS author_kind, NULL AS author_id, NULL AS redacted, NULL AS size, chat_sessions.epoch
  FROM chat_sessions
 WHERE chat_sessions.tenant_id = %(tenant_id)s AND chat_sessions.id = %(session_id)s::uuid
UNION ALL
SELECT {f"{NO_SESSION}," if first else ""} id, sequence, revision, role,
       CASE WHEN size <= %(message_bytes)s THEN content END,
       CASE WHEN size <= %(message_bytes)s THEN metadata END,
       created_at,
       CASE WHEN size <= %(message_bytes)s THEN attachments END,
       language_code, state, author_kind, author_id, redacted, size, NULL
  FROM sized
 ORDER BY sequence {order} NULLS FIRST
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
        fetch = db.fetch_typed
        if not first:
            rows = await fetch(LIST_DESC if descending else LIST_ASC, bounds, ROW_TYPES)
        else:
            # A filter on roles may skip many messages. That is too slow for a shared connection.
            if (
                isinstance(db, Database)
                and limit <= PIPELINED_MAX_ROWS
                and message_bytes <= FIRST_READ_MESSAGE_BYTES
                and roles is None
            ):
                fetch = db.fetch_pipelined
            rows = await fetch(
                FIRST_DESC if descending else FIRST_ASC, bounds, SESSION_TYPES + ROW_TYPES
            )
        if not rows:
            raise sessions.not_found(session_id)
        if not first:
            return (None, *history(rows[0])), rows[1:]
        width = len(SESSION_TYPES)
        session = Session._make(rows[0][:width])
        return (session, session.revision, session.epoch), [row[width:] for row in rows[1:]]

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
