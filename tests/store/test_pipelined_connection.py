"""The pipelined connection, when it breaks at an inconvenient moment."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import psycopg
import psycopg_pool
import pytest
import pytest_asyncio
from psycopg import errors as pg_errors

from chat_ticket_svc.store import pipelined_connection

SQL = "SELECT %(number)s::bigint"

Pool = psycopg_pool.AsyncConnectionPool[psycopg.AsyncConnection[Any]]


@pytest_asyncio.fixture
async def pool(database: str) -> AsyncIterator[Pool]:
    async with psycopg_pool.AsyncConnectionPool(
        database, kwargs={"autocommit": True}, min_size=2, max_size=4, timeout=5, open=False
    ) as pool:
        await pool.wait()
        yield pool


@pytest_asyncio.fixture
async def shared(pool: Pool) -> AsyncIterator[pipelined_connection.PipelinedConnection]:
    shared = pipelined_connection.PipelinedConnection(
        pool, prepare_statements=True, lifetime_seconds=60, reads_only=True
    )
    yield shared
    await shared.close()


@pytest.fixture
def returned(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The ids of the connections returned to the pool so far."""
    put, returned = pool.putconn, list[int]()

    async def putconn(connection: Any) -> None:
        returned.append(id(connection))
        await put(connection)

    monkeypatch.setattr(pool, "putconn", putconn)
    return returned


async def end(database: str, connection: psycopg.AsyncConnection[Any]) -> None:
    """Terminate it as an administrator would."""
    async with await psycopg.AsyncConnection.connect(database, autocommit=True) as admin:
        await admin.execute("SELECT pg_terminate_backend(%s, 5000)", [connection.info.backend_pid])


async def eventually(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.01)


def broken_once(monkeypatch: pytest.MonkeyPatch, breaks: Callable[[Any], Awaitable[None]]) -> None:
    """Break the first connection before the callers that wait for it resume."""
    start, first = pipelined_connection.PipelinedConnection._start_session, True

    async def start_session(self: Any) -> None:
        nonlocal first
        await start(self)
        if first:
            first = False
            await breaks(self._session)

    monkeypatch.setattr(pipelined_connection.PipelinedConnection, "_start_session", start_session)


async def test_broken_before_its_first_statement(
    database: str,
    shared: pipelined_connection.PipelinedConnection,
    returned: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The waiting callers take another one; the broken one is returned once."""

    async def breaks(session: Any) -> None:
        await end(database, session._connection)
        await eventually(lambda: session.is_ended)

    broken_once(monkeypatch, breaks)
    found = await asyncio.gather(*(shared.fetch(SQL, {"number": n}) for n in range(3)))
    assert found == [[(0,)], [(1,)], [(2,)]]
    await eventually(lambda: returned)
    assert len(returned) == len(set(returned)) == 1


async def test_broken_connection_does_not_affect_others(
    database: str, shared: pipelined_connection.PipelinedConnection
) -> None:
    """The file descriptor of its socket may be reused at once by another connection."""
    assert await shared.fetch(SQL, {"number": 1}) == [(1,)]
    broken = shared._session
    assert broken is not None
    await end(database, broken._connection)
    await eventually(lambda: broken.is_ended)
    assert await shared.fetch(SQL, {"number": 2}) == [(2,)]
    present = shared._session
    assert present is not None
    broken._socket = present._socket
    broken._fail_all(None)  # again, as when a statement is sent on it
    broken.end()
    async with asyncio.timeout(5):
        assert await shared.fetch(SQL, {"number": 3}) == [(3,)]


async def test_connection_that_was_lost_in_the_pool(
    pool: Pool, shared: pipelined_connection.PipelinedConnection, returned: list[int]
) -> None:
    """It is returned to the pool, and a retry succeeds."""
    lost = [await pool.getconn() for _ in range(2)]
    for connection in lost:
        await pool.putconn(connection)
        connection.pgconn.finish()  # behind the pool's back
    returned.clear()
    with pytest.raises(pg_errors.ConnectionFailure):
        await shared.fetch(SQL, {"number": 1})
    await eventually(lambda: returned)
    await pool.check()
    assert await shared.fetch(SQL, {"number": 1}) == [(1,)]


async def test_error_that_arrives_with_unread_results(
    database: str, shared: pipelined_connection.PipelinedConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The event loop reports both once, and never again; the call still ends."""
    assert await shared.fetch(SQL, {"number": 1}) == [(1,)]
    session = shared._session
    assert session is not None
    waiting = asyncio.create_task(shared.fetch("SELECT pg_sleep(%(number)s)::text", {"number": 60}))
    await eventually(lambda: session._in_flight)
    asyncio.get_running_loop().remove_reader(session._socket)
    await end(database, session._connection)
    async with asyncio.timeout(5):
        with pytest.raises(pg_errors.ConnectionFailure):
            await waiting


async def test_reads_of_one_turn_share_a_transaction_and_fail_alone(
    shared: pipelined_connection.PipelinedConnection,
) -> None:
    """Those behind a read that fails are sent again, also if it was to prepare their statement."""
    time, quotient = "SELECT transaction_timestamp()::text", "SELECT 1 / %(number)s::bigint"
    first, second = await asyncio.gather(*(shared.fetch(time, {}) for _ in range(2)))
    assert first == second
    assert await shared.fetch(time, {}) != first

    numbers = [1, 0, 1, 0, *[1] * 40, 0]
    reads = [shared.fetch(quotient, {"number": number}) for number in numbers]
    bad = shared.fetch("SELECT no_such_column", {})
    unprepared = [shared.fetch("SELECT %(number)s::int", {"number": number}) for number in (5, 6)]
    found = await asyncio.gather(bad, *reads, *unprepared, return_exceptions=True)
    assert isinstance(found[0], pg_errors.UndefinedColumn)
    for number, rows in zip(numbers, found[1 : len(numbers) + 1], strict=True):
        assert rows == [(1,)] if number else isinstance(rows, pg_errors.DivisionByZero)
    assert found[-2:] == [[(5,)], [(6,)]]
    assert await shared.fetch(SQL, {"number": 7}) == [(7,)]


async def test_value_that_cannot_be_decoded_fails_alone(
    shared: pipelined_connection.PipelinedConnection,
) -> None:
    """The reads before and behind it in its turn have their rows."""
    infinity = shared.fetch("SELECT 'infinity'::timestamptz", {})
    reads = [shared.fetch(SQL, {"number": number}) for number in (1, 2)]
    async with asyncio.timeout(5):
        first, bad, second = await asyncio.gather(
            reads[0], infinity, reads[1], return_exceptions=True
        )
    assert (first, second) == ([(1,)], [(2,)])
    assert isinstance(bad, psycopg.DataError)


async def test_writes_of_one_turn_are_transactions_of_their_own(pool: Pool) -> None:
    writes = pipelined_connection.PipelinedConnection(
        pool, prepare_statements=True, lifetime_seconds=60, reads_only=False
    )
    sql = "SELECT pg_current_xact_id()::text"
    first, second = await asyncio.gather(*(writes.fetch(sql, {}) for _ in range(2)))
    assert first != second
    await writes.close()


async def test_connection_is_returned_when_all_who_wait_to_send_have_left(
    shared: pipelined_connection.PipelinedConnection, returned: list[int]
) -> None:
    await shared.fetch(SQL, {"number": 1})
    waiting = asyncio.create_task(shared.fetch(SQL, {"number": 2}))
    await asyncio.sleep(0)
    waiting.cancel()
    shared.release_connection()
    await eventually(lambda: returned)
