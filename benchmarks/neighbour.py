"""What one tenant's flood costs another: a quiet tenant's latencies, alone and beside it.

One server process with its default quotas, and for contrast a second one, on the same database,
whose quotas are out of the way. The quiet tenant calls at a steady rate, whether or not earlier
calls have been answered, and its latency counts from when a call was due. The flooding tenant has
many callers that each call again as soon as they are answered. Both have a process of their own;
all of them share the machine, so what the flood's own process takes is in the figures as well.

Alone and with a flood take turns, so that whatever else the machine does meets both alike. The
contrast comes last: what it writes in its seconds keeps the database busy for longer.
"""

import asyncio
import collections
import contextlib
import multiprocessing
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import grpc.aio

from benchmarks import service
from benchmarks.figures import Figure
from benchmarks.service import Bench
from chat_ticket.v1 import chat_message_pb2 as messages_pb2
from chat_ticket.v1 import chat_session_pb2 as sessions_pb2
from chat_ticket.v1.chat_message_pb2_grpc import ChatMessageServiceStub
from chat_ticket.v1.chat_session_pb2_grpc import ChatSessionServiceStub
from chat_ticket.v1.resources_pb2 import CHAT_MESSAGE_ROLE_USER, ChatMessage
from chat_ticket_svc import config

NAME = "neighbour"
SECONDS = 90

PHASE_SECONDS = 4.0  # of each phase that are measured
LEAD_SECONDS = 1.5  # of each phase before, in which a flood spends its burst
CALLS_PER_SECOND = 50  # of the quiet tenant
CALLERS = 64  # of the flooding tenant
SESSIONS = 20  # of each tenant
TARGET = 2

ALONE, LIMITED, UNLIMITED = "alone", "with a flood", "with a flood, without quotas"


