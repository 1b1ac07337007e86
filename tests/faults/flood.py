"""Callers in a crowd: `python -m faults.flood CALLERS SECONDS ADDRESS...`, a process of its own.

Each calls again as soon as it is answered, and 0.1 seconds later when it is refused, which is
sooner than it is told. Prints what became of the calls.
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
class Told:
    """Seconds, but for the counts."""

    accepted: int
    median: float
    p99: float
    refused: dict[str, int]
    slowest_refusal: float

    @property
    def wrong(self) -> dict[str, int]:
        """Refusals that do not say that there was too much."""
        return {
            said: count
            for said, count in self.refused.items()
            if said.partition(" ")[0] not in SHED or said.endswith("OUTCOME_UNKNOWN")
        }


async def crowd(callers: int, seconds: float, addresses: Sequence[str]) -> Told:
    accepted: list[float] = []
    refused: Counter[str] = Counter()
    refusals: list[float] = []
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
        with contextlib.suppress(grpc.aio.AioRpcError):  # there may be a crowd already
            sessions.append((await apis[len(sessions) % len(apis)].session()).id)
    end = time.monotonic() + seconds

    async def caller(number: int) -> None:
        api, session_id, chance = apis[number % len(apis)], sessions[number], random.Random(number)
        while (began := time.monotonic()) < end:
            try:
                await call(api, session_id, chance)
            except grpc.aio.AioRpcError as error:
                refusals.append(time.monotonic() - began)
                refused[f"{error.code().name} {reason_of(error)}"] += 1
                await asyncio.sleep(chance.uniform(0, 2 * PAUSE_SECONDS))
            else:
                accepted.append(time.monotonic() - began)

    await asyncio.gather(*(caller(number) for number in range(callers)))
    for api in apis:
        await api.channel.close()
    return Told(
        len(accepted),
        statistics.median(accepted),
        statistics.quantiles(accepted, n=100)[98],
        dict(refused),
        max(refusals, default=0.0),
    )


async def call(api: Api, session_id: str, chance: random.Random) -> None:
    """Most of them take a connection of the pool."""
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


def flood(callers: int, seconds: float, addresses: Sequence[str]) -> Told:
    """In a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "faults.flood", str(callers), str(seconds), *addresses],
        stdout=subprocess.PIPE,
        check=True,
    )
    return Told(**json.loads(done.stdout))


def main() -> None:
    _, callers, seconds, *addresses = sys.argv
    told = uvloop.run(crowd(int(callers), float(seconds), addresses))
    print(json.dumps(asdict(told)))


if __name__ == "__main__":
    main()
