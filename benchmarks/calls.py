"""Unary calls, compared with empty calls and with the same statements run by pgbench.

Messages are created durably, in a thousand sessions. One server process receives all calls, except
for the empty calls to compare with, each of which has a server of its own.
"""

import contextlib
import itertools
import random
import statistics
import uuid
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psycopg

from benchmarks import EMPTY_PATH, chats, http2, load, pgbench, service, variants, yardsticks
from benchmarks.figures import Figure
from benchmarks.load import TENANTS, Load
from benchmarks.service import Bench, Server
from chat_ticket.v1 import resources_pb2
from chat_ticket.v1.chat_message_pb2 import CreateChatMessageRequest
from chat_ticket.v1.chat_session_pb2 import GetChatSessionRequest
from chat_ticket_svc.services import convert
from chat_ticket_svc.store import append, sessions

NAME = "calls"
SECONDS = 130

PHASE_SECONDS = 1.5
COMPARED_PHASE_SECONDS = 0.5  # when two versions are compared: the shorter, the more alike
WARM_UP_SECONDS = 1.0
CALLERS = (16, 64)
SESSIONS = 250  # per tenant for the service, and as many for pgbench
REQUESTS = 5_000
TEXTS = 200  # different message contents of pgbench

EMPTY, GET, CREATE = "empty call", "GetChatSession", "CreateChatMessage"

# Empty calls of other servers.
STOCK, BARE, GRPC_JS = "a stock grpc.aio server", "without middleware", "grpc-js"
EMPTY_TARGETS = {STOCK: 0.75}
EMPTY_STRETCH_TARGETS = {STOCK: 0.60}

# The microseconds of our CPU that a call may take beyond those of the empty call.
TARGETS = {GET: 30, CREATE: 50}
STRETCH_TARGETS = {GET: 25, CREATE: 40}

# The session ids of this part are numbers, because pgbench has only numbers.
CREATE_SESSIONS = """
INSERT INTO chat_sessions (tenant_id, id)
SELECT tenant, lpad(number::text, 32, '0')::uuid
  FROM unnest(%s::text[]) AS tenant, generate_series(1, %s) AS number
"""
COUNT = "SELECT count(*) FROM chat_messages WHERE session_id <= lpad(%s::text, 32, '0')::uuid"

# Message ids increase with time, like those that the service generates.
PGBENCH_VARIABLES = f"""\
\\set tenant random(0, {len(TENANTS) - 1})
\\set session random({SESSIONS + 1}, {2 * SESSIONS})
\\set text random(1, {TEXTS})
\\set n :n + 1
\\set message (:run * 1000000 + :n) * {max(CALLERS)} + :client_id
"""

Outcomes = dict[tuple[str, int], list[load.Outcome]]
Limits = dict[tuple[str, int], list[pgbench.Outcome]]


def measure(bench: Bench) -> list[Figure]:
    outcomes: Outcomes = defaultdict(list)
    limits: Limits = defaultdict(list)
    phase_seconds = PHASE_SECONDS if bench.with_limits else COMPARED_PHASE_SECONDS
    with contextlib.ExitStack() as stack:
        url = stack.enter_context(bench.postgres.database())
        with psycopg.connect(url, autocommit=True) as db:
            create_sessions(db)
        log = bench.directory / "ours.log"
        ours = stack.enter_context(service.server(url, log=log, module="benchmarks.variants"))
        others = stack.enter_context(_other_servers(bench, url)) if bench.with_limits else {}
        call = stack.enter_context(load.client())
        _require_middleware(ours)
        requests_by_call = requests()
        empty_requests = requests_by_call[EMPTY]
        phases = {
            **{what: (server, *empty_requests) for what, server in others.items()},
            **{what: (ours, *each) for what, each in requests_by_call.items()},
        }
        scripts = _scripts(bench.directory) if bench.with_limits else {}
        runs = itertools.count()
        created_count = 0

        def run(what: str, callers: int, seconds: float) -> load.Outcome:
            nonlocal created_count
            server, path, bodies = phases[what]
            outcome = call(
                Load(
                    address=server.address,
                    path=path,
                    requests=bodies,
                    callers=callers,
                    seconds=seconds,
                    watched={"server": server.pid, "postgres": bench.postgres.pid},
                )
            )
            created_count += outcome.calls if what == CREATE else 0
            return outcome

        for what in phases:
            run(what, CALLERS[-1], WARM_UP_SECONDS)
        for number, callers in itertools.product(range(1, bench.rounds + 1), CALLERS):
            for what in phases:
                bench.progress(f"round {number}, {what}, {callers} callers")
                outcomes[what, callers].append(run(what, callers, phase_seconds))
            for what, script in scripts.items():
                bench.progress(f"round {number}, {what} by pgbench, {callers} callers")
                variables = {"run": next(runs), "n": 0}
                limits[what, callers].append(
                    pgbench.run(bench.postgres, url, script, clients=callers, variables=variables)
                )
        memory = service.rss_bytes(ours.pid) / 2**20
        with psycopg.connect(url) as db:
            stored = db.execute(COUNT, (SESSIONS,)).fetchone()
        if stored != (created_count,):
            raise RuntimeError(
                f"{created_count} messages were acknowledged, but {stored} are stored"
            )
    return [figure for callers in CALLERS for figure in _figures(outcomes, limits, callers)] + [
        Figure(
            part=NAME,
            name="memory of the server afterwards",
            unit="MiB",
            measured=[memory],
            at_most=True,
            noise_of=None,
        )
    ]


