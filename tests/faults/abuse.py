"""What callers do to the service while others work: they cancel, race, repeat, and stop reading.

Each function takes an amount, and returns what was wrong with the responses. The checker finds what
is wrong with the data afterwards.
"""

import asyncio
import contextlib
import itertools
import random
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import grpc.aio
from grpc import StatusCode
from support.client import Api

from chat_ticket.v1 import resources_pb2 as r
from chat_ticket.v1.chat_message_pb2 import (
    BatchCreateChatMessagesRequest,
    CreateChatMessageRequest,
    ListChatMessagesRequest,
    SearchChatMessagesRequest,
)
from chat_ticket.v1.chat_session_pb2 import (
    DeleteChatSessionRequest,
    GetChatSessionRequest,
    UpdateChatSessionRequest,
    WatchChatSessionRequest,
)
from chat_ticket.v1.chat_ticket_pb2 import CreateChatTicketRequest
from faults.checker import Seen, Violation
from faults.record import reason_of
from faults.workload import CHANNEL, Workload

LEAVERS = 12
LEAVE_SECONDS = 0.02  # at most, after which most calls are answered

RACERS = 16
DUPLICATES = 16  # of one id, at once

STREAMS_OF_A_CHANNEL = 10
# More than the flow control windows of gRPC, which grow while a client reads.
LARGE = 200 * 1024  # bytes of a message
LARGE_MESSAGES = 96
PATIENT_SECONDS = 600


async def leave(workload: Workload, count: int) -> Seen:
    """Callers leave at random points of calls of every kind; their writes are made again."""
    numbers = iter(range(count))

    async def leaver(seed: int) -> None:
        chance = random.Random(seed)
        for number in numbers:
            tenant = chance.choice(workload.tenants)
            session_id = chance.choice(workload.sessions[tenant])
            seconds = chance.uniform(0, LEAVE_SECONDS)
            api = workload.api(tenant, number)
            messages = [workload.message(tenant, chance) for _ in range(chance.randint(1, 3))]
            match chance.choice(("one", "many", "get", "search", "list", "watch")):
                case "one":
                    request: Any = CreateChatMessageRequest(
                        session_id=session_id, message=messages[0]
                    )
                    await workload.done(
                        "CreateChatMessage", tenant, session_id, request, number,
                        leave_after=seconds,
                    )  # fmt: skip
                case "many":
                    request = BatchCreateChatMessagesRequest(
                        session_id=session_id, messages=messages
                    )
                    await workload.done(
                        "BatchCreateChatMessages", tenant, session_id, request, number,
                        leave_after=seconds,
                    )  # fmt: skip
                case "get":
                    await _left(
                        api.sessions.GetChatSession(GetChatSessionRequest(session_id=session_id)),
                        seconds,
                    )
                case "search":
                    request = SearchChatMessagesRequest(query="of")
                    await _left(api.messages.SearchChatMessages(request), seconds)
                case "list":
                    request = ListChatMessagesRequest(session_id=session_id)
                    await _left(api.messages.ListChatMessages(request), seconds)
                case _:
                    request = WatchChatSessionRequest(session_id=session_id)
                    await _left(api.sessions.WatchChatSession(request), seconds)

    await asyncio.gather(*(leaver(seed) for seed in range(LEAVERS)))
    return Seen([])


async def _left(call: Any, seconds: float) -> None:
    """A call, unary or a stream, whose caller leaves."""
    asyncio.get_running_loop().call_later(seconds, call.cancel)
    with contextlib.suppress(grpc.aio.AioRpcError, asyncio.CancelledError):
        if hasattr(call, "__aiter__"):
            async for _ in call:
                pass
        else:
            await call


async def race(workload: Workload, count: int) -> Seen:
    """Every two of ticket, archive, delete and append, `count` times, for sessions of their own."""
    races: list[Callable[[str, str], tuple[str, Any]]] = [_ticket, _archive, _delete, _append]
    pairs = [pair for pair in itertools.combinations(races, 2) for _ in range(count)]
    random.Random(count).shuffle(pairs)
    numbered = iter(enumerate(pairs))

    async def racer() -> None:
        for number, pair in numbered:
            tenant = workload.tenants[number % len(workload.tenants)]
            session_id = await workload.create_session(tenant)
            calls: list[Awaitable[Any]] = []
            for server, make in enumerate(pair):
                kind, request = make(tenant, session_id)
                calls.append(workload.done(kind, tenant, session_id, request, number + server))
            await asyncio.gather(*calls)

    await asyncio.gather(*(racer() for _ in range(RACERS)))
    return Seen([])


