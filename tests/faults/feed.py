"""The tenant's feed skips nothing, in whatever order transactions end.

Eight writers change one tenant, and followers leave and resume on both servers. What each follower
was told is compared with the database's audit of commits.
"""

import asyncio
import random
import uuid
from collections import Counter

import psycopg

from faults.checker import Seen, Violation
from faults.environment import Environment
from faults.feed_audit import read_audit
from faults.feed_checker import check_audit, check_feed
from faults.feed_followers import FeedFollowers
from faults.feed_record import FeedRecord, Filters
from faults.feed_writers import FeedWriters
from faults.workload import Workload

SETTLE_SECONDS = 10.0
MOST_VIOLATIONS = 5  # of one follower: a feed that is wrong is wrong everywhere

# How they begin, and what they follow. They leave their streams and resume.
FOLLOWERS = {
    "from now": Filters(),
    "from now, of a status": Filters(statuses=("active",)),
    "from now, of a label without a ticket": Filters(has_ticket=False, labels=(("team", "sales"),)),
    "from the beginning": Filters(),
    "from the beginning, with a ticket": Filters(has_ticket=True),
    "from the beginning, of a user": Filters(user_id="ada"),
}


def follow_late_commits(environment: Environment, workload: Workload, count: float) -> Seen:
    """About `count` changes; the callers of `workload` go on meanwhile."""
    tenant = f"feed-{uuid.uuid4().hex[:8]}"
    findings: list[str] = []
    records = environment.run(_follow(environment, workload, tenant, round(count), findings))
    with psycopg.connect(environment.database_url) as connection:
        audit = read_audit(connection, tenant)
    findings += check_audit(audit)
    for record in records:
        found = [f"the follower {record.name} {text}" for text in check_feed(record, audit)]
        findings += found[:MOST_VIOLATIONS]
    counts = Counter(
        {
            "changes": sum(len(history) for history in audit.histories.values()),
            "transactions": len(
                {change.transaction for each in audit.histories.values() for change in each}
            ),
            "followers": len(records),
            "streams": sum(record.streams for record in records),
            "checkpoints": sum(len(record.checkpoints) for record in records),
            "events": sum(len(record.told) for record in records),
        }
    )
    note = ", ".join(f"{number:,} {name}" for name, number in counts.items())
    return Seen([Violation("feed", text) for text in findings], note)


async def _follow(
    environment: Environment, workload: Workload, tenant: str, count: int, findings: list[str]
) -> list[FeedRecord]:
    chance = random.Random(count)

    def check_response(*_: object) -> None:
        """The callers of `workload` look for other tenants."""

    followers = FeedFollowers(
        workload.api, environment.database_url, check_response, chance, findings
    )
    writers = FeedWriters(
        lambda number: workload.api(tenant, number),
        environment.database_url,
        tenant,
        count,
        chance,
    )
    records: list[FeedRecord] = []

    def start(name: str, filters: Filters, *, leaves: bool = True) -> None:
        record = FeedRecord(
            tenant=tenant,
            name=name,
            filters=filters,
            from_beginning=not name.startswith("from now"),
        )
        records.append(record)
        followers.start(record, leaves=leaves)

    try:
        await writers.create_sessions()
        start("that stays", Filters(), leaves=False)
        for name, filters in FOLLOWERS.items():
            start(name, filters)
        await followers.wait_until_begun()
        writing = asyncio.create_task(writers.write())
        while writers.changes < count / 2 and not writing.done():
            await asyncio.sleep(0.05)
        start("that comes late", Filters())
        await writing
        # It wakes the feed, for which transactions that the service knows nothing of do not.
        await workload.create_session(tenant)
        await followers.settle(SETTLE_SECONDS)
    finally:
        await followers.close()
    return records
