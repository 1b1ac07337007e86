"""Pages of a tenant's sessions, by the time of their creation or of their last change."""

from datetime import datetime
from typing import LiteralString, NamedTuple

from chat_ticket_svc.store import sessions
from chat_ticket_svc.store.database import Database
from chat_ticket_svc.store.sessions import Session


class Filter(NamedTuple):
    """Which sessions to list. None does not filter. Ranges include the start, not the end."""

    statuses: list[str] | None
    has_ticket: bool | None
    created_from: datetime | None
    created_to: datetime | None
    updated_from: datetime | None
    updated_to: datetime | None
    user_id: str | None
    labels: str | None  # a JSON object: a session must have all of its pairs


STATUSES: tuple[LiteralString, ...] = ("active", "resolved", "archived")

# A session is created before it is updated. This and the conditions on updated_hour are implied by
# the others. They let the indexes be used.
RANGES = """
   AND (%(created_from)s::timestamptz IS NULL
        OR (created_at >= %(created_from)s::timestamptz
            AND updated_hour > %(created_from)s::timestamptz - interval '1 hour'))
   AND (%(created_to)s::timestamptz IS NULL OR created_at < %(created_to)s::timestamptz)
   AND (%(updated_from)s::timestamptz IS NULL
        OR (updated_at >= %(updated_from)s::timestamptz
            AND updated_hour > %(updated_from)s::timestamptz - interval '1 hour'))
   AND (%(updated_to)s::timestamptz IS NULL
        OR (updated_at < %(updated_to)s::timestamptz
            AND created_at < %(updated_to)s::timestamptz
            AND updated_hour < %(updated_to)s::timestamptz))
"""

BY_CREATE_TIME = "chat_sessions.created_at DESC, chat_sessions.id DESC"

BY_UPDATE_TIME = (
    "chat_sessions.updated_hour DESC, chat_sessions.updated_at DESC, chat_sessions.id DESC"
)

PAGE_BY_CREATE_TIME = f"""
   {RANGES}
   AND (created_at, id) < (%(after_time)s::timestamptz, %(after_id)s::uuid)
 ORDER BY {BY_CREATE_TIME}
 LIMIT %(limit)s
"""

PAGE_BY_UPDATE_TIME = f"""
   {RANGES}
   AND (updated_at, id) < (%(after_time)s::timestamptz, %(after_id)s::uuid)
   AND updated_hour <= %(after_time)s::timestamptz
 ORDER BY {BY_UPDATE_TIME}
 LIMIT %(limit)s
"""

# The labels of a page of sessions can have ten times the bytes of a response. So the rows end with
# the one that exceeds this: twice the bytes of a response, as JSON is at most twice as long as what
# it becomes there. They fill the response then.
LABEL_BYTES = 6 * 1024 * 1024


def _sized(order: LiteralString, page: LiteralString) -> LiteralString:
    return f"""
SELECT {sessions.COLUMNS}
  FROM (SELECT *, sum(octet_length(labels::text)) OVER before AS bytes_before
          FROM ({page}) AS chat_sessions
        WINDOW before AS (ORDER BY {order} ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING)
       ) AS chat_sessions
 WHERE bytes_before IS NULL OR bytes_before <= {LABEL_BYTES}
 ORDER BY {order}
"""


LIST_BY_CREATE_TIME = _sized(
    BY_CREATE_TIME,
    f"SELECT * FROM chat_sessions WHERE tenant_id = %(tenant_id)s {PAGE_BY_CREATE_TIME}",
)

LIST_BY_UPDATE_TIME = _sized(
    BY_UPDATE_TIME,
    f"SELECT * FROM chat_sessions WHERE tenant_id = %(tenant_id)s {PAGE_BY_UPDATE_TIME}",
)

