"""The change feed of a tenant: which of its sessions and tickets have changed.

Each row has the position of its last change: the epoch and the transaction id (see the migration
"change positions and epochs"). Transactions end in another order than that of their ids. But those
below pg_snapshot_xmin have all ended. So a reader takes this bound as the end of a pass, reads all
rows from the start of the pass on, and goes on from its end. That needs no clock and no lock, and
the pages of a pass can be read in any number of transactions.

A crash of the database can lose how transactions ended that changed nothing, and then their ids are
given again. So a bound is used only when the WAL has been flushed up to where it was read.

A pass also has the rows whose last change is at its end or later, if they are visible already. The
next pass has them again. Otherwise a session that changes all the time would not be told while
transactions overlap, as its last change would always be beyond the end. And a follower that has
come to a position would not know all that was changed before it, so that what has left its filter
could not be judged by the last changes.

A pass is read in the order of the indexes: by section, bucket and id.
"""

import asyncio
from dataclasses import dataclass, field
from typing import Any, LiteralString, NamedTuple

from chat_ticket_svc import errors
from chat_ticket_svc.store.columns import columns, type_ids
from chat_ticket_svc.store.database import Database
from chat_ticket_svc.store.sessions import Session
from chat_ticket_svc.store.tickets import Ticket

SESSION, DELETED_SESSION, TICKET, DELETED_TICKET = SECTIONS = range(4)

BUCKET_BITS = 16  # as in the triggers
MAX_POSITION = 2**63 - 1
ROW_BYTES = 1024  # of a row without labels
# How long to wait for the WAL before the next look. It doubles.
MIN_RETRY_SECONDS = 0.001
MAX_RETRY_SECONDS = 0.1
# If nothing flushes it before a wait of this length, the feed does.
FORCED_RETRY_SECONDS = 0.03
MAX_ID = "ffffffff-ffff-ffff-ffff-ffffffffffff"


class Place(NamedTuple):
    """How far a follower has come: it has been told all changes before `start`.

    If `end` is set, it is reading the pass up to there. It has read the sections before `section`,
    and this one up to `bucket` and `id`. Without an id, nothing of this section.
    """

    start: int
    end: int | None = None
    section: int = SESSION
    bucket: int = 0
    id: str = ""