@contextlib.contextmanager
def _other_servers(bench: Bench, url: str) -> Iterator[dict[str, Server]]:
    """The servers whose empty call is compared with ours."""
    with contextlib.ExitStack() as stack:
        bare = service.server(
            url, variants.BARE, log=bench.directory / "bare.log", module="benchmarks.variants"
        )
        servers = {
            STOCK: stack.enter_context(yardsticks.stock(bench.directory / "stock.log")),
            BARE: stack.enter_context(bare),
            GRPC_JS: stack.enter_context(yardsticks.grpc_js(bench.directory / "grpc-js.log")),
        }
        yield {what: server for what, server in servers.items() if server}


def create_sessions(db: psycopg.Connection) -> None:
    db.execute(CREATE_SESSIONS, (list(TENANTS), 2 * SESSIONS))
    # The empty tables are not analyzed, as in a new database.
    db.execute("VACUUM ANALYZE chat_sessions")


def _require_middleware(server: Server) -> None:
    """Raise unless the empty call passes through the middleware, which rejects an empty tenant."""
    with contextlib.closing(http2.Connection(server.address)) as connection:
        stream = connection.call(http2.request_headers(EMPTY_PATH, ""), http2.message(b""))
        try:
            while (stream, None) not in connection.receive():
                pass
        except http2.CallFailedError:
            return
    raise RuntimeError("the empty call bypasses the middleware")


def requests() -> dict[str, tuple[str, list[bytes]]]:
    """The path and the requests of each call, in the order in which each round makes them."""
    generator = random.Random(1)  # noqa: S311 - the same requests in every run
    ids = [str(uuid.UUID(f"{generator.randint(1, SESSIONS):032}")) for _ in range(REQUESTS)]
    reads = [GetChatSessionRequest(session_id=session_id) for session_id in ids]
    writes = [
        CreateChatMessageRequest(
            session_id=session_id,
            message=resources_pb2.ChatMessage(
                role=convert.MESSAGE_ROLE[utterance.role], content=utterance.content
            ),
        )
        for session_id, utterance in zip(ids, chats.repeated(), strict=False)
    ]
    return {
        EMPTY: (EMPTY_PATH, [b""]),
        GET: (
            f"/chat_ticket.v1.ChatSessionService/{GET}",
            [request.SerializeToString() for request in reads],
        ),
        CREATE: (
            f"/chat_ticket.v1.ChatMessageService/{CREATE}",
            [request.SerializeToString() for request in writes],
        ),
    }


