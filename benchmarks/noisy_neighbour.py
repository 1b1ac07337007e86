"""Measure what one tenant's flood costs another: a quiet tenant's latencies, alone and beside it.

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
import json
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import grpc.aio
from tqdm import tqdm

from chat_ticket.v1 import chat_message_pb2 as messages_pb2
from chat_ticket.v1 import chat_session_pb2 as sessions_pb2
from chat_ticket.v1.chat_message_pb2_grpc import ChatMessageServiceStub
from chat_ticket.v1.chat_session_pb2_grpc import ChatSessionServiceStub
from chat_ticket.v1.resources_pb2 import CHAT_MESSAGE_ROLE_USER, ChatMessage
from chat_ticket_svc import config
from chat_ticket_svc.embedded import EmbeddedPostgres

ROUNDS = 5
SECONDS = 7.0  # of each phase that are measured
LEAD_SECONDS = 2.0  # of each phase before, in which a flood spends its burst
CALLS_PER_SECOND = 50  # of the quiet tenant
CALLERS = 64  # of the flooding tenant
SESSIONS = 20  # of each tenant
TARGET = 2
START_SECONDS = 60

ALONE, LIMITED, UNLIMITED = "alone", "with a flood", "with a flood, without quotas"
# With the number of the server that is called.
PHASES = [(ALONE, 0), (LIMITED, 0)] * ROUNDS + [(UNLIMITED, 1)] * ROUNDS


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
        for number in range(int(SECONDS * CALLS_PER_SECOND)):
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
    end = time.perf_counter() + LEAD_SECONDS + SECONDS

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
            if now > end - SECONDS:
                answers[answer] += 1

    async with asyncio.TaskGroup() as group:
        for number in range(CALLERS):
            group.create_task(caller(number * SESSIONS))
    return {answer: count / SECONDS for answer, count in answers.items()}


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
def server(log: Path, *arguments: str, **settings: str) -> Iterator[str]:
    """A server process; gives its address."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "chat_ticket_svc", "serve", "--port", "0", *arguments],
            env={**os.environ, "CHAT_TICKET_LOG_FORMAT": "json", **settings},
            stdout=subprocess.DEVNULL,
            stderr=output,
            start_new_session=True,  # Ctrl-C is for us, who end the server in our turn
        )
    try:
        deadline = time.monotonic() + START_SECONDS
        while not (listening := re.search(r'^.*"listening".*}$', log.read_text(), re.MULTILINE)):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server did not start: {log.read_text()[-2000:]}")
            time.sleep(0.05)
        yield f"127.0.0.1:{json.loads(listening[0])['port']}"
    finally:
        process.terminate()
        process.wait()


@contextlib.contextmanager
def servers(directory: Path) -> Iterator[list[str]]:
    """One with quotas and one without, on the same database."""
    data = directory / "postgres"
    high = {f"CHAT_TICKET_QUOTAS__{name.upper()}": "1000000" for name in config.Quotas.model_fields}
    with server(directory / "limited.log", "--embedded", str(data)) as limited:
        # Not started here: it knows where the PostgreSQL of the first server listens.
        database_url = EmbeddedPostgres(data).url("chat_ticket")
        with server(directory / "unlimited.log", DATABASE_URL=database_url, **high) as unlimited:
            yield [limited, unlimited]


def measure(quiet: Connection, flooding: Connection) -> dict[str, list[dict[str, float]]]:
    """For each phase, the figures of its rounds."""
    figures: dict[str, list[dict[str, float]]] = collections.defaultdict(list)
    # On a terminal only: in a file a bar is noise.
    with tqdm(total=len(PHASES), unit=" phases", disable=None, leave=False) as bar:
        for phase, number in PHASES:
            bar.set_description(phase)
            if phase is not ALONE:
                flooding.send(number)
            time.sleep(LEAD_SECONDS)
            quiet.send(number)
            figures[phase].append(quiet.recv())
            if phase is not ALONE:
                figures[phase][-1] |= flooding.recv()
            bar.update()
    return figures


def report(figures: dict[str, list[dict[str, float]]]) -> None:
    def median(phase: str, name: str) -> float:
        return statistics.median(each.get(name, 0) for each in figures[phase])

    print(
        f"A quiet tenant of {CALLS_PER_SECOND} calls/s, a flood of {CALLERS} callers, "
        f"a limit of {config.Quotas().tenant_calls_per_second:g} calls/s."
    )
    print(f"The quiet tenant's latency in ms, and the flood's calls/s: medians of {ROUNDS} rounds")
    columns = ("p50", "p99", "p99 from-to", "p99 ratio", "failed", "accepted", "refused")
    print(f"{'':<30}" + "".join(f"{column:>13}" for column in columns))
    for phase, rounds in figures.items():
        p99 = [each["p99"] for each in rounds]
        cells = [
            f"{median(phase, 'p50'):.1f}",
            f"{median(phase, 'p99'):.1f}",
            f"{min(p99):.0f}-{max(p99):.0f}",
            f"{median(phase, 'p99') / median(ALONE, 'p99'):.2f}",
            f"{sum(each['failed'] for each in rounds):.0f}",
            f"{median(phase, 'accepted'):.0f}",
            f"{median(phase, 'refused'):.0f}",
        ]
        print(f"{phase:<30}" + "".join(f"{cell:>13}" for cell in cells))
    ratio = median(LIMITED, "p99") / median(ALONE, "p99")
    print(f"\nthe target, at most {TARGET}x: {'met' if ratio <= TARGET else 'NOT MET'}")


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="chat-ticket-bench-") as directory:
        Path(directory).chmod(0o711)  # PostgreSQL may have to run as somebody else
        with servers(Path(directory)) as addresses, clients(addresses) as (quiet, flooding):
            figures = measure(quiet, flooding)
    report(figures)


if __name__ == "__main__":
    main()
