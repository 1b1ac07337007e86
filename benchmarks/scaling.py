"""The measurements of docs/scaling.md: PgBouncer, nginx, round robin, and the size of a message.

`make scaling` runs all parts, each on its own PostgreSQL, and prints a table for each. The rates
that are compared were measured in turns, because other work on the machine changes them.
"""

import argparse
import asyncio
import contextlib
import random
import signal
import statistics
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import grpc.aio
import psycopg
from faults.record import WatchRecord
from faults.workload import CHANNEL, apply_event
from support import balancer, pooler
from support.client import Api
from support.process import ServerProcess
from support.service_config import Callers, service_config_json

from benchmarks import calls, load, service
from benchmarks.load import Load, Outcome
from benchmarks.service import Postgres
from chat_ticket.v1.chat_message_pb2 import CreateChatMessageRequest
from chat_ticket.v1.chat_session_pb2 import GetChatSessionRequest, WatchChatSessionRequest

CALLERS = 32
MANY_CALLERS = 64
PHASE_SECONDS = 1.5
ROUNDS = 7
PROCESSES = 4
AROUND_SECONDS = 2.0  # of calls, before and after a server ends
DOWN_SECONDS = 1.0
WATCHERS = 20
TENANT = "tenant"
MESSAGES = 500_000
PER_SESSION = 20
MESSAGES_PER_LONG_ONE = 12  # short ones in a longer one
OK = 0


def compared(
    postgres: Postgres, targets: Mapping[str, tuple[str, int]], rounds: int
) -> dict[tuple[str, str], list[Outcome]]:
    """Creates and reads at each address by turns; the first round warms up."""
    found: dict[tuple[str, str], list[Outcome]] = defaultdict(list)
    prepared = calls.requests()
    with load.client() as call:
        for number in range(rounds + 1):
            for what in (calls.GET, calls.CREATE):
                path, requests = prepared[what]
                for name, (address, pid) in targets.items():
                    outcome = call(
                        Load(
                            address=address,
                            path=path,
                            requests=requests,
                            callers=CALLERS,
                            seconds=PHASE_SECONDS,
                            watched={"server": pid, "postgres": postgres.pid},
                        )
                    )
                    if number:
                        found[what, name].append(outcome)
    return found


def comparison(found: Mapping[tuple[str, str], list[Outcome]]) -> list[str]:
    """Each target compared with the first, as medians over the rounds."""
    lines = ["| call | by | of the first's calls/s | p50 | p99 |", "|---|---|---|---|---|"]
    first = next(iter(found))[1]
    for (what, name), outcomes in found.items():
        ratios = [
            one.calls_per_second / other.calls_per_second
            for one, other in zip(outcomes, found[what, first], strict=True)
        ]
        p50 = statistics.median(outcome.p50_ms for outcome in outcomes)
        p99 = statistics.median(outcome.p99_ms for outcome in outcomes)
        ratio = statistics.median(ratios)
        lines.append(f"| {what} | {name} | {ratio:.2f} | {p50:.1f} ms | {p99:.1f} ms |")
    return lines


def by_pgbouncer(postgres: Postgres, directory: Path, rounds: int) -> Iterator[str]:
    """The same calls with and without PgBouncer, and the connections of several processes."""
    with contextlib.ExitStack() as stack:
        url = stack.enter_context(postgres.database())
        with psycopg.connect(url, autocommit=True) as db:
            calls.create_sessions(db)
        bin_directory = stack.enter_context(pooler.pgbouncer(url, directory / "pgbouncer"))
        pooled = service.UNLIMITED | pooler.through(bin_directory, url)
        plain = service.UNLIMITED | {"CHAT_TICKET_PREPARE_STATEMENTS": "false"}
        kinds = {
            "PostgreSQL": service.UNLIMITED,
            "PostgreSQL, nothing prepared": plain,
            "PgBouncer": pooled,
        }
        servers = {
            name: stack.enter_context(
                service.server(url, log=directory / f"{number}.log", settings=settings)
            )
            for number, (name, settings) in enumerate(kinds.items())
        }
        targets = {name: (each.address, each.pid) for name, each in servers.items()}
        yield from comparison(compared(postgres, targets, rounds))
    yield ""
    yield f"| connections of PostgreSQL, {PROCESSES} processes under load | most |"
    yield "|---|---|"
    for name, is_pooled in (("PostgreSQL", False), ("PgBouncer", True)):
        with contextlib.ExitStack() as stack:
            url = stack.enter_context(postgres.database())
            with psycopg.connect(url, autocommit=True) as db:
                calls.create_sessions(db)
            settings = dict(service.UNLIMITED)
            if is_pooled:
                bin_directory = stack.enter_context(
                    pooler.pgbouncer(url, directory / "pgbouncer-many", pool_size=8)
                )
                settings |= pooler.through(bin_directory, url)
            server = stack.enter_context(
                service.server(
                    url, log=directory / "many.log", workers=PROCESSES, settings=settings
                )
            )
            call = stack.enter_context(load.client())
            peak = stack.enter_context(_peak_connections(url))
            for what in (calls.GET, calls.CREATE):
                path, requests = calls.requests()[what]
                call(
                    Load(
                        address=server.address,
                        path=path,
                        requests=requests,
                        callers=MANY_CALLERS,
                        connections=MANY_CALLERS,
                        seconds=PHASE_SECONDS,
                        watched={},
                    )
                )
            yield f"| {name} | {peak()} |"


