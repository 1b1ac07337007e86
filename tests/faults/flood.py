"""A flood of callers: `python -m faults.flood CALLERS SECONDS ADDRESS...`, its own process.

A caller calls again as soon as it gets a response, and about 0.1 seconds after an error, which is
sooner than the error's RetryInfo allows. Prints the outcomes of the calls.
"""

import asyncio
import contextlib
import json
import random
import statistics
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import grpc.aio
import uvloop
from support.client import Api

from chat_ticket.v1 import resources_pb2 as r
from chat_ticket.v1.chat_message_pb2 import (
    BatchCreateChatMessagesRequest,
    CreateChatMessageRequest,
)
from chat_ticket.v1.chat_session_pb2 import GetChatSessionRequest, UpdateChatSessionRequest
from faults.record import reason_of

TENANTS = 50
CALLERS_OF_A_CHANNEL = 100
PAUSE_SECONDS = 0.1
SHED = {"RESOURCE_EXHAUSTED", "UNAVAILABLE"}


@dataclass
class FloodResult:
    """Counts of calls, and durations in seconds."""

    accepted: int
    median: float
    p99: float
    errors: dict[str, int]
    slowest_error: float

    @property
    def unexpected(self) -> dict[str, int]:
        """Errors other than those of load shedding."""
        return {
            error: count
            for error, count in self.errors.items()
            if error.partition(" ")[0] not in SHED or error.endswith("OUTCOME_UNKNOWN")
        }


async def run_callers(callers: int, seconds: float, addresses: Sequence[str]) -> FloodResult:
    accepted: list[float] = []
    errors: Counter[str] = Counter()
    error_seconds: list[float] = []
    run = uuid.uuid4().hex[:8]
    apis = [
        Api(
            addresses[number % len(addresses)],
            f"flood-{run}-{number % TENANTS}",
            options=[("grpc.use_local_subchannel_pool", 1)],
        )
        for number in range(max(TENANTS, callers // CALLERS_OF_A_CHANNEL))
    ]
    sessions: list[str] = []
    while len(sessions) < callers:
        with contextlib.suppress(grpc.aio.AioRpcError):  # the server may be overloaded already
            sessions.append((await apis[len(sessions) % len(apis)].session()).id)
    end = time.monotonic() + seconds

    async def caller(number: int) -> None:
        api, session_id, chance = apis[number % len(apis)], sessions[number], random.Random(number)
        while (began := time.monotonic()) < end:
            try:
                await call(api, session_id, chance)
            except grpc.aio.AioRpcError as error:
                error_seconds.append(time.monotonic() - began)
                errors[f"{error.code().name} {reason_of(error)}"] += 1
                await asyncio.sleep(chance.uniform(0, 2 * PAUSE_SECONDS))
            else:
                accepted.append(time.monotonic() - began)

    await asyncio.gather(*(caller(number) for number in range(callers)))
    for api in apis:
        await api.channel.close()
    return FloodResult(
        len(accepted),
        statistics.median(accepted),
        statistics.quantiles(accepted, n=100)[98],
        dict(errors),
        max(error_seconds, default=0.0),
    )


async def call(api: Api, session_id: str, chance: random.Random) -> None:
    """Make a random call. Most calls need a connection of the pool."""
    message = r.ChatMessage(role=r.CHAT_MESSAGE_ROLE_USER, content="x" * 100)
    match chance.randrange(10):
        case 0:
            await api.sessions.GetChatSession(GetChatSessionRequest(session_id=session_id))
        case 1 | 2:
            await api.messages.CreateChatMessage(
                CreateChatMessageRequest(session_id=session_id, message=message)
            )
        case 3 | 4 | 5:
            status = chance.choice((r.CHAT_SESSION_STATUS_ACTIVE, r.CHAT_SESSION_STATUS_RESOLVED))
            request = UpdateChatSessionRequest(session=r.ChatSession(id=session_id, status=status))
            request.update_mask.paths.append("status")
            await api.sessions.UpdateChatSession(request)
        case _:
            await api.messages.BatchCreateChatMessages(
                BatchCreateChatMessagesRequest(session_id=session_id, messages=[message] * 5)
            )


def flood(callers: int, seconds: float, addresses: Sequence[str]) -> FloodResult:
    """Run the callers in a process of their own."""
    done = subprocess.run(
        [sys.executable, "-m", "faults.flood", str(callers), str(seconds), *addresses],
        stdout=subprocess.PIPE,
        check=True,
    )
    return FloodResult(**json.loads(done.stdout))


def main() -> None:
    _, callers, seconds, *addresses = sys.argv
    result = uvloop.run(run_callers(int(callers), float(seconds), addresses))
    print(json.dumps(asdict(result)))


if __name__ == "__main__":
    main()
