"""Followers of a tenant's feed, and callers who change its sessions, in one client process.

They share a clock. The followers decode what they are told only after the time has been taken.
"""

import contextlib
import itertools
import random
import select
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks import chats, http2
from benchmarks.service import CONNECTIONS, cpu_seconds
from chat_ticket.v1.chat_message_pb2 import CreateChatMessageRequest, CreateChatMessageResponse
from chat_ticket.v1.chat_session_pb2 import WatchChatSessionsRequest, WatchChatSessionsResponse
from chat_ticket.v1.resources_pb2 import CHAT_MESSAGE_ROLE_USER, ChatMessage

TENANT = "acme"
WARM_UP_SECONDS = 0.3
TIMEOUT_SECONDS = 30  # without an answer from the server
TEXTS = 5_000
CAUGHT_UP_BYTES = 400  # a response of more has sessions

CREATE = http2.request_headers("/chat_ticket.v1.ChatMessageService/CreateChatMessage", TENANT)
FOLLOW = http2.request_headers("/chat_ticket.v1.ChatSessionService/WatchChatSessions", TENANT)

clock = time.perf_counter


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """Who follows the feed of the tenant, and what is written meanwhile, at a steady rate."""

    address: str
    server: int  # the process ids of the server and of PostgreSQL
    postgres: int
    sessions: Sequence[str]  # each write picks one at random
    followers: int
    writes_per_second: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Latencies:
    writes_per_second: float
    responses_per_second: float  # of all followers
    told_ms: Mapping[str, float]  # from the answer of a create until a follower is told
    from_create_ms: Mapping[str, float]  # from the create itself
    cpu_us: Mapping[str, float]  # per write, by process, including this client


@dataclass(frozen=True, kw_only=True)
class Reading:
    sessions_per_second: float
    bytes: int
    cpu_us: Mapping[str, float]  # per session, by process, including this client


class _Write:
    """A create: its session, when it was sent and answered, and the revision that it got."""

    def __init__(self, session_id: str):
        self.session_id = session_id
        self.sent_at = clock()
        self.answered_at = 0.0
        self.revision = 0


class _Stream:
    """The messages of one stream, whose data ends anywhere within them."""

    def __init__(self) -> None:
        self._rest = b""

    def messages(self, data: bytes) -> list[bytes]:
        data = self._rest + data if self._rest else data
        messages = list(http2.messages(data))
        self._rest = data[sum(5 + len(message) for message in messages) :]
        return messages


def follow(scenario: Scenario) -> Latencies:
    with contextlib.ExitStack() as stack:
        return _Client(scenario, stack).run()