@contextlib.contextmanager
def _peak_connections(url: str) -> Iterator[Callable[[], int]]:
    """The largest number of connections at once, apart from this one."""
    peak, stopped = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        with psycopg.connect(url, autocommit=True) as db:
            while not stopped.wait(0.05):
                [(count,)] = db.execute(
                    "SELECT count(*) - 1 FROM pg_stat_activity WHERE datname = current_database()"
                ).fetchall()
                peak = max(peak, count)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield lambda: peak
    finally:
        stopped.set()
        thread.join()


class ServerPair:
    """Two servers that can be stopped and restarted on the same ports."""

    def __init__(self, url: str):
        self._url = url
        self._ports = [0, 0]
        self.processes: list[ServerProcess] = []

    def __enter__(self) -> "ServerPair":
        for number in range(2):
            self.processes.append(self._start(number))
        for number, process in enumerate(self.processes):
            self._ports[number] = process.wait_for("listening")["port"]
            process.wait_for("serving")
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.stop(signal.SIGKILL)

    def _start(self, number: int) -> ServerProcess:
        environment = {"DATABASE_URL": self._url, "CHAT_TICKET_PORT": str(self._ports[number])}
        return ServerProcess(environment={**service.UNLIMITED, **environment})

    @property
    def addresses(self) -> list[str]:
        return [f"127.0.0.1:{port}" for port in self._ports]

    def end_and_restart(self, number: int, how: int) -> None:
        self.processes[number].stop(how)
        time.sleep(DOWN_SECONDS)
        self.processes[number] = self._start(number)
        self.processes[number].wait_for("serving")


async def _under_load(pair: ServerPair, target: str, how: int, *, retries: bool) -> str:
    """End one of two servers while they are called; return a row of the outcomes."""
    service_config = service_config_json(retries=retries)
    options = [*CHANNEL, ("grpc.service_config", service_config)]
    async with Api(target, TENANT, options=options) as api:
        session = await api.session()
        callers = Callers(target, TENANT, session.id, service_config)
        watches = [WatchRecord(tenant=TENANT, session_id=session.id) for _ in range(WATCHERS)]
        ends: Counter[str] = Counter()

        async def run_watch(watch: WatchRecord) -> None:
            while True:
                watch.streams += 1
                request = WatchChatSessionRequest(
                    session_id=session.id, after_revision=watch.revision
                )
                try:
                    async for event in api.sessions.WatchChatSession(request):
                        apply_event(watch, event)
                except grpc.aio.AioRpcError as error:
                    ends[error.code().name] += 1
                await asyncio.sleep(0.05)

        watch_tasks = [asyncio.create_task(run_watch(each)) for each in watches]
        callers.start()
        await asyncio.sleep(AROUND_SECONDS)
        await asyncio.to_thread(pair.end_and_restart, 0, how)
        await asyncio.sleep(AROUND_SECONDS)
        counts = await callers.stop()
        request = GetChatSessionRequest(session_id=session.id)
        stored = (await api.sessions.GetChatSession(request)).session.revision
        async with asyncio.timeout(20):
            while any(watch.revision < stored for watch in watches):  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        for task in watch_tasks:
            task.cancel()
        await asyncio.gather(*watch_tasks, return_exceptions=True)
        complete = sum(
            [sequence for _, sequence in each.created] == list(range(1, stored + 1))
            for each in watches
        )
    failed = {kind: of.total() - of[OK] for kind, of in counts.items()}
    lost = max(0, counts["write"][OK] - stored)
    twice = max(0, stored - counts["write"].total())
    total = sum(of.total() for of in counts.values())
    return (
        f"{total:,} | {failed['read']} | {failed['stream']} | {failed['write']} "
        f"| {lost} | {twice} | {sum(ends.values())} | {complete} of {WATCHERS} |"
    )