class Tenant:
    """Makes calls for one tenant: messages are created, and read again."""

    def __init__(self, channel: grpc.aio.Channel, name: str):
        self._sessions = ChatSessionServiceStub(channel)
        self._messages = ChatMessageServiceStub(channel)
        self._options: Any = {"metadata": [("x-tenant-id", name)], "timeout": 30}
        self._ids: list[tuple[str, str]] = []

    async def prepare(self) -> None:
        for _ in range(SESSIONS):
            session = await self._sessions.CreateChatSession(
                sessions_pb2.CreateChatSessionRequest(), **self._options
            )
            message = await self._create(session.session.id)
            self._ids.append((session.session.id, message.message.id))

    async def call(self, number: int) -> None:
        """Every second call creates."""
        session_id, message_id = self._ids[number // 2 % SESSIONS]
        if number % 2:
            request = messages_pb2.GetChatMessageRequest(message_id=message_id)
            await self._messages.GetChatMessage(request, **self._options)
        else:
            await self._create(session_id)

    async def _create(self, session_id: str) -> messages_pb2.CreateChatMessageResponse:
        message = ChatMessage(role=CHAT_MESSAGE_ROLE_USER, content="Where is my order?")
        return await self._messages.CreateChatMessage(
            messages_pb2.CreateChatMessageRequest(session_id=session_id, message=message),
            **self._options,
        )


async def steadily(tenant: Tenant) -> dict[str, float]:
    """Percentiles of the latency in milliseconds, and how many calls failed."""
    latencies: list[float] = []
    failed = 0

    async def timed(number: int, due: float) -> None:
        nonlocal failed
        try:
            await tenant.call(number)
        except grpc.aio.AioRpcError:
            failed += 1
        latencies.append(1000 * (time.perf_counter() - due))

    began = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for number in range(int(PHASE_SECONDS * CALLS_PER_SECOND)):
            due = began + number / CALLS_PER_SECOND
            await asyncio.sleep(due - time.perf_counter())
            group.create_task(timed(number, due))
    latencies.sort()
    return {
        "p50": latencies[len(latencies) // 2],
        "p99": latencies[len(latencies) * 99 // 100],
        "failed": failed,
    }


async def floods(tenant: Tenant) -> dict[str, float]:
    """How many calls were accepted and how many refused in each second."""
    answers: collections.Counter[str] = collections.Counter()
    end = time.perf_counter() + LEAD_SECONDS + PHASE_SECONDS

    async def caller(number: int) -> None:
        while (now := time.perf_counter()) < end:
            number += 1
            try:
                await tenant.call(number)
                answer = "accepted"
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
                    raise
                answer = "refused"
            if now > end - PHASE_SECONDS:
                answers[answer] += 1

    async with asyncio.TaskGroup() as group:
        for number in range(CALLERS):
            group.create_task(caller(number * SESSIONS))
    return {answer: count / PHASE_SECONDS for answer, count in answers.items()}


def client(work: Any, name: str, addresses: list[str], orders: Connection) -> None:
    """A tenant in a process of its own: does `work` on the server that each order numbers."""

    async def obey() -> None:
        async with contextlib.AsyncExitStack() as stack:
            tenants = []
            for address in addresses:
                channel = await stack.enter_async_context(grpc.aio.insecure_channel(address))
                tenants.append(Tenant(channel, name))
                await tenants[-1].prepare()
            orders.send(None)
            while (order := await asyncio.to_thread(orders.recv)) is not None:
                orders.send(await work(tenants[order]))

    asyncio.run(obey())


@contextlib.contextmanager
def clients(addresses: list[str]) -> Iterator[tuple[Connection, Connection]]:
    """The quiet and the flooding tenant."""
    spawn = multiprocessing.get_context("spawn")
    with contextlib.ExitStack() as stack:
        ends = []
        for work, name in ((steadily, "quiet"), (floods, "flooding")):
            ours, theirs = spawn.Pipe()
            process = spawn.Process(target=client, args=(work, name, addresses, theirs))
            process.start()
            theirs.close()
            stack.callback(process.join)
            stack.callback(process.terminate)
            ends.append(ours)
        for end in ends:
            end.recv()
        yield ends[0], ends[1]


@contextlib.contextmanager
def servers(bench: Bench) -> Iterator[list[str]]:
    """The addresses of one with quotas and one without, on the same database."""
    with contextlib.ExitStack() as stack:
        url = stack.enter_context(bench.postgres.database())
        yield [
            stack.enter_context(
                service.server(url, log=bench.directory / f"{name}.log", settings=settings)
            ).address
            for name, settings in (("limited", {}), ("unlimited", service.NO_QUOTAS))
        ]


def measure(bench: Bench) -> list[Figure]:
    # With the number of the server that is called.
    phases = [(ALONE, 0), (LIMITED, 0)] * bench.rounds + [(UNLIMITED, 1)] * bench.rounds
    found: dict[str, list[dict[str, float]]] = collections.defaultdict(list)
    with servers(bench) as addresses, clients(addresses) as (quiet, flooding):
        for phase, number in phases:
            bench.progress(phase)
            if phase is not ALONE:
                flooding.send(number)
            time.sleep(LEAD_SECONDS)
            quiet.send(number)
            found[phase].append(quiet.recv())
            if phase is not ALONE:
                found[phase][-1] |= flooding.recv()
    if failed := sum(each["failed"] for phase in (ALONE, LIMITED) for each in found[phase]):
        raise RuntimeError(f"{failed} calls of the quiet tenant failed")

    def figure(phase: str, must: float | None) -> Figure:
        return Figure(
            part=NAME,
            name=f"p99 of a quiet tenant {phase}",
            unit="ms",
            measured=[each["p99"] for each in found[phase]],
            limit=[each["p99"] for each in found[ALONE]],
            against=ALONE,
            must=must,
            at_most=True,
            details={
                "calls_per_second": CALLS_PER_SECOND,
                "flooding_callers": CALLERS,
                "tenant_calls_per_second": config.Quotas().tenant_calls_per_second,
                "phase": found[phase],
                "alone": found[ALONE],
            },
        )

    return [figure(LIMITED, TARGET), figure(UNLIMITED, None)]
