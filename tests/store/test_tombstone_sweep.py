"""The sweep of the tombstones of sessions and tickets that were deleted long ago."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import psycopg
import pytest
from support.client import Api, an_id
from support.database import execute, store_database, wait_for_lock_waiters
from support.server import serving

from chat_ticket_svc.store import tombstone_sweep
from chat_ticket_svc.store.database import Database
from chat_ticket_svc.store.tombstone_sweep import TombstoneSweep
from chat_ticket_svc.telemetry import metrics


@pytest.fixture(autouse=True)
def all_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tombstone_sweep, "SWEEP_SECONDS", 0.01)


@pytest.fixture
def tombstones(fresh_database: str) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(fresh_database, autocommit=True) as connection:
        yield connection


def add(tombstones: psycopg.Connection[Any], count: int, *, days: float) -> None:
    """The tombstones of so many sessions, of a few tenants, that were deleted so long ago."""
    tombstones.execute(
        "INSERT INTO chat_session_tombstones SELECT 'tenant ' || n %% 7, gen_random_uuid(),"
        " now() - %s * interval '1 day' FROM generate_series(1, %s) n",
        [days, count],
    )


def add_tickets(tombstones: psycopg.Connection[Any], count: int, *, days: float) -> None:
    """As `add`, of tickets."""
    tombstones.execute(
        "INSERT INTO ticket_tombstones SELECT 'tenant ' || n %% 7, gen_random_uuid(),"
        " now() - %s * interval '1 day' FROM generate_series(1, %s) n",
        [days, count],
    )


def number(tombstones: psycopg.Connection[Any]) -> int:
    """The tombstones of sessions and of tickets."""
    [count] = tombstones.execute(
        "SELECT (SELECT count(*) FROM chat_session_tombstones)"
        " + (SELECT count(*) FROM ticket_tombstones)"
    ).fetchone() or [-1]
    return int(count)


def positions(tombstones: psycopg.Connection[Any]) -> list[int]:
    found = tombstones.execute(
        "SELECT feed_position FROM chat_session_tombstones"
        " UNION ALL SELECT feed_position FROM ticket_tombstones"
    )
    return [position for (position,) in found]


def swept_positions(tombstones: psycopg.Connection[Any]) -> list[int]:
    """Of each epoch, in order."""
    found = tombstones.execute("SELECT swept_position FROM chat_epochs ORDER BY ordinal")
    return [position for (position,) in found]


async def until(tombstones: psycopg.Connection[Any], count: int) -> None:
    async with asyncio.timeout(20):
        while number(tombstones) != count:
            await asyncio.sleep(0.01)


async def until_swept(count: float) -> None:
    """Until so many are counted, after they are gone."""
    async with asyncio.timeout(20):
        while metrics.TOMBSTONES_SWEPT._value.get() != count:
            await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def sweeping(database: str) -> AsyncIterator[Database]:
    async with store_database(database) as db:
        sweep = TombstoneSweep(db, days=30)
        sweep.start()
        try:
            yield db
        finally:
            await sweep.stop()


async def test_old_ones_are_swept_and_the_others_stay(
    fresh_database: str, tombstones: psycopg.Connection[Any]
) -> None:
    """In several batches, and counted."""
    add(tombstones, 2500, days=30.01)
    add_tickets(tombstones, 1500, days=30.01)
    add(tombstones, 40, days=29.99)
    add_tickets(tombstones, 40, days=29.99)
    before = metrics.TOMBSTONES_SWEPT._value.get()
    async with sweeping(fresh_database):
        await until(tombstones, 80)
        await until_swept(before + 4000)
        await asyncio.sleep(0.1)
    assert number(tombstones) == 80


@pytest.mark.parametrize("adds", [add, add_tickets])
async def test_current_epoch_says_what_is_swept(
    fresh_database: str, tombstones: psycopg.Connection[Any], adds: Callable[..., None]
) -> None:
    """No tombstone below `swept_position` is missing before its transaction says so.

    The statement that deletes them waits while another one sweeps.
    """
    adds(tombstones, 3, days=30.01)
    [(last,)] = tombstones.execute("SELECT max(n) FROM unnest(%s) n", [positions(tombstones)])
    adds(tombstones, 3, days=29.99)
    *older, _ = swept_positions(tombstones)
    with psycopg.connect(fresh_database) as other:
        other.execute("UPDATE chat_epochs SET swept_position = 7")
        async with sweeping(fresh_database):
            await wait_for_lock_waiters(fresh_database, 1)
            assert number(tombstones) == 6
            other.rollback()
            await until(tombstones, 3)
    assert swept_positions(tombstones) == [*older, last + 1]
    assert min(positions(tombstones)) > last


async def test_swept_position_never_goes_back(
    fresh_database: str, tombstones: psycopg.Connection[Any]
) -> None:
    """Not even when another sweep has gone further, and commits first."""
    add(tombstones, 3, days=31)
    further = max(positions(tombstones)) + 100
    with psycopg.connect(fresh_database) as other:
        other.execute("UPDATE chat_epochs SET swept_position = %s", [further])
        async with sweeping(fresh_database):
            await wait_for_lock_waiters(fresh_database, 1)
            other.commit()
            await until(tombstones, 0)
    assert set(swept_positions(tombstones)) == {further}


async def test_several_servers_share_the_work(
    fresh_database: str, tombstones: psycopg.Connection[Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Each tombstone is swept once, and none of them fails."""
    add(tombstones, 4000, days=31)
    add_tickets(tombstones, 1000, days=31)
    before = metrics.TOMBSTONES_SWEPT._value.get()
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(4):
            await stack.enter_async_context(sweeping(fresh_database))
        await until(tombstones, 0)
        await until_swept(before + 5000)
    assert "could not sweep" not in caplog.text


