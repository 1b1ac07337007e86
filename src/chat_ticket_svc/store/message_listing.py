"""The messages of a session in pages, as the bytes that the database sends.

What a list costs is what is done to each row, so nothing is that need not be: text stays as it is
stored, in UTF-8, and a time the integer that it is. convert.py turns such rows into the bytes of
the response.
"""

import itertools
from operator import itemgetter
from typing import LiteralString, NamedTuple

from chat_ticket_svc.store import messages, sessions
from chat_ticket_svc.store.database import PIPELINED_MAX_ROWS, Database
from chat_ticket_svc.store.sessions import Session
from chat_ticket_svc.store.transaction import BOOL, BYTES, INTEGER, TEXT

# id, sequence, revision, role, content, metadata, created_at, files, size: of a message that is too
# large for its page, all but the content, metadata and files. `created_at` is in microseconds since
# PostgreSQL's epoch, 2000-01-01; `files` is a JSON array of the columns of the attachments.
Row = tuple[bytes, int, int, bytes, bytes, bytes | None, int, bytes | None, int]
ROW = (BYTES, INTEGER, INTEGER, BYTES, BYTES, BYTES, INTEGER, BYTES, INTEGER)
sequence, content, size = itemgetter(1), itemgetter(4), itemgetter(8)

SESSION = (TEXT, TEXT, TEXT, BOOL, INTEGER, INTEGER, INTEGER)


class Page(NamedTuple):
    """Some messages in order, and whether there may be more behind them.

    `session` is there with the first page, which was read in the same snapshot.
    """

    session: Session | None
    rows: list[Row]
    more: bool


# A page of the most rows, each of this size at most, has PAGE_BYTES. Larger messages are looked at
# again, as many as come to as much.
WHOLE_BYTES = 2048
ANY_BYTES = 2**31 - 1


def _list(columns: LiteralString, order: LiteralString) -> LiteralString:
    """No row at all says that the session is gone; one without a message, that none is left.

    Attachments are looked up for each message: a join may become a look at all of the tenant's, or
    of the page's for each message. To ask first is faster than to find nothing to aggregate, and
    OFFSET 0 keeps the question from becoming a hash of all that there are.
    """
    return f"""
WITH page AS MATERIALIZED (
    SELECT m.id, m.sequence, m.revision, m.role, m.content, m.metadata::text AS metadata,
           m.created_at,
           CASE WHEN EXISTS (
               SELECT FROM chat_attachments a
                WHERE a.tenant_id = m.tenant_id AND a.message_id = m.id OFFSET 0)
           THEN {messages.ATTACHMENTS}::text END AS files
      FROM chat_messages m
     WHERE m.tenant_id = %(tenant_id)s AND m.session_id = %(session_id)s::uuid
       AND m.sequence > %(after)s AND m.sequence < %(before)s
       AND (%(roles)s::text[] IS NULL OR m.role = ANY (%(roles)s::text[]))
     ORDER BY m.sequence {order} LIMIT %(limit)s
), sized AS (
    SELECT page.*,
           (256 + octet_length(content) + coalesce(octet_length(metadata), 0)
                + coalesce(octet_length(files), 0))::bigint AS size
      FROM page
)
SELECT {columns} m.id::text, m.sequence, m.revision, m.role,
       CASE WHEN m.size <= %(whole)s THEN m.content END,
       CASE WHEN m.size <= %(whole)s THEN m.metadata END,
       m.created_at,
       CASE WHEN m.size <= %(whole)s THEN m.files END,
       m.size
  FROM chat_sessions
  LEFT JOIN sized m ON true
 WHERE chat_sessions.tenant_id = %(tenant_id)s AND chat_sessions.id = %(session_id)s::uuid
 ORDER BY m.sequence {order}
"""


FIRST_ASC = _list(f"{sessions.COLUMNS},", "ASC")
FIRST_DESC = _list(f"{sessions.COLUMNS},", "DESC")
LIST_ASC = _list("", "ASC")
LIST_DESC = _list("", "DESC")


async def page(
    db: Database,
    tenant_id: str,
    session_id: str,
    *,
    first: bool,
    after: int,
    before: int,
    descending: bool,
    roles: list[str] | None,
    limit: int,
) -> Page:
    """The messages with after < sequence < before, in order; fewer than `limit` if large."""
    params = {
        "tenant_id": tenant_id,
        "session_id": session_id,
        "after": after,
        "before": before,
        "roles": roles,
    }

    async def read(*, limit: int, whole: int) -> tuple[Session | None, list[Row]]:
        bounds = {**params, "limit": limit, "whole": whole}
        session = None
        if first:
            # Those of some roles may be far apart.
            are_few = limit <= PIPELINED_MAX_ROWS and whole <= WHOLE_BYTES and roles is None
            found = await (db.fetch_pipelined if are_few else db.fetch_typed)(
                FIRST_DESC if descending else FIRST_ASC, bounds, SESSION + ROW
            )
            rows = [row[len(SESSION) :] for row in found]
            session = Session._make(found[0][: len(SESSION)]) if found else None
        else:
            rows = await db.fetch_typed(LIST_DESC if descending else LIST_ASC, bounds, ROW)
        if not rows:
            raise sessions.not_found(session_id)
        return session, rows if size(rows[0]) else []

    session, rows = await read(limit=limit, whole=WHOLE_BYTES)
    if rows and content(rows[0]) is None:
        session, rows = await read(limit=_fitting(rows), whole=ANY_BYTES)
        return Page(session, rows, more=bool(rows))
    contents = list(map(content, rows))
    cut = contents.index(None) if None in contents else len(rows)
    return Page(session, rows[:cut], more=cut < len(rows) or len(rows) == limit)


def _fitting(rows: list[Row]) -> int:
    """How many of them a page holds."""
    totals = itertools.accumulate(map(size, rows))
    return max(1, [total <= messages.PAGE_BYTES for total in totals].count(True))