# The two conditions on labels are the same. The second lets the index be used. The first is cheap
# to judge where the sessions are read in order. Together they let the planner take a label that it
# has not seen for rare: by the second alone it expects one in 200 sessions to have it, and would
# read all sessions of a tenant in order to find the few.
IDENTITY = """
   AND (%(user_id)s::text IS NULL OR user_id = %(user_id)s::text)
   AND (%(labels)s::jsonb IS NULL
        OR (labels @> %(labels)s::jsonb
            AND label_pairs(tenant_id COLLATE "C", labels)
                @> label_pairs(%(tenant_id)s::text, %(labels)s::jsonb)))
   AND (%(statuses)s::text[] IS NULL OR status = ANY (%(statuses)s::text[]))
   AND (%(has_ticket)s::boolean IS NULL OR has_ticket = %(has_ticket)s::boolean)
"""

LIST_OF_IDENTITY_BY_CREATE_TIME = _sized(
    BY_CREATE_TIME,
    f"SELECT * FROM chat_sessions WHERE tenant_id = %(tenant_id)s {IDENTITY} {PAGE_BY_CREATE_TIME}",
)

LIST_OF_IDENTITY_BY_UPDATE_TIME = _sized(
    BY_UPDATE_TIME,
    f"SELECT * FROM chat_sessions WHERE tenant_id = %(tenant_id)s {IDENTITY} {PAGE_BY_UPDATE_TIME}",
)


def _of_each_kind(order: LiteralString, page: LiteralString) -> LiteralString:
    """The pages of sessions of each status, with and without a ticket: what the filter admits.

    Each page is a range of an index. In the order of all sessions, PostgreSQL reads all of them to
    find those of a rare status. The kinds are constants, and the statement is not prepared, so that
    the planner knows which are rare, and drops those that the filter does not admit.
    """
    kinds: list[LiteralString] = [
        f"""(
SELECT * FROM chat_sessions
 WHERE tenant_id = %(tenant_id)s AND status = '{status}' AND has_ticket = {has_ticket}
   AND (%(statuses)s::text[] IS NULL OR '{status}' = ANY (%(statuses)s::text[]))
   AND (%(has_ticket)s::boolean IS NULL OR {has_ticket} = %(has_ticket)s::boolean)
   {page})"""
        for status in STATUSES
        for has_ticket in ("true", "false")
    ]
    return f"""
SELECT * FROM ({" UNION ALL ".join(kinds)}) AS chat_sessions
 ORDER BY {order}
 LIMIT %(limit)s
"""


LIST_OF_KIND_BY_CREATE_TIME = _sized(
    BY_CREATE_TIME, _of_each_kind(BY_CREATE_TIME, PAGE_BY_CREATE_TIME)
)

LIST_OF_KIND_BY_UPDATE_TIME = _sized(
    BY_UPDATE_TIME, _of_each_kind(BY_UPDATE_TIME, PAGE_BY_UPDATE_TIME)
)


async def page(
    db: Database,
    tenant_id: str,
    session_filter: Filter,
    *,
    by_update_time: bool,
    after_time: datetime,
    after_id: str,
    limit: int,
) -> list[Session]:
    """A page of sessions, newest first, that starts after (after_time, after_id) in this order.

    It has fewer than `limit` sessions if more follow and their labels do not fit into a response.
    """
    params = {
        "tenant_id": tenant_id,
        "after_time": after_time,
        "after_id": after_id,
        "limit": limit,
        **session_filter._asdict(),
    }
    of_identity = session_filter.user_id is not None or session_filter.labels is not None
    of_kind = session_filter.statuses is not None or session_filter.has_ticket is not None
    return await db.fetch_all(
        (LIST_OF_IDENTITY_BY_UPDATE_TIME if by_update_time else LIST_OF_IDENTITY_BY_CREATE_TIME)
        if of_identity
        else (LIST_OF_KIND_BY_UPDATE_TIME if by_update_time else LIST_OF_KIND_BY_CREATE_TIME)
        if of_kind
        else (LIST_BY_UPDATE_TIME if by_update_time else LIST_BY_CREATE_TIME),
        params,
        Session,
        prepare=False,
    )