class _Client:
    def __init__(self, scenario: Scenario, stack: contextlib.ExitStack):
        self._scenario = scenario
        self._poll = stack.enter_context(select.epoll())

        def connect() -> http2.Connection:
            connection = stack.enter_context(contextlib.closing(http2.Connection(scenario.address)))
            self._poll.register(connection.fileno(), select.EPOLLIN)
            return connection

        # The followers are other processes, so each has a connection of its own.
        self._followers = {c.fileno(): c for c in (connect() for _ in range(scenario.followers))}
        self._callers = {c.fileno(): c for c in (connect() for _ in range(CONNECTIONS))}
        self._next_caller = itertools.cycle(self._callers.values())
        self._streams: dict[tuple[int, int], _Stream] = defaultdict(_Stream)
        self._writes: dict[tuple[int, int], _Write] = {}
        self._answered = 0
        self._caught_up: set[int] = set()
        self._responses = 0
        # By follower and session: the revisions that it was told, and when.
        self._told: dict[tuple[int, str], list[tuple[int, float]]] = defaultdict(list)
        texts = [u.content for u in itertools.islice(chats.repeated(), TEXTS)]
        self._texts = itertools.cycle(texts)

    def run(self) -> Latencies:
        request = http2.message(WatchChatSessionsRequest().SerializeToString())
        for follower in self._followers.values():
            follower.call(FOLLOW, request)
        self._read_until(lambda: len(self._caught_up) == len(self._followers), "caught_up")
        self._write(clock() + WARM_UP_SECONDS)
        before, responses = _cpu(self._scenario), self._responses
        begin = clock()
        self._write(begin + self._scenario.seconds)
        cpu = {name: used - before[name] for name, used in _cpu(self._scenario).items()}
        responses = self._responses - responses
        self._read_until(lambda: self._answered == len(self._writes), "answers")
        self._read_until(self._is_all_told, "events")
        writes = [write for write in self._writes.values() if write.sent_at >= begin]
        told = [(write, at) for write in writes for at in self._told_at(write)]
        return Latencies(
            writes_per_second=len(writes) / self._scenario.seconds,
            responses_per_second=responses / self._scenario.seconds,
            told_ms=_percentiles([max(0.0, at - write.answered_at) for write, at in told]),
            from_create_ms=_percentiles([at - write.sent_at for write, at in told]),
            cpu_us={name: 1e6 * seconds / len(writes) for name, seconds in cpu.items()},
        )

    def _write(self, until: float) -> None:
        """Create messages at the scenario's rate. A create that is due waits for no other."""
        due = clock()
        while (now := clock()) < until:
            if now >= due:
                self._create()
                due += 1 / self._scenario.writes_per_second
            else:
                self._read(min(until, due) - now)

    def _create(self) -> None:
        session_id = random.choice(self._scenario.sessions)  # noqa: S311 - for a load
        message = ChatMessage(role=CHAT_MESSAGE_ROLE_USER, content=next(self._texts))
        request = CreateChatMessageRequest(session_id=session_id, message=message)
        body = http2.message(request.SerializeToString())
        caller, write = next(self._next_caller), _Write(session_id)
        self._writes[caller.fileno(), caller.call(CREATE, body)] = write

    def _is_all_told(self) -> bool:
        """Whether each follower was told each session at its last revision."""
        revisions: dict[str, int] = defaultdict(int)
        for write in self._writes.values():
            revisions[write.session_id] = max(revisions[write.session_id], write.revision)
        return all(
            (told := self._told.get((follower, session_id))) and told[-1][0] >= revision
            for follower in self._followers
            for session_id, revision in revisions.items()
        )

    def _told_at(self, write: _Write) -> list[float]:
        """When each follower was told the session with this write."""
        return [
            next(
                at
                for revision, at in self._told[follower, write.session_id]
                if revision >= write.revision
            )
            for follower in self._followers
        ]

    def _read_until(self, reached: Callable[[], bool], what: str) -> None:
        deadline = clock() + TIMEOUT_SECONDS
        while not reached():
            if clock() > deadline:
                raise http2.CallFailedError(f"{what} are missing after {TIMEOUT_SECONDS} seconds")
            self._read(0.1)

    def _read(self, seconds: float) -> None:
        """Read everything that has arrived, and only then process it."""
        received = []
        while ready := self._poll.poll(max(0, seconds)):
            seconds = 0
            for descriptor, _ in ready:
                connection = self._followers.get(descriptor) or self._callers[descriptor]
                received.append((descriptor, connection, connection.read(), clock()))
        for descriptor, connection, data, at in received:
            for stream, part in connection.feed(data):
                key = descriptor, stream
                if part is None:
                    if descriptor in self._followers:
                        raise http2.CallFailedError("a follower's stream has ended")
                    self._answered += 1
                    continue
                for message in self._streams[key].messages(part):
                    if descriptor in self._followers:
                        self._handle_response(descriptor, message, at)
                    else:
                        created = CreateChatMessageResponse.FromString(message).message
                        write = self._writes[key]
                        write.revision, write.answered_at = created.revision, at

    def _handle_response(self, follower: int, message: bytes, at: float) -> None:
        self._responses += 1
        for event in WatchChatSessionsResponse.FromString(message).events:
            if event.HasField("session"):
                self._told[follower, event.session.id].append((event.session.revision, at))
            elif event.HasField("caught_up"):
                self._caught_up.add(follower)


def read_from_the_beginning(address: str, server: int, postgres: int, sessions: int) -> Reading:
    """Follow the feed from its beginning until it has caught up, and was told all `sessions`.

    The responses are decoded only after the time has been taken, as that is the follower's cost.
    """
    watched = {"server": server, "postgres": postgres}
    request = WatchChatSessionsRequest(from_beginning=True).SerializeToString()
    stream = _Stream()
    responses: list[bytes] = []
    with contextlib.closing(http2.Connection(address)) as connection:
        before, began = _cpu_of(watched), clock()
        connection.call(FOLLOW, http2.message(request))
        while not (responses and _is_caught_up(responses[-1])):
            for _, part in connection.receive():
                if part is None:
                    raise http2.CallFailedError("the stream has ended")
                responses += stream.messages(part)
        seconds = clock() - began
        used = _cpu_of(watched)
    told = {
        event.session.id
        for response in responses
        for event in WatchChatSessionsResponse.FromString(response).events
        if event.HasField("session")
    }
    if len(told) != sessions:
        raise http2.CallFailedError(f"{len(told):,} sessions were told, and not {sessions:,}")
    return Reading(
        sessions_per_second=sessions / seconds,
        bytes=sum(map(len, responses)),
        cpu_us={name: 1e6 * (used[name] - before[name]) / sessions for name in used},
    )


def _is_caught_up(response: bytes) -> bool:
    if len(response) > CAUGHT_UP_BYTES:
        return False
    events = WatchChatSessionsResponse.FromString(response).events
    return any(event.HasField("caught_up") for event in events)


def _percentiles(seconds: list[float]) -> dict[str, float]:
    seconds.sort()
    count = len(seconds)
    return {"p50": 1000 * seconds[count // 2], "p99": 1000 * seconds[count * 99 // 100]}


def _cpu(scenario: Scenario) -> dict[str, float]:
    return _cpu_of({"server": scenario.server, "postgres": scenario.postgres})


def _cpu_of(watched: Mapping[str, int]) -> dict[str, float]:
    """The CPU seconds of each process, including this one."""
    return {**{n: cpu_seconds(pid) for n, pid in watched.items()}, "client": time.process_time()}