async def test_locked_ones_are_left_to_the_next_sweep(
    fresh_database: str, tombstones: psycopg.Connection[Any]
) -> None:
    """A sweep waits for nobody."""
    add(tombstones, 10, days=31)
    with psycopg.connect(fresh_database) as other:
        other.execute("SELECT FROM chat_session_tombstones LIMIT 3 FOR UPDATE")
        async with sweeping(fresh_database):
            await until(tombstones, 3)
            other.rollback()
            await until(tombstones, 0)


async def test_error_is_logged_and_the_next_sweep_works(
    fresh_database: str, tombstones: psycopg.Connection[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """As when the database is a standby for a while."""
    add(tombstones, 10, days=31)
    execute(fresh_database, "ALTER TABLE chat_session_tombstones RENAME TO elsewhere")
    async with sweeping(fresh_database):
        await asyncio.sleep(0.2)
        execute(fresh_database, "ALTER TABLE elsewhere RENAME TO chat_session_tombstones")
        await until(tombstones, 0)
    logged = capsys.readouterr().out
    assert logged.count("could not sweep tombstones") == 1, logged


async def test_server_sweeps_by_its_setting(
    fresh_database: str, tombstones: psycopg.Connection[Any], tenant: str
) -> None:
    """And the id of a session that was deleted so long ago can be used again."""
    session_id = an_id()
    add(tombstones, 10, days=1.5)
    tombstones.execute(
        "INSERT INTO chat_session_tombstones VALUES (%s, %s, now() - interval '3 days')",
        [tenant, session_id],
    )
    async with (
        serving(fresh_database, session_tombstone_days=2) as server,
        Api(f"127.0.0.1:{server.port}", tenant) as api,
    ):
        await until(tombstones, 10)
        assert (await api.session(id=session_id)).id == session_id


def test_sweep_is_cheap_when_nothing_is_old(tombstones: psycopg.Connection[Any]) -> None:
    """It reads the old end of an index, however many tombstones there are."""
    add(tombstones, 20_000, days=3)
    add_tickets(tombstones, 20_000, days=3)
    tombstones.execute("ANALYZE chat_session_tombstones, ticket_tombstones")
    plan = tombstones.execute(
        f"EXPLAIN (ANALYZE, BUFFERS) {tombstone_sweep.SWEEP}", {"days": 30, "limit": 1000}
    ).fetchall()
    text = "\n".join(line for (line,) in plan)
    assert "idx_chat_session_tombstones_deleted" in text
    assert "idx_ticket_tombstones_deleted" in text
    assert "Seq Scan on chat_session_tombstones" not in text
    assert "Seq Scan on ticket_tombstones" not in text
