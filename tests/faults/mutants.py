"""The service with one of its promises broken.

For the harness only: the checker must find each of them, and say what is wrong.
"""

import asyncio
import contextlib
import itertools
import os
import re
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from chat_ticket_svc.services import change_feed_cursor, shown_drafts
from chat_ticket_svc.store import (
    append,
    change_feed,
    connection,
    draft_commit,
    drafts,
    group_commit,
    messages,
    session_changes,
    sessions,
)
from chat_ticket_svc.store.transaction import Transaction
from chat_ticket_svc.watch import hub


@dataclass(frozen=True)
class Mutant:
    """One of the checker's findings must contain one of `finds`."""

    switch_on: Callable[[], None]
    fault: str
    finds: tuple[str, ...]
    amount: float = 3  # of the fault


def _no_row_lock() -> None:
    """The revision is read where no lock is held."""
    _replace(
        append,
        "APPEND",
        "SET revision = revision + %(count)s::integer",
        "SET revision = %(count)s::integer + (SELECT seen.revision FROM chat_sessions seen"
        " WHERE seen.tenant_id = %(tenant_id)s AND seen.id = %(session_id)s::uuid)",
    )
    _each_alone()


def _order_by_now() -> None:
    """Times are of when the transaction began, not of when it had the lock."""
    _replace(append, "APPEND", "next_change_time(updated_at)", "now()")
    _each_alone()


def _key_without_tenant() -> None:
    _replace(messages, "GET", "m.tenant_id = %(tenant_id)s AND ", "")
    _replace(sessions, "GET", "tenant_id = %(tenant_id)s AND ", "")


def _lost_wake_up() -> None:
    """And no poll that would replace it."""
    hub.SessionHub.wake = lambda *_: None  # type: ignore[method-assign]
    os.environ["CHAT_TICKET_WATCH_POLL_INTERVAL_SECONDS"] = "3600"


def _cursor_off_by_one() -> None:
    page: Any = session_changes.page

    async def off(*arguments: Any, after: int, **named: Any) -> Any:
        return await page(*arguments, after=after + 1 if after else after, **named)

    session_changes.page = off


def _acknowledged_before_commit() -> None:
    on, off = "('synchronous_commit', 'on')", "('synchronous_commit', 'off')"
    _replace(connection, "SET_AFTER_START", on, off)
    os.environ["DATABASE_URL"] += "&options=-csynchronous_commit%3Doff"


def _retry_with_new_id() -> None:
    """As a client would that has not thought of it."""
    original: Any = append.append_messages

    async def anew(
        db: Any, tenant_id: str, session_id: str, new: Any, *, outcome_unknown: bool, **named: Any
    ) -> Any:
        if outcome_unknown:
            new = [message._replace(id=str(uuid.uuid4())) for message in new]
        return await original(
            db, tenant_id, session_id, new, outcome_unknown=outcome_unknown, **named
        )

    append.append_messages = anew


def _draft_without_fencing() -> None:
    """The statement adds the text of whoever has the right length."""
    _replace(draft_commit, "ADD_PIECES", "d.fencing_token = new.fencing_token AND ", "")


def _draft_acknowledged_before_commit() -> None:
    async def write(self: Any, batch: Any) -> None:
        params = self._params(batch)
        for writer, text in batch:
            self._on_added(writer, text)
        with contextlib.suppress(Exception):
            await self._db.write_pipelined(draft_commit.ADD_PIECES, params)

    draft_commit.DraftGroupCommit._write_batch = write  # type: ignore[method-assign]


def _draft_finished_in_two_transactions() -> None:
    """The draft is removed in one, and its message is created in another."""
    execute: Any = Transaction.execute

    async def committed(self: Any, sql: Any, params: Any) -> None:
        await execute(self, sql, params)
        if sql is drafts.DELETE:
            await execute(self, "COMMIT", {})
            await asyncio.sleep(0.1)
            await execute(self, "BEGIN", {})

    Transaction.execute = committed  # type: ignore[method-assign]


def _follower_skips_a_piece() -> None:
    """Every tenth response with text has none."""
    serialized: Any = shown_drafts._serialized
    texts = itertools.count()

    def skipped(draft: Any, draft_id: str, length: int) -> bytes:
        if length != shown_drafts.WHOLE and next(texts) % 10 == 9:
            return b""
        return serialized(draft, draft_id, length)  # type: ignore[no-any-return]

    shown_drafts._serialized = skipped


