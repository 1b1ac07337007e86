"""The worker process of a peer: runs timed operations on its conversations.

Each peer's module runs it. Every line of stdin is an order in JSON, and is answered by a line of
JSON on stdout.
"""

import asyncio
import itertools
import json
import resource
import sys
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

Utterance = tuple[str, str]  # the role, "user" or "assistant", and the text

CALLERS = 16


class Peer(Protocol):
    """A library or service that stores conversations, which are named by UUIDs."""

    async def open(self, address: str) -> None: ...

    async def begin(self, conversation: str) -> None:
        """Called once per conversation, before anything is added."""

    async def add(self, conversation: str, utterances: Sequence[Utterance]) -> None:
        """Add messages. Returns when they are durable."""

    async def add_twice(self, conversation: str, utterance: Utterance) -> None:
        """Add one message, and then the same message again, like a caller who lost the answer."""

    async def read(self, conversation: str) -> list[Utterance]:
        """All messages of a conversation."""


class Worker:
    """The methods are the orders."""

    def __init__(self, peer: Peer):
        self._peer = peer
        self._utterances: list[Utterance] = []
        self._conversations: list[str] = []
        self._by_size: dict[int, str] = {}
        self._turns = itertools.count()

    async def prepare(
        self, utterances: list[Utterance], conversations: int, sizes: list[int]
    ) -> None:
        """Begin conversations to be added to, and fill one of each size to be read."""
        self._utterances = [(role, text) for role, text in utterances]
        self._conversations = [await self._begin() for _ in range(conversations)]
        for size in sizes:
            self._by_size[size] = await self._begin()
            await self._peer.add(self._by_size[size], self._utterances[:size])
            if await self._peer.read(self._by_size[size]) != self._utterances[:size]:
                raise RuntimeError("the messages read differ from those added")

    async def _begin(self) -> str:
        conversation = str(uuid.uuid4())
        await self._peer.begin(conversation)
        return conversation

    async def append(self, seconds: float) -> dict[str, float]:
        """Many callers, each of which adds messages to the conversations in turn."""

        async def call() -> None:
            turn = next(self._turns)
            conversation = self._conversations[turn % len(self._conversations)]
            await self._peer.add(conversation, [self._utterances[turn % len(self._utterances)]])

        return await _timed(call, CALLERS, seconds)

    async def read(self, size: int, seconds: float) -> dict[str, float]:
        """One caller, which reads a whole conversation repeatedly."""

        async def call() -> None:
            if len(await self._peer.read(self._by_size[size])) != size:
                raise RuntimeError("messages are missing")

        return await _timed(call, 1, seconds)

    async def read_while_appending(self, seconds: float) -> dict[str, int]:
        """Many callers add to one conversation, while one reads it repeatedly.

        `reordered` counts the reads that did not start with the whole result of the read before: a
        message appeared in front of others that had been read. A reader that asks only for messages
        after the last one would never get it.
        """
        conversation = await self._begin()
        numbers = itertools.count()
        reads, reordered = 0, 0
        previous: list[Utterance] = []

        async def add() -> None:
            await self._peer.add(conversation, [("user", str(next(numbers)))])

        async def read() -> None:
            nonlocal reads, reordered, previous
            current = await self._peer.read(conversation)
            reads += 1
            reordered += current[: len(previous)] != previous
            previous = current

        await asyncio.gather(_timed(add, CALLERS, seconds), _timed(read, 1, seconds))
        return {"reads": reads, "reordered": reordered}

    async def repeat(self) -> int:
        """How many messages are stored when one is added twice."""
        conversation = await self._begin()
        await self._peer.add_twice(conversation, self._utterances[0])
        return len(await self._peer.read(conversation))


async def _timed(
    call: Callable[[], Awaitable[None]], callers: int, seconds: float
) -> dict[str, float]:
    latencies: list[float] = []

    async def caller() -> None:
        while (started := time.perf_counter()) < end:
            await call()
            latencies.append(1000 * (time.perf_counter() - started))

    cpu, started_at = _cpu_seconds(), time.perf_counter()
    end = started_at + seconds
    await asyncio.gather(*(caller() for _ in range(callers)))
    elapsed = time.perf_counter() - started_at
    latencies.sort()
    return {
        "calls": len(latencies),
        "seconds": elapsed,
        "cpu_seconds": _cpu_seconds() - cpu,
        "p50_ms": latencies[len(latencies) // 2],
        "p99_ms": latencies[len(latencies) * 99 // 100],
    }


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def run(peer: Peer) -> None:
    """Run orders until stdin ends. The argument of the process is the peer's address."""

    async def serve_orders() -> None:
        await peer.open(sys.argv[1])
        worker = Worker(peer)
        while line := await asyncio.to_thread(sys.stdin.readline):
            order, arguments = json.loads(line)
            answer: Any = await getattr(worker, order)(**arguments)
            print(json.dumps(answer), flush=True)

    asyncio.run(serve_orders())
