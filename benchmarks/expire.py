"""What a running `expire` does to the latency of CreateChatMessage.

A caller creates messages at a steady rate, whether or not earlier calls have been answered, so a
latency counts from the time at which a call was due. The sessions that expire are of another tenant
on the same database. Phases with and without `expire` alternate, so that other load affects both
alike. All processes share the machine.
"""

import asyncio
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import grpc.aio
import psycopg

from benchmarks import chats, load, service
from benchmarks.figures import Figure
from benchmarks.service import Bench
from chat_ticket.v1.chat_message_pb2 import CreateChatMessageRequest
from chat_ticket.v1.chat_message_pb2_grpc import ChatMessageServiceStub
from chat_ticket.v1.chat_session_pb2 import CreateChatSessionRequest
from chat_ticket.v1.chat_session_pb2_grpc import ChatSessionServiceStub
from chat_ticket.v1.resources_pb2 import CHAT_MESSAGE_ROLE_USER, ChatMessage

NAME = "expire"
SECONDS = 35

PHASE_SECONDS = 2.5
WARM_UP_SECONDS = 1.5  # in which the command starts
SETTLE_SECONDS = 0.5  # after it has ended
CALLS_PER_SECOND = 200
SESSIONS = 20
TARGET = 2

# For each round: more than are deleted in a phase and its warm-up.
EXPIRED_SESSIONS = 2000
MESSAGES_PER_SESSION = 10

FILL_SESSIONS = """
INSERT INTO chat_sessions (tenant_id, id, revision, created_at, updated_at)
SELECT 'expiring', gen_random_uuid(), %(messages)s, day, day
  FROM generate_series(1, %(sessions)s) AS number,
       LATERAL (SELECT now() - (400 + number %% 300) * interval '1 day') AS old (day)
"""

FILL_MESSAGES = """
INSERT INTO chat_messages (tenant_id, id, session_id, sequence, revision, role, content)
SELECT tenant_id, gen_random_uuid(), id, number, number, 'user',
       (%(texts)s::text[])[1 + (random() * 999)::int]
  FROM chat_sessions, generate_series(1, %(messages)s) AS number
 WHERE tenant_id = 'expiring'
"""


async def _create_steadily(address: str) -> dict[str, float]:
    """Percentiles of the latency in ms of messages that are created at a steady rate."""
    options: Any = {"metadata": [("x-tenant-id", "steady")], "timeout": 30}
    latencies: list[float] = []
    async with grpc.aio.insecure_channel(address) as channel:
        sessions, messages = ChatSessionServiceStub(channel), ChatMessageServiceStub(channel)
        ids = [
            (await sessions.CreateChatSession(CreateChatSessionRequest(), **options)).session.id
            for _ in range(SESSIONS)
        ]

        async def create(session_id: str, due: float) -> None:
            message = ChatMessage(role=CHAT_MESSAGE_ROLE_USER, content="Where is my order?")
            request = CreateChatMessageRequest(session_id=session_id, message=message)
            await messages.CreateChatMessage(request, **options)
            latencies.append(1000 * (time.perf_counter() - due))

        began = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for number in range(int(PHASE_SECONDS * CALLS_PER_SECOND)):
                due = began + number / CALLS_PER_SECOND
                await asyncio.sleep(due - time.perf_counter())
                group.create_task(create(ids[number % SESSIONS], due))
    latencies.sort()
    return {
        "p50": latencies[len(latencies) // 2],
        "p99": latencies[len(latencies) * 99 // 100],
    }


def _phase(address: str) -> dict[str, float]:
    return asyncio.run(_create_steadily(address))


@contextlib.contextmanager
def _expiring(database_url: str) -> Iterator[None]:
    """A running `expire`, which must not come to its end meanwhile."""
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "chat_ticket_svc", "expire", "--tenant", "expiring"),
            *("--older-than", "300d"),
        ],
        env={**os.environ, "DATABASE_URL": database_url},
        stdout=subprocess.DEVNULL,
    )
    try:
        time.sleep(WARM_UP_SECONDS)
        yield
        if process.poll() is not None:
            raise RuntimeError(f"expire ended too early, with the status {process.returncode}")
    finally:
        process.terminate()
        process.wait()


def _sessions(db: psycopg.Connection) -> int:
    row = db.execute("SELECT count(*) FROM chat_sessions WHERE tenant_id = 'expiring'").fetchone()
    return row[0] if row else 0


def measure(bench: Bench) -> list[Figure]:
    alone: list[dict[str, float]] = []
    beside: list[dict[str, float]] = []
    with contextlib.ExitStack() as stack:
        url = stack.enter_context(bench.postgres.database())
        db = stack.enter_context(psycopg.connect(url, autocommit=True))
        bench.progress("filling the database")
        sessions = EXPIRED_SESSIONS * (bench.rounds + 1)
        texts = [utterance.content for utterance in chats.utterances()[:1000]]
        params = {"sessions": sessions, "messages": MESSAGES_PER_SESSION, "texts": texts}
        db.execute(FILL_SESSIONS, params)
        db.execute(FILL_MESSAGES, params)
        db.execute("VACUUM ANALYZE")
        server = stack.enter_context(service.server(url, log=bench.directory / "server.log"))
        pool = stack.enter_context(load.process())
        pool.submit(_phase, server.address).result()  # a warm-up
        for number in range(bench.rounds):
            bench.progress(f"round {number + 1}")
            time.sleep(SETTLE_SECONDS)
            alone.append(pool.submit(_phase, server.address).result())
            with _expiring(url):
                before = _sessions(db)
                beside.append(pool.submit(_phase, server.address).result())
                beside[-1]["expired_per_second"] = (before - _sessions(db)) / PHASE_SECONDS
    return [
        Figure(
            part=NAME,
            name="p99 of creates beside expire",
            unit="ms",
            measured=[each["p99"] for each in beside],
            limit=[each["p99"] for each in alone],
            against="without",
            must=TARGET,
            at_most=True,
            details={"calls_per_second": CALLS_PER_SECOND, "beside": beside, "alone": alone},
        ),
        Figure(
            part=NAME,
            name=f"expired sessions of {MESSAGES_PER_SESSION} messages",
            unit="sessions/s",
            measured=[each["expired_per_second"] for each in beside],
        ),
    ]
