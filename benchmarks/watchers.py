"""Watchers and writers in one client process, which share a clock. Used by `watch`."""

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
STREAMS = 160  # per connection; the server allows 200
MAX_OPENING = 64  # watchers that are catching up at the same time
WARM_UP_SECONDS = 0.5
TIMEOUT_SECONDS = 10  # without an answer from the server
TEXTS = 5_000
MIN_SAMPLES = 100  # fewer events or writes are not worth reporting

CREATE = http2.request_headers("/chat_ticket.v1.ChatMessageService/CreateChatMessage", TENANT)
WATCH = http2.request_headers("/chat_ticket.v1.ChatSessionService/WatchChatSession", TENANT)

clock = time.perf_counter


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """Who watches which session, and how many callers write, at a rate or as fast as they can."""

    address: str
    server: int  # the process ids of the server and of PostgreSQL
    postgres: int
    sessions: Sequence[str]  # without messages; each write picks one at random
    watched: Sequence[str] = ()  # the session of each watcher
    callers: int
    writes_per_second: float = math.inf
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Outcome:
    writes_per_second: float
    events: int
    latency_ms: Mapping[str, float]  # from a create to each event; empty without watchers
    cpu_us: Mapping[str, float]  # per write with its events, by process, including this client
    watcher_bytes: float  # the server's memory per watcher


def run(scenario: Scenario) -> Outcome:
    with contextlib.ExitStack() as stack:
        return _Client(scenario, stack).run()


class _Client:
    def __init__(self, scenario: Scenario, stack: contextlib.ExitStack):
        self._scenario = scenario
        self._poll = stack.enter_context(select.epoll())

        def connect(count: int) -> list[http2.Connection]:
            connections = []
            for _ in range(count):
                connection = http2.Connection(scenario.address)
                connections.append(stack.enter_context(contextlib.closing(connection)))
                self._poll.register(connection.fileno(), select.EPOLLIN)
            return connections

        watchers = len(scenario.watched)
        self._watching = connect(max(CONNECTIONS, math.ceil(watchers / STREAMS)) if watchers else 0)
        self._writing = connect(CONNECTIONS)
        self._connections = {c.fileno(): c for c in self._watching + self._writing}
        self._is_writing = {c.fileno() for c in self._writing}
        self._watchers_of = collections.Counter(scenario.watched)
        self._partial: dict[tuple[int, int], bytes] = {}
        self._contents = itertools.cycle(
            [utterance.content for utterance in itertools.islice(chats.repeated(), TEXTS)]
        )
        self._next_connection = itertools.cycle(self._writing)
        self._sent_at: dict[str, float] = {}
        self._arrived: list[tuple[str, float]] = []  # the message and the time of each event
        self._answered_at: list[float] = []
        self._caught_up = 0
        self._expected = 0

    def run(self) -> Outcome:
        memory = rss_bytes(self._scenario.server)
        self._watch()
        memory = rss_bytes(self._scenario.server) - memory
        begin = clock() + WARM_UP_SECONDS
        self._write(until=begin)
        before = self._cpu()
        end = begin + self._scenario.seconds
        self._write(until=end)
        used = {name: seconds - before[name] for name, seconds in self._cpu().items()}
        self._read_until(lambda: len(self._answered_at) == len(self._sent_at), "answers")
        self._read_until(lambda: len(self._arrived) == self._expected, "events")
        writes = sum(begin <= answered < end for answered in self._answered_at)
        latencies = sorted(
            1000 * (arrived - self._sent_at[message_id])
            for message_id, arrived in self._arrived
            if begin <= self._sent_at[message_id] < end
        )
        count = len(latencies)
        if not writes or (count if self._scenario.watched else writes) < MIN_SAMPLES:
            raise http2.CallFailedError(f"{writes} writes, {count} events: too few to measure")
        percentiles = (
            {"p50": latencies[count // 2], "p99": latencies[count * 99 // 100]} if count else {}
        )
        return Outcome(
            writes_per_second=writes / self._scenario.seconds,
            events=count,
            latency_ms=percentiles,
            cpu_us={name: 1e6 * seconds / writes for name, seconds in used.items()},
            watcher_bytes=memory / max(1, len(self._scenario.watched)),
        )

    def _cpu(self) -> dict[str, float]:
        return {
            "server": cpu_seconds(self._scenario.server),
            "postgres": cpu_seconds(self._scenario.postgres),
            "client": time.process_time(),
        }

    def _watch(self) -> None:
        """Start all watchers, and wait until they have caught up."""
        connections = itertools.cycle(self._watching)
        for number, session_id in enumerate(self._scenario.watched):
            request = WatchChatSessionRequest(session_id=session_id).SerializeToString()
            next(connections).call(WATCH, http2.message(request))
            self._catch_up(number + 1 - MAX_OPENING)
        self._catch_up(len(self._scenario.watched))

    def _catch_up(self, count: int) -> None:
        self._read_until(lambda: self._caught_up >= count, "streams")

    def _write(self, until: float) -> None:
        """Create messages at the scenario's rate, or as soon as a caller is free."""
        pause = 1 / self._scenario.writes_per_second
        due = clock()
        while (now := clock()) < until:
            running = len(self._sent_at) - len(self._answered_at)
            if running < self._scenario.callers and now >= due:
                self._create()
                due += pause
            else:
                self._read(max(0, min(until, due if due > now else until) - now))

    def _create(self) -> None:
        session_id = random.choice(self._scenario.sessions)  # noqa: S311 - for a load
        message_id = str(uuid_utils.uuid7())
        message = ChatMessage(
            id=message_id, role=CHAT_MESSAGE_ROLE_USER, content=next(self._contents)
        )
        request = CreateChatMessageRequest(session_id=session_id, message=message)
        body = http2.message(request.SerializeToString())
        self._expected += self._watchers_of[session_id]
        self._sent_at[message_id] = clock()
        next(self._next_connection).call(CREATE, body)

    def _read_until(self, reached: Callable[[], bool], what: str) -> None:
        deadline = clock() + TIMEOUT_SECONDS
        while not reached():
            if clock() > deadline:
                raise http2.CallFailedError(
                    f"some {what} are missing after {TIMEOUT_SECONDS} seconds"
                )
            self._read(0.1)

    def _read(self, seconds: float) -> None:
        """Read everything that has arrived, and only then process it."""
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
                        self._answered_at.append(arrived)
                elif part is None:
                    raise http2.CallFailedError("a watch has ended")
                else:
                    self._handle_events(descriptor, stream, part, arrived)

    def _handle_events(self, descriptor: int, stream: int, part: bytes, arrived: float) -> None:
        """Process data of a watch stream, which may end within a message."""
        data = self._partial.pop((descriptor, stream), b"") + part
        consumed = 0
        for frame in http2.messages(data):
            consumed += 5 + len(frame)
            event = WatchChatSessionResponse.FromString(frame)
            self._caught_up += event.HasField("caught_up")
            messages = event.messages_created.messages
            self._arrived += [(message.id, arrived) for message in messages]
        if consumed < len(data):
            self._partial[descriptor, stream] = data[consumed:]
