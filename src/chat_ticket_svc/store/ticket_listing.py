"""Lists of tickets."""

from datetime import datetime
from typing import LiteralString, NamedTuple

from chat_ticket_svc.store.database import Database
from chat_ticket_svc.store.tickets import TICKET_COLUMNS, Ticket

STATUSES: tuple[LiteralString, ...] = ("open", "pending", "solved", "closed")


class Filter(NamedTuple):
    """Which tickets to list. None does not filter. The range includes the start, not the end."""

    statuses: list[str] | None
    external_ref: str | None
    updated_from: datetime | None
    updated_to: datetime | None


# A ticket is created before it is updated. The condition on created_at is implied by the others. It
# lets the index be used.
PAGE = """
   AND (%(external_ref)s::text IS NULL OR t.external_ref = %(external_ref)s::text)
   AND (%(updated_from)s::timestamptz IS NULL OR t.updated_at >= %(updated_from)s::timestamptz)
   AND (%(updated_to)s::timestamptz IS NULL
        OR (t.updated_at < %(updated_to)s::timestamptz
            AND t.created_at < %(updated_to)s::timestamptz))
   AND (t.created_at, t.id) < (%(after_time)s::timestamptz, %(after_id)s::uuid)
 ORDER BY t.created_at DESC, t.id DESC
 LIMIT %(limit)s
"""

LIST_TICKETS = f"""
SELECT {TICKET_COLUMNS} FROM tickets t WHERE t.tenant_id = %(tenant_id)s {PAGE}
"""

# The page of each status is a range of an index. In the order of all tickets, PostgreSQL reads all
# of them to find those of a rare status. The statuses are constants, and the statement is not
# prepared, so that the planner knows which are rare, and drops those that are not wanted.
_PAGES_OF_STATUSES: list[LiteralString] = [
    f"""(
SELECT * FROM tickets t
 WHERE t.tenant_id = %(tenant_id)s AND t.status = '{status}'
   AND '{status}' = ANY (%(statuses)s::text[])
   {PAGE})"""
    for status in STATUSES
]
LIST_TICKETS_OF_STATUSES = f"""
SELECT {TICKET_COLUMNS} FROM ({" UNION ALL ".join(_PAGES_OF_STATUSES)}) AS t
 ORDER BY t.created_at DESC, t.id DESC
 LIMIT %(limit)s
"""


async def page(
    db: Database,
    tenant_id: str,
    ticket_filter: Filter,
    *,
    after_time: datetime,
    after_id: str,
    limit: int,
) -> list[Ticket]:
    """A page of tickets, newest first, that starts after (time, id) in this order."""
    params = {"after_time": after_time, "after_id": after_id, "limit": limit}
    return await db.fetch_all(
        LIST_TICKETS if ticket_filter.statuses is None else LIST_TICKETS_OF_STATUSES,
        {"tenant_id": tenant_id, **params, **ticket_filter._asdict()},
        Ticket,
        prepare=False,
    )