def _ticket(tenant: str, session_id: str) -> tuple[str, Any]:
    ticket = r.Ticket(id=str(uuid.uuid4()), title=f"help {tenant}")
    return "CreateChatTicket", CreateChatTicketRequest(
        session_id=session_id, chat_ticket_id=str(uuid.uuid4()), ticket=ticket
    )


def _archive(_: str, session_id: str) -> tuple[str, Any]:
    request = UpdateChatSessionRequest(
        session=r.ChatSession(id=session_id, status=r.CHAT_SESSION_STATUS_ARCHIVED)
    )
    request.update_mask.paths.append("status")
    return "UpdateChatSession", request


def _delete(_: str, session_id: str) -> tuple[str, Any]:
    return "DeleteChatSession", DeleteChatSessionRequest(session_id=session_id)


def _append(tenant: str, session_id: str) -> tuple[str, Any]:
    message_id = str(uuid.uuid4())
    message = r.ChatMessage(
        id=message_id, role=r.CHAT_MESSAGE_ROLE_USER, content=f"of {tenant}: {message_id}"
    )
    return "CreateChatMessage", CreateChatMessageRequest(session_id=session_id, message=message)


async def repeat(workload: Workload, count: int) -> Seen:
    """The same create by 16 callers at once, of both servers: all get the same response."""
    numbers = iter(range(count))
    violations: list[Violation] = []

    async def repeater(tenant: str) -> None:
        for number in numbers:
            session_id = workload.sessions[tenant][number % len(workload.sessions[tenant])]
            write = workload.begin(
                "CreateChatMessage", tenant, session_id, _append(tenant, session_id)[1]
            )
            answers = await asyncio.gather(
                *(workload.attempt(write, caller) for caller in range(DUPLICATES))
            )
            sequences = Counter(answer and answer.message.sequence for answer in answers)
            if len(sequences) != 1 or None in sequences:
                text = f"{write.request.message.id} was answered with {dict(sequences)}"
                violations.append(Violation("I1", text))

    await asyncio.gather(*(repeater(tenant) for tenant in workload.tenants))
    return Seen(violations)


async def not_read(workload: Workload, count: int, memory: Callable[[], float]) -> Seen:
    """Streams that are opened and not read any further: they are ended, and cost little."""
    chance = random.Random(count)
    sessions: list[tuple[str, str]] = []
    for tenant in workload.tenants:
        for _ in range(1 + count // (len(workload.tenants) * 100)):
            session_id = await workload.create_session(tenant)
            sessions.append((tenant, session_id))
            for _ in range(0, LARGE_MESSAGES, 12):
                messages = [workload.message(tenant, chance) for _ in range(12)]
                for message in messages:
                    message.content += "x" * LARGE
                request = BatchCreateChatMessagesRequest(session_id=session_id, messages=messages)
                await workload.done(
                    "BatchCreateChatMessages", tenant, session_id, request, len(sessions)
                )
    before = highest = memory()
    async with contextlib.AsyncExitStack() as stack:
        calls = []
        apis: list[Api] = []
        for number in range(count):
            tenant, session_id = sessions[number % len(sessions)]
            if number % STREAMS_OF_A_CHANNEL == 0:
                apis = [
                    await stack.enter_async_context(
                        Api(workload.api(each, number).address, each, options=CHANNEL)
                    )
                    for each in workload.tenants
                ]
            api = apis[workload.tenants.index(tenant)]
            calls.append(await _opened(api, session_id, is_list=bool(number % 2)))
        for _ in range(60):
            await asyncio.sleep(0.1)
            highest = max(highest, memory())
        ends = Counter[str]()
        for call in calls:
            try:
                while await call.read() is not grpc.aio.EOF:
                    pass
                ends["OK"] += 1
            except grpc.aio.AioRpcError as error:
                ends[f"{error.code().name} {reason_of(error)}"] += 1
    violations = []
    if set(ends) != {f"{StatusCode.RESOURCE_EXHAUSTED.name} SLOW_READER"}:
        violations.append(Violation("slow readers", f"streams ended with {dict(ends)}"))
    if highest - before > count * 4:
        violations.append(Violation("slow readers", f"took {highest - before:.0f} MiB"))
    return Seen(violations, f"{(highest - before) / count:.1f} MiB for each stream")


async def _opened(api: Api, session_id: str, *, is_list: bool) -> Any:
    """A stream of which the first response was read."""
    while True:
        if is_list:
            request: Any = ListChatMessagesRequest(session_id=session_id)
            call = api.messages.ListChatMessages(request, timeout=PATIENT_SECONDS)
        else:
            request = WatchChatSessionRequest(session_id=session_id)
            call = api.sessions.WatchChatSession(request, timeout=PATIENT_SECONDS)
        with contextlib.suppress(grpc.aio.AioRpcError):  # for a moment there may be no place
            await call.read()
            return call