def _feed_by_update_time() -> None:
    """Its watermark is the time, as of a caller that polls for `start_update_time`."""
    position = "((1::bigint << 48) | (extract(epoch FROM {}) * 1000)::bigint)"
    now = position.format("clock_timestamp()")
    page, count = re.subn(
        r"chat_feed_position\(.*\) AS (horizon|newest)", rf"{now} AS \1", change_feed.PAGE
    )
    assert count == 2, "PAGE has changed: this is no mutant any more"
    bounds, *sections = page.split("UNION ALL")
    for number, section in enumerate(sections):
        is_deleted = number in (change_feed.DELETED_SESSION, change_feed.DELETED_TICKET)
        time = position.format("deleted_at" if is_deleted else "updated_at")
        sections[number] = section.replace("feed_bucket", f"({time} >> 16)").replace(
            "feed_position", time
        )
    change_feed.PAGE = "UNION ALL".join([bounds, *sections])


def _feed_up_to_newest_transaction() -> None:
    """It goes on after the newest transaction, although older ones may be running."""
    horizon = "pg_snapshot_{}(pg_current_snapshot())) AS horizon"
    _replace(change_feed, "PAGE", horizon.format("xmin"), horizon.format("xmax"))


def _feed_leaves_out_what_changes_again() -> None:
    """A pass has only what has changed last below its end."""
    start = "feed_position >= (SELECT start FROM bounds)"
    end = "feed_position < (SELECT pass_end FROM bounds)"
    _replace(change_feed, "PAGE", start, f"{start} AND {end}")


def _feed_without_tombstones() -> None:
    is_due = change_feed._is_due
    deleted = (change_feed.DELETED_SESSION, change_feed.DELETED_TICKET)
    change_feed._is_due = lambda place, section: section not in deleted and is_due(place, section)


def _feed_loses_its_place() -> None:
    """A follower that resumes in the midst of a pass goes on after its end."""
    parse: Any = change_feed_cursor._parse

    def lost(text: str, digest: str) -> change_feed_cursor.Cursor:
        cursor: change_feed_cursor.Cursor = parse(text, digest)
        end = cursor.place.end
        return cursor if end is None else cursor._replace(place=change_feed.Place(end))

    change_feed_cursor._parse = lost


def _replace(module: Any, name: str, old: str, new: str) -> None:
    sql = getattr(module, name)
    assert old in sql, f"{name} has changed: this is no mutant any more"
    setattr(module, name, sql.replace(old, new))


def _each_alone() -> None:
    """Nothing is gathered: appends wait for one another's locks."""
    group_commit.MAX_BATCHED_MESSAGE_BYTES = -1


def _feed_mutant(switch_on: Callable[[], None], finds: str) -> Mutant:
    return Mutant(switch_on, "late commits, 100,000 changes", (finds,), amount=1_000)


MUTANTS = {
    "no row lock": Mutant(_no_row_lock, "none", ("never delivered", ": INTERNAL")),
    "order by now()": Mutant(_order_by_now, "none", ("are out of order",)),
    "key without tenant": Mutant(_key_without_tenant, "none", ("I6: ",)),
    "lost wake-up, no polling": Mutant(_lost_wake_up, "none", ("stopped at",)),
    "cursor off by one": Mutant(_cursor_off_by_one, "none", ("never delivered",)),
    "acknowledged before commit": Mutant(
        _acknowledged_before_commit, "PostgreSQL SIGKILL", ("is lost",)
    ),
    "retry with a new id": Mutant(
        _retry_with_new_id, "answers to commits lost", ("is there twice", "is lost")
    ),
    "draft without fencing": Mutant(
        _draft_without_fencing, "notifications lost", ("of a fenced writer",)
    ),
    "draft acknowledged before commit": Mutant(
        _draft_acknowledged_before_commit, "PostgreSQL SIGKILL", ("acknowledged text is lost",)
    ),
    "draft finished in two transactions": Mutant(
        _draft_finished_in_two_transactions, "none", ("is neither a draft nor a message",)
    ),
    "follower of drafts skips a piece": Mutant(
        _follower_skips_a_piece, "none", ("skipped a piece",)
    ),
    "feed up to the newest transaction": _feed_mutant(
        _feed_up_to_newest_transaction, "was not told session"
    ),
    "feed leaves out what changes again": _feed_mutant(
        _feed_leaves_out_what_changes_again, "which has left"
    ),
    "feed without tombstones": _feed_mutant(_feed_without_tombstones, "was deleted"),
    "feed loses its place": _feed_mutant(_feed_loses_its_place, "was not told session"),
    "feed by update time": _feed_mutant(_feed_by_update_time, "was not told session"),
}