def _scripts(directory: Path) -> dict[str, Path]:
    """pgbench scripts that run the statements of the store, with one row each."""
    tenant_id, session_id = "'tenant-' || :tenant::text", "lpad(:session::text, 32, '0')"
    contents = [utterance.content for utterance in itertools.islice(chats.repeated(), TEXTS)]
    statements = {
        GET: pgbench.statement(sessions.GET, {"tenant_id": tenant_id, "id": session_id}),
        CREATE: pgbench.statement(
            append.APPEND,
            {
                "tenant_id": tenant_id,
                "session_id": session_id,
                "count": "1",
                "ticks": "1",
                "ids": "ARRAY[lpad(:message::text, 32, '0')]",
                "roles": "ARRAY['user']",
                "contents": f"ARRAY[{pgbench.texts(contents, ':text')}]",
                "language_codes": "ARRAY[NULL]",
                "search_languages": "ARRAY[NULL]",
                "search_language": "'english'",
                "metadatas": "ARRAY[NULL]",
                "states": "ARRAY[NULL]",
                "author_kinds": "ARRAY[NULL]",
                "author_ids": "ARRAY[NULL]",
                "expected_revision": "NULL",
                "message_ticks": "ARRAY[0]",
                **dict.fromkeys(
                    (
                        "attachment_ids", "attachment_message_ids", "attachment_ticks",
                        "file_urls", "file_names", "file_types",
                    ),
                    "'{}'",
                ),
            },
        ),
    }  # fmt: skip
    scripts = {}
    for what, statement in statements.items():
        scripts[what] = directory / f"{what}.sql"
        scripts[what].write_text(PGBENCH_VARIABLES + statement)
    return scripts


def _figures(outcomes: Outcomes, limits: Limits, callers: int) -> Iterator[Figure]:
    suffix = f"{callers} callers"
    empty = outcomes[EMPTY, callers]
    yield _rate_figure(f"{EMPTY}, {suffix}", empty)
    others = [other for other in (STOCK, BARE, GRPC_JS) if (other, callers) in outcomes]
    if not others:
        yield _cpu_figure(f"{EMPTY}, {suffix}", empty)
    for other in others:
        yield _cpu_figure(
            f"{EMPTY}, {suffix}",
            empty,
            limit=_cpu(outcomes[other, callers], "server"),
            against=other,
            must=EMPTY_TARGETS.get(other),
            stretch=EMPTY_STRETCH_TARGETS.get(other),
            details={"other": outcomes[other, callers]},
        )
    for what in (GET, CREATE):
        ours = outcomes[what, callers]
        yield _rate_figure(f"{what}, {suffix}", ours, limit=_rates(empty), against="empty calls")
        yield _cpu_figure(f"{what}, {suffix}", ours)
        direct = limits.get((what, callers), [])
        if direct:  # otherwise this is a comparison of versions, where small differences mislead
            pairs = zip(_cpu(ours, "server"), _cpu(empty, "server"), strict=True)
            yield Figure(
                part=NAME,
                name=f"CPU of the server above the {EMPTY}, {what}, {suffix}",
                unit="µs",
                measured=[call - base for call, base in pairs],
                must=TARGETS[what],
                stretch=STRETCH_TARGETS[what],
                at_most=True,
                noise_of="cpu",
                noise_scale=statistics.median(_cpu(ours, "server")),
            )
            yield _rate_figure(
                f"{what}, {suffix}",
                ours,
                limit=_rates(direct),
                against="by pgbench",
                note=f"pgbench: {load.cpu_note([outcome.cpu_us for outcome in direct])}",
                details={"pgbench": direct},
            )
        yield Figure(
            part=NAME,
            name=f"PostgreSQL's CPU of {what}, {suffix}",
            unit="µs",
            measured=_cpu(ours, "postgres"),
            limit=_cpu(direct, "postgres"),
            against="by pgbench",
            must=0.4 if what == CREATE and direct else None,
            at_most=True,
            noise_of="cpu",
        )


def _rate_figure(name: str, rounds: Sequence[load.Outcome], **compared: Any) -> Figure:
    about = {"note": load.note(rounds), "details": {"rounds": rounds}}
    return Figure(
        part=NAME, name=name, unit="calls/s", measured=_rates(rounds), **{**about, **compared}
    )


def _cpu_figure(name: str, rounds: Sequence[load.Outcome], **compared: Any) -> Figure:
    return Figure(
        part=NAME,
        name=f"CPU of the server, {name}",
        unit="µs",
        measured=_cpu(rounds, "server"),
        at_most=True,
        noise_of="cpu",
        **compared,
    )


def _rates(rounds: Sequence[load.Outcome | pgbench.Outcome]) -> list[float]:
    return [outcome.calls_per_second for outcome in rounds]


def _cpu(rounds: Sequence[load.Outcome | pgbench.Outcome], of: str) -> list[float]:
    return [outcome.cpu_us[of] for outcome in rounds]
