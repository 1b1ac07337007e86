"""`make failover`: a standby takes over from its primary under load, in several ways.

The services know both by a URL of two hosts. What their callers got is compared with what the
new primary has: an acknowledged write that is not there is lost. Followers that keep the epoch of
their position must hold what it has, and none is sent back if nothing of its own was lost.
"""

import argparse
import asyncio
import contextlib
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psycopg
from psycopg import conninfo

from chat_ticket_svc import embedded
from chat_ticket_svc.commands import migrate
from chat_ticket_svc.embedded import EmbeddedPostgres
from faults.checker import check
from faults.environment import DATABASE, Service
from faults.failover_followers import Followers, Verdict
from faults.proxy import Mode, Proxy
from faults.record import clock
from faults.restores import kill, run_as_server
from faults.workload import THINK_SECONDS, Workload

AROUND_SECONDS = 3.0  # of work, before and after
SETTLE_SECONDS = 30.0
WAIT_SECONDS = 30.0
BEHIND_SECONDS = 0.3
STANDBY = "standby"

REPLAYED = "SELECT pg_last_wal_replay_lsn(), count(*) FROM pg_stat_wal_receiver"
REVISIONS = "SELECT id::text, revision FROM chat_sessions"


class Pair:
    """A primary and its standby, in separate directories."""

    def __init__(self, directory: Path, *, synchronous: bool):
        self._stack = contextlib.ExitStack()
        self._directory = directory
        self._synchronous = synchronous
        self.primary = EmbeddedPostgres(directory / "primary")
        self.standby = EmbeddedPostgres(directory / STANDBY)

    def __enter__(self) -> "Pair":
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.primary)
            url = self.primary.url(DATABASE)
            socket = conninfo.conninfo_to_dict(url)
            self._proxy = stack.enter_context(
                Proxy(Path(f"{socket['host']}/.s.PGSQL.{socket['port']}"))
            )
            assert migrate.up(url, quiet=True) == 0
            run_as_server(
                "pg_basebackup",
                "--dbname",
                f"postgresql://postgres@127.0.0.1:{self._proxy.port}/postgres"
                f"?sslmode=disable&gssencmode=disable&application_name={STANDBY}",
                "--pgdata",
                self._data(STANDBY),
                "--checkpoint=fast",
                "--write-recovery-conf",
            )
            stack.enter_context(self.standby)
            if self._synchronous:
                _execute(url, f"ALTER SYSTEM SET synchronous_standby_names = '{STANDBY}'")
                _execute(url, "SELECT pg_reload_conf()")
            state = "sync" if self._synchronous else "async"
            _until(url, f"SELECT sync_state = '{state}' FROM pg_stat_replication")
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def url(self) -> str:
        """Of both, the primary first."""
        one, other = (
            conninfo.conninfo_to_dict(postgres.url(DATABASE))
            for postgres in (self.primary, self.standby)
        )
        return (
            f"postgresql://postgres@/{DATABASE}?host={one['host']},{other['host']}"
            f"&port={one['port']},{other['port']}&sslmode=disable"
        )

    def _data(self, name: str) -> str:
        return str(self._directory / name)

    def kept_revisions(self) -> dict[str, int]:
        """The revision of each session that the standby has, before it is promoted."""
        with psycopg.connect(self.standby.url(DATABASE), autocommit=True) as connection:
            replayed = None
            while replayed != (replayed := connection.execute(REPLAYED).fetchone()):
                time.sleep(0.05)
            return dict(connection.execute(REVISIONS).fetchall())

    def promote(self) -> None:
        """Promote by a signal: replay may cancel any query on a standby, even pg_promote()."""
        run_as_server("pg_ctl", "promote", "--wait", "--silent", "--pgdata", self._data(STANDBY))

    def lose_primary_and_unsent_wal(self) -> None:
        """As with a network that is slower than the writes are. What is in it is lost too."""
        self._stack.enter_context(self._proxy.during(Mode.BLACKHOLE))
        time.sleep(BEHIND_SECONDS)
        self.lose_primary()

    def lose_primary(self) -> None:
        kill(self.primary)

    def stop_primary(self) -> None:
        """Stop the primary cleanly: it ends when the standby has all WAL."""
        self.primary.stop()

    def fence_primary(self) -> None:
        """Make the primary read-only, and return when the standby has all WAL."""
        url = self.primary.url(DATABASE)
        _execute(url, "ALTER SYSTEM SET default_transaction_read_only = on")
        _execute(url, "SELECT pg_reload_conf()")
        _until(
            url,
            "SELECT count(*) = 0 FROM pg_stat_activity WHERE backend_xid IS NOT NULL",
        )
        _until(url, "SELECT replay_lsn = pg_current_wal_lsn() FROM pg_stat_replication")


@dataclass(frozen=True)
class FailoverCase:
    name: str
    synchronous: bool
    end: Callable[[Pair], None]
    loses: bool = False  # what was acknowledged may be lost


CASES = (
    FailoverCase("primary killed, synchronous", synchronous=True, end=Pair.lose_primary),
    FailoverCase(
        "primary killed, asynchronous", synchronous=False, end=Pair.lose_primary, loses=True
    ),
    FailoverCase(
        "primary killed, asynchronous and 0.3 s behind",
        synchronous=False,
        end=Pair.lose_primary_and_unsent_wal,
        loses=True,
    ),
    FailoverCase("primary stopped in order", synchronous=False, end=Pair.stop_primary),
    FailoverCase("primary left, read-only", synchronous=False, end=Pair.fence_primary),
)


