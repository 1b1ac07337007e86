"""Checks what holds up the change feed, and whether a new history of the database is noticed."""

from datetime import UTC

from chat_ticket_svc.commands.check.line import OK, WARNING, Line
from chat_ticket_svc.store.feed_health import HIDDEN_AGE_SECONDS, last_epoch, oldest_holder
from chat_ticket_svc.telemetry.redaction import quote

# A follower of the feed notices nothing of shorter ones.
MAX_TRANSACTION_SECONDS = 10


async def check_holder(url: str) -> Line:
    holder = await oldest_holder(url)
    if holder is None:
        return Line(OK, "feed", "no transaction holds up the changes of others")
    if holder.seconds is not None and holder.seconds < MAX_TRANSACTION_SECONDS:
        return Line(OK, "feed", f"held up for {holder.seconds:.1f} s by the oldest transaction")
    age = (
        f"more than {HIDDEN_AGE_SECONDS:.0f} s (its age is hidden, without pg_read_all_stats)"
        if holder.seconds is None
        else f"{holder.seconds:,.0f} s"
    )
    who = f"of user {quote(holder.user)} in database {quote(holder.database)}"
    if holder.gid is not None:
        return Line(
            WARNING,
            "feed",
            f"held up for {age} by the prepared transaction {quote(holder.gid)} {who}: end it by"
            " COMMIT PREPARED or ROLLBACK PREPARED",
        )
    what = f", application {quote(holder.application)}" if holder.application else ""
    state = f", {holder.state}" if holder.state else ""
    return Line(
        WARNING,
        "feed",
        f"held up for {age} by the transaction of process {holder.pid} {who}{what}{state}:"
        " followers of the feed hear of later changes when it has ended",
    )


async def check_epoch(url: str) -> Line:
    epoch = await last_epoch(url)
    since = epoch.started_at.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    text = f"{epoch.ordinal}, since {since}"
    hidden = [
        name
        for name, is_known in {
            "system identifier": epoch.has_system_identifier,
            "timeline": epoch.has_timeline,
        }.items()
        if not is_known
    ]
    if not hidden:
        return Line(OK, "epoch", f"{text}: a promotion or a restore begins another")
    return Line(
        WARNING,
        "epoch",
        f"{text}: the owner of the schema may not read the {' or the '.join(hidden)}, so call"
        " begin_chat_epoch() after a promotion or a restore (see docs/operations/backup.md)",
    )
