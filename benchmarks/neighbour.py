"""How the flood of one tenant affects another: the latencies of a quiet tenant, with and without.

There are two servers on one database: one with the default quotas and, for contrast, one without
quotas. The quiet tenant calls at a steady rate, whether or not earlier calls have been answered.
Its latency counts from the time at which a call was due. The flooding tenant has many callers,
each of which calls again as soon as it has an answer. Each tenant has a process of its own. All
processes share the machine, so the figures include the CPU time of the flood's client.

Rounds with and without the flood alternate, so that other load affects both alike. The contrast
runs last, because its writes keep the database busy for a while afterwards.
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

PHASE_SECONDS = 4.0  # of each phase, measured
WARM_UP_SECONDS = 1.5  # before each phase; the flood uses up its burst meanwhile
CALLS_PER_SECOND = 50  # of the quiet tenant
CALLERS = 64  # of the flooding tenant
SESSIONS = 20  # of each tenant
TARGET = 2

ALONE, LIMITED, UNLIMITED = "alone", "with a flood", "with a flood, without quotas"


class Tenant:
    """The calls of one tenant, which creates messages and reads them."""

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
        """Create a message if `number` is even, otherwise read one."""
        session_id, message_id = self._ids[number // 2 % SESSIONS]
        if number % 2:
            request = messages_pb2.GetChatMessageRequest(message_id=message_id)
            await self._messages.GetChatMessage(request, **self._options)
        else:
            await self._create(session_id)

    async def _create(self, session_id: str) -> messages_pb2.CreateChatMessageResponse:
        message = ChatMessage(role=CHAT_MESSAGE_ROLE_USER, content="Where is my server_number?")
        return await self._messages.CreateChatMessage(
            messages_pb2.CreateChatMessageRequest(session_id=session_id, message=message),
            **self._options,
        )


async def call_steadily(tenant: Tenant) -> dict[str, float]:
    """Call at a steady rate. Returns percentiles of the latency in ms, and the failed calls."""
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


async def flood(tenant: Tenant) -> dict[str, float]:
    """Call as fast as possible. Returns the accepted and the rejected calls per second."""
    answers: collections.Counter[str] = collections.Counter()
    end = time.perf_counter() + WARM_UP_SECONDS + PHASE_SECONDS

    async def caller(number: int) -> None:
        while (now := time.perf_counter()) < end:
            number += 1
            try:
                await tenant.call(number)
                answer = "accepted"
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
                    raise
                answer = "rejected"
            if now > end - PHASE_SECONDS:
                answers[answer] += 1

    async with asyncio.TaskGroup() as group:
        for number in range(CALLERS):
            group.create_task(caller(number * SESSIONS))
    return {answer: count / PHASE_SECONDS for answer, count in answers.items()}


def client(work: Any, name: str, addresses: list[str], pipe: Connection) -> None:
    """The process of a tenant: does `work` on each server whose number it receives."""

    async def serve_orders() -> None:
        async with contextlib.AsyncExitStack() as stack:
            tenants = []
            for address in addresses:
                channel = await stack.enter_async_context(grpc.aio.insecure_channel(address))
                tenants.append(Tenant(channel, name))
                await tenants[-1].prepare()
            pipe.send(None)
            while (server_number := await asyncio.to_thread(pipe.recv)) is not None:
                pipe.send(await work(tenants[server_number]))

    asyncio.run(serve_orders())


@contextlib.contextmanager
def clients(addresses: list[str]) -> Iterator[tuple[Connection, Connection]]:
    """Pipes to the processes of the quiet and the flooding tenant."""
    spawn = multiprocessing.get_context("spawn")
    with contextlib.ExitStack() as stack:
        ends = []
        for work, name in ((call_steadily, "quiet"), (flood, "flooding")):
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
    """The addresses of a server with quotas and one without, on the same database."""
    with contextlib.ExitStack() as stack:
        url = stack.enter_context(bench.postgres.database())
        yield [
            stack.enter_context(
                service.server(url, log=bench.directory / f"{name}.log", settings=settings)
            ).address
            for name, settings in (("limited", {}), ("unlimited", service.NO_QUOTAS))
        ]


def measure(bench: Bench) -> list[Figure]:
    # Each with the number of the server that is called.
    phases = [(ALONE, 0), (LIMITED, 0)] * bench.rounds + [(UNLIMITED, 1)] * bench.rounds
    results: dict[str, list[dict[str, float]]] = collections.defaultdict(list)
    with servers(bench) as addresses, clients(addresses) as (quiet, flooding):
        for phase, number in phases:
            bench.progress(phase)
            if phase is not ALONE:
                flooding.send(number)
            time.sleep(WARM_UP_SECONDS)
            quiet.send(number)
            results[phase].append(quiet.recv())
            if phase is not ALONE:
                results[phase][-1] |= flooding.recv()
    if failed := sum(each["failed"] for phase in (ALONE, LIMITED) for each in results[phase]):
        raise RuntimeError(f"{failed} calls of the quiet tenant failed")

    def figure(phase: str, must: float | None) -> Figure:
        return Figure(
            part=NAME,
            name=f"p99 of a quiet tenant {phase}",
            unit="ms",
            measured=[each["p99"] for each in results[phase]],
            limit=[each["p99"] for each in results[ALONE]],
            against=ALONE,
            must=must,
            at_most=True,
            details={
                "calls_per_second": CALLS_PER_SECOND,
                "flooding_callers": CALLERS,
                "tenant_calls_per_second": config.Settings().tenant_calls_per_second,
                "phase": results[phase],
                "alone": results[ALONE],
            },
        )

    return [figure(LIMITED, TARGET), figure(UNLIMITED, None)]