@dataclass(frozen=True)
class Result:
    before: int  # writes acknowledged
    after: int
    lost: int
    other: tuple[str, ...]  # violations
    ahead: int  # watches that delivered what was lost
    promoted_seconds: float  # since the primary's end began
    outage_seconds: float  # the longest without an acknowledged write
    followers: Verdict


async def run(pair: Pair, case: FailoverCase, services: list[Service], seed: int) -> Result:
    workload = Workload(
        lambda: [service.address for service in services], seed, "failover", THINK_SECONDS
    )
    record, followers = workload.record, Followers(workload)
    try:
        await workload.start()
        followers.start()
        await asyncio.sleep(AROUND_SECONDS)
        before, struck = len(record.acknowledged), clock()
        await asyncio.to_thread(case.end, pair)
        followers.leave()
        kept = await asyncio.to_thread(pair.kept_revisions)
        await asyncio.to_thread(pair.promote)
        promoted = clock()
        await asyncio.to_thread(_until_healthy, services)
        await asyncio.sleep(AROUND_SECONDS / 2)
        followers.come_back()
        await asyncio.sleep(AROUND_SECONDS / 2)
        await workload.settle(SETTLE_SECONDS)
        await followers.settle()
        verdict = await followers.verdict(kept)
    finally:
        await followers.close()
        await workload.close()
    ahead = [text for text in record.findings if "OUT_OF_RANGE" in text]
    record.findings[:] = [text for text in record.findings if text not in ahead]
    with psycopg.connect(pair.standby.url(DATABASE)) as connection:
        violations = [str(each) for each in check(record, connection, workload.tenants)]
    lost = [text for text in violations if "is lost" in text]
    return Result(
        before=before,
        after=len(record.acknowledged) - before,
        lost=len(lost),
        other=tuple(text for text in violations if text not in lost),
        ahead=len(ahead),
        promoted_seconds=promoted - struck,
        outage_seconds=record.longest_outage(struck),
        followers=verdict,
    )


@contextlib.contextmanager
def serving(pair: Pair) -> Iterator[list[Service]]:
    services = [Service(pair.url) for _ in range(2)]
    try:
        for service in services:
            service.start()
        _until_healthy(services)
        yield services
    finally:
        for service in services:
            service.stop(signal.SIGKILL)


def _until_healthy(services: list[Service]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not all(service.is_healthy() for service in services):
        if time.monotonic() > deadline:
            raise TimeoutError("a service does not become healthy")
        time.sleep(0.05)


def _execute(url: str, sql: str) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(sql)  # type: ignore[arg-type]


def _until(url: str, sql: str) -> None:
    """A query's answer is yes."""
    deadline = time.monotonic() + WAIT_SECONDS
    with psycopg.connect(url, autocommit=True) as connection:
        while connection.execute(sql).fetchall() != [(True,)]:  # type: ignore[arg-type]
            if time.monotonic() > deadline:
                raise TimeoutError(sql)
            time.sleep(0.02)


def table(results: dict[str, list[Result]]) -> str:
    lines = [
        "| how | runs | acknowledged before | after | lost | other violations | streams ahead "
        "| promoted after | longest outage |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, runs in results.items():
        counts = (
            sum(each.before for each in runs),
            sum(each.after for each in runs),
            sum(each.lost for each in runs),
            sum(len(each.other) for each in runs),
            sum(each.ahead for each in runs),
        )
        times = (
            statistics.median(each.promoted_seconds for each in runs),
            statistics.median(each.outage_seconds for each in runs),
        )
        cells = [f"{count:,}" for count in (len(runs), *counts)]
        cells += [f"{seconds:.1f} s" for seconds in times]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def follower_table(results: dict[str, list[Result]]) -> str:
    lines = [
        "| how | followers of sessions | told of a loss | of feeds | told of a possible loss "
        "| hold what is no more | sent back for nothing | other errors |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, runs in results.items():
        verdicts = [each.followers for each in runs]
        counts = (
            sum(each.of_sessions for each in verdicts),
            sum(each.told for each in verdicts),
            sum(each.of_feeds for each in verdicts),
            sum(each.feeds_told for each in verdicts),
            sum(len(each.wrong) for each in verdicts),
            sum(len(each.for_nothing) for each in verdicts),
            sum(len(each.errors) for each in verdicts),
        )
        lines.append(f"| {name} | {' | '.join(f'{count:,}' for count in counts)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="faults.failover", description=__doc__)
    parser.add_argument("--only", default="", help="ways whose names contain this")
    parser.add_argument("--runs", type=int, default=1, help="of each case")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    results: dict[str, list[Result]] = {}
    failed = False
    for number in range(options.runs):
        for case in CASES:
            if options.only not in case.name:
                continue
            with tempfile.TemporaryDirectory(prefix="chat-ticket-failover-") as name:
                directory = Path(name)
                directory.chmod(0o711)  # PostgreSQL may have to run as another user
                if embedded._identity(embedded._binaries()) == "nobody":
                    os.chown(directory, embedded._NOBODY, embedded._NOBODY)
                with (
                    Pair(directory, synchronous=case.synchronous) as pair,
                    serving(pair) as services,
                ):
                    result = asyncio.run(run(pair, case, services, options.seed + number))
            results.setdefault(case.name, []).append(result)
            followers = result.followers
            unexpected = (*followers.wrong, *followers.for_nothing, *followers.errors)
            for text in (
                *result.other[:5],
                *followers.wrong[:5],
                *followers.for_nothing[:5],
                *followers.errors[:5],
            ):
                print(f"{case.name}: {text}", file=sys.stderr)
            failed |= bool(unexpected)
            failed |= not case.loses and bool(result.lost or result.other or result.ahead)
    print(table(results), follower_table(results), sep="\n\n")
    sys.exit(failed)


if __name__ == "__main__":
    main()