def balanced(postgres: Postgres, directory: Path, rounds: int) -> Iterator[str]:
    """nginx and client-side round robin: their cost, and the cost of losing one server."""
    with contextlib.ExitStack() as stack:
        url = stack.enter_context(postgres.database())
        with psycopg.connect(url, autocommit=True) as db:
            calls.create_sessions(db)
        server = stack.enter_context(service.server(url, log=directory / "one.log"))
        before = directory / "before-one"
        before.mkdir()
        address = stack.enter_context(balancer.nginx(before, [server.address] * 2))
        targets = {"no nginx": (server.address, server.pid), "nginx": (address, server.pid)}
        yield from comparison(compared(postgres, targets, rounds))
    yield ""
    yield (
        "| one of two servers | by | calls | failed reads | lists | writes | lost | written twice "
        "| watches ended | watches that missed nothing |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|"
    with contextlib.ExitStack() as stack:
        url = stack.enter_context(postgres.database())
        pair = stack.enter_context(ServerPair(url))
        before = directory / "before-two"
        before.mkdir()
        by_nginx = stack.enter_context(balancer.nginx(before, pair.addresses))
        round_robin = "ipv4:" + ",".join(pair.addresses)
        for how, done in ((signal.SIGTERM, "drains"), (signal.SIGKILL, "is killed")):
            for name, target in (("nginx", by_nginx), ("round robin", round_robin)):
                for retries in (False, True):
                    row = asyncio.run(_under_load(pair, target, how, retries=retries))
                    by = f"{name}{', service config' if retries else ''}"
                    yield f"| {done} | {by} | {row}"


SIZES = """
SELECT pg_table_size('chat_messages'), pg_indexes_size('chat_messages'),
       pg_relation_size('idx_chat_messages_content')
"""
FILL_MESSAGES = """
COPY chat_messages (tenant_id, id, session_id, sequence, revision, role, content, created_at)
FROM STDIN
"""
FILL_SESSIONS = """
INSERT INTO chat_sessions (tenant_id, id, revision)
SELECT 'tenant-' || number %% 10, lpad(number::text, 32, '0')::uuid, %(each)s
  FROM generate_series(1, %(sessions)s) AS number
"""


def sized(postgres: Postgres, directory: Path, rounds: int) -> Iterator[str]:
    """Bytes on disk for each message, in sessions of 20: short messages and longer ones."""
    del directory, rounds
    _, requests = calls.requests()[calls.CREATE]
    short = [CreateChatMessageRequest.FromString(request).message.content for request in requests]
    several = len(short) // MESSAGES_PER_LONG_ONE
    long = [" ".join(short[number::several][:MESSAGES_PER_LONG_ONE]) for number in range(several)]
    yield "| of content | messages | in the table | in its indexes | of them, in that of words |"
    yield "|---|---|---|---|---|"
    for texts, count in ((short, MESSAGES), (long, MESSAGES // 4)):
        content = statistics.mean(len(text.encode()) for text in texts)
        with postgres.database() as url, psycopg.connect(url, autocommit=True) as db:
            _fill(db, texts, count)
            db.execute("VACUUM ANALYZE")
            [sizes] = db.execute(SIZES).fetchall()
        table, indexes, words = (f"{size / count:.0f}" for size in sizes)
        yield f"| {content:.0f} bytes | {count:,} | {table} | {indexes} | {words} |"


def _fill(db: psycopg.Connection, texts: Sequence[str], count: int) -> None:
    sessions = count // PER_SESSION
    db.execute(FILL_SESSIONS, {"sessions": sessions, "each": PER_SESSION})
    chance = random.Random(1)  # noqa: S311 - ids, not secrets
    first = int(time.time() * 1000) - count
    with db.cursor() as cursor, cursor.copy(FILL_MESSAGES) as copy:
        for number in range(count):
            # A round of all sessions after the other: conversations go on side by side.
            sequence, session = divmod(number, sessions)
            when = first + number
            copy.write_row(
                (
                    f"tenant-{(session + 1) % 10}",
                    # A UUIDv7 of its time.
                    f"{when:012x}7{chance.getrandbits(12):03x}8{chance.getrandbits(60):015x}",
                    f"{session + 1:032d}",
                    sequence + 1,
                    sequence + 1,
                    ("user", "assistant")[sequence % 2],
                    texts[number % len(texts)],
                    time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(when / 1000)),
                )
            )


PARTS = {"pgbouncer": by_pgbouncer, "balancers": balanced, "size": sized}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    parser.add_argument("parts", nargs="*", default=[*PARTS], choices=[*PARTS, []])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args()
    for name in options.parts:
        with tempfile.TemporaryDirectory(prefix="chat-ticket-scaling-") as directory:
            Path(directory).chmod(0o711)
            with service.postgres(Path(directory)) as postgres:
                print(f"\n{name}, {options.rounds} rounds:\n", flush=True)
                for line in PARTS[name](postgres, Path(directory), options.rounds):
                    print(line, flush=True)


if __name__ == "__main__":
    main()