class Row(NamedTuple):
    """A session or a ticket that has changed, or the id of one that was deleted.

    A deleted one has nothing else, and a ticket has the fields of a ticket.
    """

    section: int
    feed_position: int
    id: str
    status: str
    has_ticket: bool
    revision: int
    created_at: int
    updated_at: int
    user_id: str | None
    title: str | None
    labels: str | None
    epoch: str
    filter_position: int
    filter_before: str | None
    external_ref: str | None
    feed_bucket: int

    def ticket(self, tenant_id: str) -> Ticket:
        return Ticket(
            self.id, tenant_id, self.title or "", self.status, self.created_at, self.updated_at,
            self.external_ref, self.revision,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Page:
    """Rows of a pass, in its order, after `place` and up to `next`."""

    place: Place
    next: Place
    rows: list[Row]
    epoch_id: str
    # Where a pass would end that begins now, and where it would if no transaction were running.
    horizon: int
    newest: int
    # The end of the WAL: all that was read is before it. None if it is not known.
    wal_position: int | None
    # What is made of the page once for all who need the same.
    cache: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def pass_end(self) -> int:
        return self.next.start if self.next.end is None else self.next.end

    @property
    def size(self) -> int:
        """About how many bytes it has."""
        return sum(ROW_BYTES + len(row.labels or "") for row in self.rows)

    def place_after(self, row: Row) -> Place:
        """Where a follower is that knows the rows up to this one."""
        return Place(self.place.start, self.pass_end, row.section, row.feed_bucket, row.id)

    def rows_again(self) -> list[Row]:
        """Those that the next pass has again, as their last change is at its start or later."""
        return [row for row in self.rows if row.feed_position >= self.pass_end]


class Epoch(NamedTuple):
    """A history of the database.

    `branch_position` is where in the WAL it leaves the epoch before. None if it is not known.
    """

    id: str
    branch_position: int | None


def _select_list(row: dict[str, LiteralString]) -> LiteralString:
    """The columns of a Row after its section. NULL for those that `row` does not have."""
    return ", ".join(row.get(name, "NULL") for name in Row._fields[1:])


def _section(
    number: LiteralString,
    table: LiteralString,
    id_column: LiteralString,
    row: dict[str, LiteralString],
    condition: LiteralString = "true",
) -> LiteralString:
    """The rows of one section, as a range of the index of its table.

    PostgreSQL judges the conditions without a column first. If they fail, it reads nothing.

    The planner does not see values that come from a SELECT. With the limit in sight, and without
    statistics, it would rather read and sort the whole range. And with the place in sight, it would
    plan nearly every page anew.
    """
    return f"""
(SELECT {number}::bigint, {_select_list({**row, "id": f"{id_column}::text"})}
   FROM {table}
  WHERE tenant_id = %(tenant_id)s
    AND %(reads_{number})s::boolean AND (SELECT start < pass_end FROM bounds)
    AND (feed_bucket, {id_column})
        > ((SELECT %(bucket_{number})s::bigint), (SELECT %(id_{number})s::uuid))
    AND feed_position >= (SELECT start FROM bounds)
    AND {condition}
  ORDER BY feed_bucket, {id_column} LIMIT (SELECT %(limit)s::bigint))
"""


_BOUNDS: dict[str, LiteralString] = {
    "feed_position": "start",
    "id": "epoch_id",
    "has_ticket": "chat_wal_is_flushed(wal_position)",
    "revision": "horizon",
    "created_at": "newest",
    "updated_at": "wal_position",
    "filter_position": "swept_position",
    "feed_bucket": "0",
}
_DELETED: dict[str, LiteralString] = {
    "feed_position": "feed_position",
    "feed_bucket": "feed_bucket",
}
_SESSION: dict[str, LiteralString] = {
    **columns(Session),
    **_DELETED,
    "filter_position": "filter_position",
    "filter_before": "filter_before::text",
}
_TICKET: dict[str, LiteralString] = {**columns(Ticket), **_DELETED}

# A ticket whose id is used again, against the rules, exists. OFFSET 0 keeps the planner from
# turning EXISTS into a hash of all tickets of the tenant.
_NOT_USED_AGAIN = """
NOT EXISTS (
    SELECT FROM tickets u WHERE u.tenant_id = t.tenant_id AND u.id = t.ticket_id OFFSET 0)
"""

# The ids are qualified: otherwise ORDER BY would mean the text that is selected, and would sort.
#
# The first row has the bounds. All parts of the statement have one snapshot.
PAGE = f"""
WITH bounds AS MATERIALIZED (
    SELECT *, coalesce(%(start)s::bigint, horizon) AS start,
           coalesce(%(end)s::bigint, horizon) AS pass_end
      FROM (
          SELECT e.id AS epoch_id,
                 chat_feed_position(e.ordinal, pg_snapshot_xmin(pg_current_snapshot())) AS horizon,
                 chat_feed_position(e.ordinal, pg_snapshot_xmax(pg_current_snapshot())) AS newest,
                 chat_wal_position() AS wal_position,
                 (SELECT max(swept_position) FROM chat_epochs) AS swept_position
            FROM chat_epochs e ORDER BY e.ordinal DESC LIMIT 1
      ) AS latest
)
SELECT -1::bigint, {_select_list(_BOUNDS)} FROM bounds
UNION ALL {_section("0", "chat_sessions", "chat_sessions.id", _SESSION)}
UNION ALL {_section("1", "chat_session_tombstones s", "s.session_id", _DELETED)}
UNION ALL {_section("2", "tickets t", "t.id", _TICKET)}
UNION ALL {_section("3", "ticket_tombstones t", "t.ticket_id", _DELETED, _NOT_USED_AGAIN)}
"""

ROW_TYPES = type_ids(Row)

ENSURE_EPOCH = "SELECT (current_chat_epoch()).id"

# PostgreSQL flushes what transactions write without committing only every 15 seconds, if nobody
# commits meanwhile. The commit of an empty transaction with an id lets it flush all in 0.2 seconds.
COMMIT_EMPTY_TRANSACTION = "SELECT pg_current_xact_id()::text"

IS_FLUSHED = "SELECT chat_wal_is_flushed(%(wal_position)s)"

LIST_EPOCHS = "SELECT id, (branch_lsn - '0/0')::bigint FROM chat_epochs ORDER BY ordinal"


async def ensure_epoch(db: Database) -> None:
    """Begin an epoch if the database is another one than that of the last epoch."""
    await db.write(ENSURE_EPOCH, {}, str, idempotent=True)


async def list_epochs(db: Database) -> list[Epoch]:
    """The epochs of this database, in order."""
    return await db.fetch_all(LIST_EPOCHS, {}, Epoch)


async def page(db: Database, tenant_id: str, place: Place | None, limit: int) -> Page:
    """Read what comes after `place`: at most `limit` rows.

    Without a place, nothing is read, and `next` is where a follower begins that begins now. Raises
    OutOfRangeError if a deletion after `place` may be forgotten, or if no history has this place.
    """
    due = [section for section in SECTIONS if place is not None and _is_due(place, section)]
    params = _params(tenant_id, place, due, limit)
    for is_last_attempt in (False, True):
        rows = await db.fetch_typed(PAGE, params, ROW_TYPES)
        bounds, *changed = map(Row._make, sorted(rows, key=_order))
        if place is None or max(place.start, place.end or 0) <= bounds.revision:
            break
        if is_last_attempt:
            raise errors.OutOfRangeError(
                "the cursor is of another history of the database", reason="HISTORY_CHANGED"
            )
        # A standby was promoted that lacks the last changes, and nothing was written since.
        await ensure_epoch(db)
    if (place is None or place.end is None) and not bounds.has_ticket:
        await _wait_until_flushed(db, bounds.updated_at)
    start, swept_position = bounds.feed_position, bounds.filter_position
    place = place or Place(start)
    known = place.start or place.end
    if known and known < swept_position:
        raise errors.OutOfRangeError(
            "the cursor is too old: deletions after it may be forgotten", reason="CURSOR_EXPIRED"
        )
    pass_end = place.end or bounds.revision
    end, following = len(changed), Place(max(start, pass_end))
    for section in due:
        of_section = [index for index, row in enumerate(changed) if row.section == section]
        if len(of_section) == limit:
            end = of_section[-1] + 1
            last = changed[end - 1]
            following = Place(start, pass_end, section, last.feed_bucket, last.id)
            break
    else:
        if place.id and place.section < DELETED_TICKET:
            following = Place(start, pass_end, place.section + 1)
    return Page(
        place, following, changed[:end], bounds.id, bounds.revision, bounds.created_at,
        bounds.updated_at,
    )  # fmt: skip


def _order(row: tuple[Any, ...]) -> tuple[int, int, str]:
    """That of a pass: by section, bucket and id."""
    return row[0], row[-1], row[2]


async def _wait_until_flushed(db: Database, wal_position: int) -> None:
    """Wait until a crash keeps all that was visible, also the end of transactions."""
    retry_seconds = MIN_RETRY_SECONDS
    has_forced = False
    while True:
        await asyncio.sleep(retry_seconds)
        [is_flushed] = await db.fetch_all(IS_FLUSHED, {"wal_position": wal_position}, bool)
        if is_flushed:
            return
        if not has_forced and retry_seconds > FORCED_RETRY_SECONDS:
            has_forced = True
            await db.write(COMMIT_EMPTY_TRANSACTION, {}, str, idempotent=True)
        retry_seconds = min(2 * retry_seconds, MAX_RETRY_SECONDS)


def _is_due(place: Place, section: int) -> bool:
    """Whether the next page reads this section. In the middle of one, it reads nothing else."""
    if place.start == 0 and section in (DELETED_SESSION, DELETED_TICKET):
        return False  # the follower knows of nothing that could be deleted
    return section == place.section if place.id else section >= place.section


def _params(tenant_id: str, place: Place | None, due: list[int], limit: int) -> dict[str, Any]:
    start = None if place is None else place.start
    params: dict[str, Any] = {
        "tenant_id": tenant_id,
        "start": start,
        "end": None if place is None else place.end,
        "limit": limit,
    }
    for section in SECTIONS:
        params[f"reads_{section}"] = section in due
        params[f"bucket_{section}"] = ((start or 0) >> BUCKET_BITS) - 1
        params[f"id_{section}"] = MAX_ID
    if place is not None and place.id:
        params[f"bucket_{place.section}"] = place.bucket
        params[f"id_{place.section}"] = place.id
    return params
