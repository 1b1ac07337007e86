"""A process that keeps conversations in one way, whichever: what it is ordered to do and timed at.

The module of each way runs it. Orders come on stdin, a line of JSON each, and are answered by one.
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

Said = tuple[str, str]  # by "user" or "assistant", and what

CALLERS = 16


class Peer(Protocol):
    """A way to keep conversations, which are named by UUIDs."""

    async def open(self, address: str) -> None: ...

    async def begin(self, conversation: str) -> None:
        """Once for each conversation, before anything is added."""

    async def add(self, conversation: str, said: Sequence[Said]) -> None:
        """Returns when it is durable."""

    async def add_twice(self, conversation: str, said: Said) -> None:
        """Add one message, and then the very same, as one does who has lost the answer."""

    async def read(self, conversation: str) -> list[Said]:
        """All that was said."""


class Worker:
    """Its methods are the orders."""

    def __init__(self, peer: Peer):
        self._peer = peer
        self._said: list[Said] = []
        self._growing: list[str] = []
        self._by_size: dict[int, str] = {}
        self._turns = itertools.count()

    async def prepare(self, said: list[Said], conversations: int, sizes: list[int]) -> None:
        """Begin conversations to be added to, and fill one of each size to be read."""
        self._said = [(role, text) for role, text in said]
        self._growing = [await self._begin() for _ in range(conversations)]
        for size in sizes:
            self._by_size[size] = await self._begin()
            await self._peer.add(self._by_size[size], self._said[:size])
            if await self._peer.read(self._by_size[size]) != self._said[:size]:
                raise RuntimeError("what is read is not what was added")

    async def _begin(self) -> str:
        conversation = str(uuid.uuid4())
        await self._peer.begin(conversation)
        return conversation

    async def append(self, seconds: float) -> dict[str, float]:
        """Many callers, each of whom adds a message to the conversation whose turn it is."""

        async def call() -> None:
            turn = next(self._turns)
            conversation = self._growing[turn % len(self._growing)]
            await self._peer.add(conversation, [self._said[turn % len(self._said)]])

        return await _timed(call, CALLERS, seconds)

    async def read(self, size: int, seconds: float) -> dict[str, float]:
        """One caller, who reads a whole conversation again and again."""

        async def call() -> None:
            if len(await self._peer.read(self._by_size[size])) != size:
                raise RuntimeError("not everything is read")

        return await _timed(call, 1, seconds)

    async def follow(self, seconds: float) -> dict[str, int]:
        """Many callers add to one conversation, while one reads it again and again.

        `overtaken` are the reads that did not begin with all that the read before had shown: a
        message has come in before others that had been read. Who had asked for what is new after
        the last one would have missed it for ever.
        """
        conversation = await self._begin()
        numbers = itertools.count()
        reads, overtaken = 0, 0
        before: list[Said] = []

        async def add() -> None:
            await self._peer.add(conversation, [("user", str(next(numbers)))])

        async def read() -> None:
            nonlocal reads, overtaken, before
            now = await self._peer.read(conversation)
            reads += 1
            overtaken += now[: len(before)] != before
            before = now

        await asyncio.gather(_timed(add, CALLERS, seconds), _timed(read, 1, seconds))
        return {"reads": reads, "overtaken": overtaken}

    async def repeat(self) -> int:
        """As how many messages one is kept that was added again."""
        conversation = await self._begin()
        await self._peer.add_twice(conversation, self._said[0])
        return len(await self._peer.read(conversation))


async def _timed(
    call: Callable[[], Awaitable[None]], callers: int, seconds: float
) -> dict[str, float]:
    latencies: list[float] = []

    async def caller() -> None:
        while (started := time.perf_counter()) < end:
            await call()
            latencies.append(1000 * (time.perf_counter() - started))

    cpu, began = _cpu_seconds(), time.perf_counter()
    end = began + seconds
    await asyncio.gather(*(caller() for _ in range(callers)))
    took = time.perf_counter() - began
    latencies.sort()
    return {
        "calls": len(latencies),
        "seconds": took,
        "cpu_seconds": _cpu_seconds() - cpu,
        "p50_ms": latencies[len(latencies) // 2],
        "p99_ms": latencies[len(latencies) * 99 // 100],
    }


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def run(peer: Peer) -> None:
    """Obey until stdin ends. The one argument is where the peer keeps its conversations."""

    async def obey() -> None:
        await peer.open(sys.argv[1])
        worker = Worker(peer)
        while line := await asyncio.to_thread(sys.stdin.readline):
            order, arguments = json.loads(line)
            answer: Any = await getattr(worker, order)(**arguments)
            print(json.dumps(answer), flush=True)

    asyncio.run(obey())
