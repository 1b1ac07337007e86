"""Watchers and writers in one client process, on one clock; see `follow`."""

import collections
import contextlib
import itertools
import math
import random
import select
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import uuid_utils

from benchmarks import chats, http2
from benchmarks.service import CONNECTIONS, cpu_seconds, rss_bytes
from chat_ticket.v1.chat_message_pb2 import CreateChatMessageRequest
from chat_ticket.v1.chat_session_pb2 import WatchChatSessionRequest, WatchChatSessionResponse
from chat_ticket.v1.resources_pb2 import CHAT_MESSAGE_ROLE_USER, ChatMessage

TENANT = "acme"
STREAMS = 160  # of a connection; the server takes 200
OPENING = 64  # watchers at the same time
LEAD_SECONDS = 0.5  # before what is measured
PATIENCE_SECONDS = 10  # with a server that does not answer
TEXTS = 5_000
FEWEST = 100

CREATE = http2.request_headers("/chat_ticket.v1.ChatMessageService/CreateChatMessage", TENANT)
WATCH = http2.request_headers("/chat_ticket.v1.ChatSessionService/WatchChatSession", TENANT)

clock = time.perf_counter


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Who watches which session, and how many callers write: steadily, or without a pause."""

    address: str
    server: int  # its pid, and PostgreSQL's
    postgres: int
    sessions: Sequence[str]  # without messages; written to at random
    watched: Sequence[str] = ()  # the session of each watcher
    callers: int
    writes_per_second: float = math.inf
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Outcome:
    writes_per_second: float
    events: int
    latency_ms: Mapping[str, float]  # from a create to each of its events; empty without watchers
    cpu_us: Mapping[str, float]  # of a write with its events, also of this client
    watcher_bytes: float  # of the server's memory


def play(scene: Scene) -> Outcome:
    with contextlib.ExitStack() as stack:
        return _Client(scene, stack).play()


class _Client:
    def __init__(self, scene: Scene, stack: contextlib.ExitStack):
        self._scene = scene
        self._poll = stack.enter_context(select.epoll())

        def connect(count: int) -> list[http2.Connection]:
            made = []
            for _ in range(count):
                connection = http2.Connection(scene.address)
                made.append(stack.enter_context(contextlib.closing(connection)))
                self._poll.register(connection.fileno(), select.EPOLLIN)
            return made

        watchers = len(scene.watched)
        self._watching = connect(max(CONNECTIONS, math.ceil(watchers / STREAMS)) if watchers else 0)
        self._writing = connect(CONNECTIONS)
        self._connections = {each.fileno(): each for each in self._watching + self._writing}
        self._is_writing = {each.fileno() for each in self._writing}
        self._watchers_of = collections.Counter(scene.watched)
        self._partial: dict[tuple[int, int], bytes] = {}
        self._texts = itertools.cycle(
            [said.content for said in itertools.islice(chats.repeated(), TEXTS)]
        )
        self._turns = itertools.cycle(self._writing)
        self._sent: dict[str, float] = {}  # when each message was
        self._arrived: list[tuple[str, float]] = []  # each event's message, and when it came
        self._answered: list[float] = []
        self._caught_up = 0
        self._expected = 0

    def play(self) -> Outcome:
        memory = rss_bytes(self._scene.server)
        self._watch()
        memory = rss_bytes(self._scene.server) - memory
        begin = clock() + LEAD_SECONDS
        self._write(until=begin)
        before = self._cpu()
        end = begin + self._scene.seconds
        self._write(until=end)
        taken = {name: seconds - before[name] for name, seconds in self._cpu().items()}
        self._until(lambda: len(self._answered) == len(self._sent), "answers")
        self._until(lambda: len(self._arrived) == self._expected, "events")
        writes = sum(begin <= answered < end for answered in self._answered)
        latencies = sorted(
            1000 * (arrived - self._sent[message_id])
            for message_id, arrived in self._arrived
            if begin <= self._sent[message_id] < end
        )
        count = len(latencies)
        if not writes or (count if self._scene.watched else writes) < FEWEST:
            raise http2.CallFailedError(
                f"{writes} writes, {count} events: too few to tell anything"
            )
        percentiles = (
            {"p50": latencies[count // 2], "p99": latencies[count * 99 // 100]} if count else {}
        )
        return Outcome(
            writes_per_second=writes / self._scene.seconds,
            events=count,
            latency_ms=percentiles,
            cpu_us={name: 1e6 * seconds / writes for name, seconds in taken.items()},
            watcher_bytes=memory / max(1, len(self._scene.watched)),
        )

    def _cpu(self) -> dict[str, float]:
        return {
            "server": cpu_seconds(self._scene.server),
            "postgres": cpu_seconds(self._scene.postgres),
            "client": time.process_time(),
        }

    def _watch(self) -> None:
        """Begin to follow; returns when all have caught up."""
        turns = itertools.cycle(self._watching)
        for number, session_id in enumerate(self._scene.watched):
            request = WatchChatSessionRequest(session_id=session_id).SerializeToString()
            next(turns).call(WATCH, http2.message(request))
            self._catch_up(number + 1 - OPENING)
        self._catch_up(len(self._scene.watched))

    def _catch_up(self, count: int) -> None:
        self._until(lambda: self._caught_up >= count, "streams")

    def _write(self, until: float) -> None:
        """Create messages: when it is time, or as soon as one is answered."""
        pause = 1 / self._scene.writes_per_second
        due = clock()
        while (now := clock()) < until:
            running = len(self._sent) - len(self._answered)
            if running < self._scene.callers and now >= due:
                self._create()
                due += pause
            else:
                self._read(max(0, min(until, due if due > now else until) - now))

    def _create(self) -> None:
        session_id = random.choice(self._scene.sessions)  # noqa: S311 - for a load
        message_id = str(uuid_utils.uuid7())
        message = ChatMessage(id=message_id, role=CHAT_MESSAGE_ROLE_USER, content=next(self._texts))
        request = CreateChatMessageRequest(session_id=session_id, message=message)
        body = http2.message(request.SerializeToString())
        self._expected += self._watchers_of[session_id]
        self._sent[message_id] = clock()
        next(self._turns).call(CREATE, body)

    def _until(self, reached: Callable[[], bool], what: str) -> None:
        deadline = clock() + PATIENCE_SECONDS
        while not reached():
            if clock() > deadline:
                raise http2.CallFailedError(f"not all {what} came in {PATIENCE_SECONDS} seconds")
            self._read(0.1)

    def _read(self, seconds: float) -> None:
        """Read what comes, and look at it when for the moment nothing more does."""
        received = []
        while ready := self._poll.poll(seconds):
            seconds = 0
            for descriptor, _ in ready:
                data = self._connections[descriptor].read()
                received.append((descriptor, data, clock()))
        for descriptor, data, arrived in received:
            for stream, part in self._connections[descriptor].feed(data):
                if descriptor in self._is_writing:
                    if part is None:
                        self._answered.append(arrived)
                elif part is None:
                    raise http2.CallFailedError("a watch ended")
                else:
                    self._take(descriptor, stream, part, arrived)

    def _take(self, descriptor: int, stream: int, part: bytes, arrived: float) -> None:
        """What came on a watch: whole messages, or a part of one."""
        data = self._partial.pop((descriptor, stream), b"") + part
        taken = 0
        for message in http2.messages(data):
            taken += 5 + len(message)
            event = WatchChatSessionResponse.FromString(message)
            self._caught_up += event.HasField("caught_up")
            self._arrived += [(each.id, arrived) for each in event.messages_created.messages]
        if taken < len(data):
            self._partial[descriptor, stream] = data[taken:]
