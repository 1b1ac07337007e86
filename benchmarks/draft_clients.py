"""Writers of answers and their followers in one client process, which share a clock. Used by
`drafts`.

Each writer writes one answer, a piece at a time and at a steady rate, as a draft or as a message
per piece. The latency of a piece counts from the time at which its writer has it, even if it waits
until the piece before is acknowledged.
"""

import abc
import contextlib
import itertools
import math
import select
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import psycopg

from benchmarks import chats, http2
from benchmarks.service import CONNECTIONS, cpu_seconds
from chat_ticket.v1.chat_draft_pb2 import WriteChatDraftRequest, WriteChatDraftResponse
from chat_ticket.v1.chat_message_pb2 import CreateChatMessageRequest
from chat_ticket.v1.chat_session_pb2 import WatchChatSessionRequest, WatchChatSessionResponse
from chat_ticket.v1.resources_pb2 import CHAT_MESSAGE_ROLE_ASSISTANT, ChatDraft, ChatMessage

TENANT = "acme"
PIECE_BYTES = 20
# What an answer has when its measured time begins: half of 4 KiB.
PIECES_BEFORE = 100
STREAMS = 160  # per connection; the server allows 200
MAX_OPENING = 64  # followers that catch up, and drafts that begin or end, at the same time
WARM_UP_SECONDS = 0.7
TIMEOUT_SECONDS = 15  # without what is waited for
MIN_SAMPLES = 40  # fewer pieces are not worth reporting

CREATE = http2.request_headers("/chat_ticket.v1.ChatMessageService/CreateChatMessage", TENANT)
WATCH = http2.request_headers("/chat_ticket.v1.ChatSessionService/WatchChatSession", TENANT)
WRITE = http2.request_headers("/chat_ticket.v1.ChatDraftService/WriteChatDraft", TENANT)

clock = time.perf_counter


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """One writer for each session, and as many followers of each."""

    address: str
    database_url: str
    server: int  # the process ids of the server and of PostgreSQL
    postgres: int
    sessions: Sequence[str]
    followers: int
    pieces_per_second: float  # of each writer
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """CPU and WAL are per piece that was acknowledged in the measured time."""

    pieces_per_second: float  # acknowledged, of all writers
    acknowledged_ms: Mapping[str, float]
    followed_ms: Mapping[str, float]  # empty without followers
    cpu_us: Mapping[str, float]  # by process, including this client
    wal_bytes: float


def run_drafts(scenario: Scenario) -> Outcome:
    with contextlib.ExitStack() as stack:
        return _Drafts(scenario, stack).run()


def run_messages(scenario: Scenario) -> Outcome:
    with contextlib.ExitStack() as stack:
        return _Messages(scenario, stack).run()


class Meter:
    """Measures the CPU and the WAL of a part of a run."""

    def __init__(self, db: psycopg.Connection, watched: Mapping[str, int]):
        self._db = db
        self._watched = watched
        self._cpu_before = self._cpu()
        self._wal_before = self._wal_bytes()

    def per_piece(self, pieces: int) -> tuple[dict[str, float], float]:
        """The microseconds of CPU by process, and the bytes of WAL, since the beginning."""
        used = {name: seconds - self._cpu_before[name] for name, seconds in self._cpu().items()}
        cpu_us = {name: 1e6 * seconds / pieces for name, seconds in used.items()}
        return cpu_us, (self._wal_bytes() - self._wal_before) / pieces

    def _cpu(self) -> dict[str, float]:
        watched = {name: cpu_seconds(pid) for name, pid in self._watched.items()}
        return {**watched, "client": time.process_time()}

    def _wal_bytes(self) -> int:
        position: int
        [[position]] = self._db.execute(
            "SELECT (pg_current_wal_insert_lsn() - '0/0')::bigint"
        ).fetchall()
        return position


def percentiles(latencies: Sequence[float]) -> dict[str, float]:
    """In milliseconds."""
    ordered = sorted(latencies)
    count = len(ordered)
    if count < MIN_SAMPLES:
        raise http2.CallFailedError(f"{count} pieces are too few to measure")
    return {"p50": 1000 * ordered[count // 2], "p99": 1000 * ordered[count * 99 // 100]}


@dataclass(eq=False, kw_only=True)
class _Answer:
    session_id: str
    draft_id: str
    connection: http2.Connection
    stream: int = 0
    due_at: list[float] = field(default_factory=list)  # of each piece that the writer has
    sent: int = 0  # pieces
    acknowledged: int = 0


@dataclass(eq=False, kw_only=True)
class _Follower:
    answer: _Answer
    followed: int = 0  # pieces


class _Client(abc.ABC):
    """Subclasses say how an answer begins, grows and ends."""

    def __init__(self, scenario: Scenario, stack: contextlib.ExitStack):
        self._scenario = scenario
        self._db = stack.enter_context(psycopg.connect(scenario.database_url, autocommit=True))
        self._poll = stack.enter_context(select.epoll())
        self._connections: dict[int, http2.Connection] = {}

        def connect(streams: int) -> Iterator[http2.Connection]:
            connections = []
            for _ in range(min(streams, max(CONNECTIONS, math.ceil(streams / STREAMS)))):
                connection = http2.Connection(scenario.address)
                connections.append(stack.enter_context(contextlib.closing(connection)))
                self._poll.register(connection.fileno(), select.EPOLLIN)
                self._connections[connection.fileno()] = connection
            return itertools.cycle(connections)

        writing = connect(len(scenario.sessions))
        self._answers = [
            _Answer(session_id=session_id, draft_id=str(uuid.uuid4()), connection=next(writing))
            for session_id in scenario.sessions
        ]
        self._following = connect(len(scenario.sessions) * scenario.followers)
        self._streams: dict[tuple[int, int], _Answer | _Follower] = {}
        self._followers: list[_Follower] = []
        self._caught_up = 0
        self._partial: dict[tuple[int, int], bytes] = {}
        seconds = WARM_UP_SECONDS + scenario.seconds + TIMEOUT_SECONDS
        count = PIECES_BEFORE + math.ceil(seconds * scenario.pieces_per_second)
        self._texts = chats.pieces(count, PIECE_BYTES)
        self._begin = self._end = math.inf
        self._acknowledged: list[float] = []  # the latencies
        self._followed: list[float] = []
        self._acknowledged_in_time = 0

    def run(self) -> Outcome:
        self._follow()
        self._begin_answers()
        writing = self._write()
        next(writing)
        deadline = clock() + WARM_UP_SECONDS
        while clock() < deadline:
            next(writing)
        meter = Meter(
            self._db, {"server": self._scenario.server, "postgres": self._scenario.postgres}
        )
        self._begin = clock()
        self._end = self._begin + self._scenario.seconds
        while clock() < self._end:
            next(writing)
        cpu_us, wal_bytes = meter.per_piece(max(1, self._acknowledged_in_time))
        self._drop_unsent()
        answers, followers = self._answers, self._followers
        self._read_until(
            lambda: all(answer.acknowledged == answer.sent for answer in answers), "pieces"
        )
        self._read_until(
            lambda: all(each.followed == each.answer.sent for each in followers), "events"
        )
        self._end_answers()
        return Outcome(
            pieces_per_second=self._acknowledged_in_time / self._scenario.seconds,
            acknowledged_ms=percentiles(self._acknowledged),
            followed_ms=percentiles(self._followed) if followers else {},
            cpu_us=cpu_us,
            wal_bytes=wal_bytes,
        )

    def _follow(self) -> None:
        """Start all followers, and wait until they have caught up."""
        for answer in self._answers:
            request = WatchChatSessionRequest(session_id=answer.session_id, include_drafts=True)
            body = http2.message(request.SerializeToString())
            for _ in range(self._scenario.followers):
                connection = next(self._following)
                follower = _Follower(answer=answer)
                self._followers.append(follower)
                self._streams[connection.fileno(), connection.call(WATCH, body)] = follower
                self._catch_up(len(self._followers) - MAX_OPENING)
        self._catch_up(len(self._followers))

    def _catch_up(self, count: int) -> None:
        self._read_until(lambda: self._caught_up >= count, "followers")

    def _write(self) -> Iterator[None]:
        """Write at the scenario's rate, evenly spread, and read meanwhile."""
        pause = 1 / self._scenario.pieces_per_second / len(self._answers)
        due = clock()
        for answer in itertools.cycle(self._answers):
            while (wait := due - clock()) > 0:
                self._read(wait)
                yield
            answer.due_at.append(clock())
            self._advance(answer)
            due += pause

    def _drop_unsent(self) -> None:
        """Forget the pieces that wait for others. They count with the time that they waited."""
        now = clock()
        for answer in self._answers:
            waited = [now - due for due in answer.due_at[answer.sent :] if due >= self._begin]
            self._acknowledged += waited
            self._followed += waited * self._scenario.followers
            del answer.due_at[answer.sent :]

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
        for descriptor, _ in self._poll.poll(seconds):
            received.append((descriptor, self._connections[descriptor].read(), clock()))
        for descriptor, data, arrived in received:
            for stream, part in self._connections[descriptor].feed(data):
                key = descriptor, stream
                target = self._streams[key]
                for frame in self._frames(key, part):
                    if isinstance(target, _Follower):
                        self._handle_event(target, frame, arrived)
                    else:
                        self._handle_response(target, frame, arrived)
                if part is None and isinstance(target, _Follower):
                    raise http2.CallFailedError("a watch has ended")

    def _frames(self, key: tuple[int, int], part: bytes | None) -> list[bytes]:
        """The complete messages of a stream, whose data may end within one."""
        data = self._partial.pop(key, b"") + (part or b"")
        frames = list(http2.messages(data))
        consumed = sum(5 + len(frame) for frame in frames)
        if consumed < len(data):
            self._partial[key] = data[consumed:]
        return frames

    def _handle_event(self, follower: _Follower, frame: bytes, arrived: float) -> None:
        event = WatchChatSessionResponse.FromString(frame)
        kind = event.WhichOneof("event")
        self._caught_up += kind == "caught_up"
        followed = follower.followed
        if kind == "messages_created" and self._counts_messages:
            followed += len(event.messages_created.messages)
        elif kind == "draft":
            followed = event.draft.length // PIECE_BYTES
        elif kind == "draft_appended":
            appended = event.draft_appended
            if appended.offset != follower.followed * PIECE_BYTES:
                raise http2.CallFailedError("a follower has missed a piece")
            followed = (appended.offset + len(appended.text)) // PIECE_BYTES
        due_at = follower.answer.due_at[follower.followed : followed]
        self._followed += [arrived - due for due in due_at if self._begin <= due < self._end]
        follower.followed = followed

    def _acknowledge(self, answer: _Answer, pieces: int, arrived: float) -> None:
        """Note that so many pieces of an answer are durable."""
        due_at = answer.due_at[answer.acknowledged : pieces]
        self._acknowledged += [arrived - due for due in due_at if self._begin <= due < self._end]
        if self._begin <= arrived < self._end:
            self._acknowledged_in_time += len(due_at)
        answer.acknowledged = pieces

    _counts_messages: bool

    @abc.abstractmethod
    def _begin_answers(self) -> None: ...

    @abc.abstractmethod
    def _end_answers(self) -> None: ...

    @abc.abstractmethod
    def _advance(self, answer: _Answer) -> None:
        """Send what can be sent."""

    @abc.abstractmethod
    def _handle_response(self, answer: _Answer, frame: bytes, arrived: float) -> None: ...


class _Drafts(_Client):
    """All pieces of an answer go through one stream, without waiting for each other."""

    _counts_messages = False

    def __init__(self, scenario: Scenario, stack: contextlib.ExitStack):
        super().__init__(scenario, stack)
        self._opening = 0  # drafts that begin or end

    def _begin_answers(self) -> None:
        for answer in self._answers:
            connection = answer.connection
            answer.stream = connection.open_stream(WRITE)
            self._streams[connection.fileno(), answer.stream] = answer
            start = WriteChatDraftRequest.Start(
                session_id=answer.session_id,
                draft=ChatDraft(id=answer.draft_id, role=CHAT_MESSAGE_ROLE_ASSISTANT),
            )
            self._send(answer, WriteChatDraftRequest(start=start))
            self._opening += 1
            self._await_opening(MAX_OPENING)
        self._await_opening(0)

        for answer in self._answers:
            answer.due_at = [clock()] * PIECES_BEFORE
            self._advance(answer)

    def _advance(self, answer: _Answer) -> None:
        text = "".join(self._texts[answer.sent : len(answer.due_at)])
        append = WriteChatDraftRequest.Append(offset=answer.sent * PIECE_BYTES, text=text)
        answer.sent = len(answer.due_at)
        self._send(answer, WriteChatDraftRequest(append=append))

    def _end_answers(self) -> None:
        for answer in self._answers:
            finish = WriteChatDraftRequest.Finish()
            self._send(answer, WriteChatDraftRequest(finish=finish), is_last=True)
            self._opening += 1
            self._await_opening(MAX_OPENING)
        self._await_opening(0)

    def _await_opening(self, limit: int) -> None:
        self._read_until(lambda: self._opening <= limit, "drafts")

    def _handle_response(self, answer: _Answer, frame: bytes, arrived: float) -> None:
        response = WriteChatDraftResponse.FromString(frame)
        kind = response.WhichOneof("response")
        if kind == "written":
            self._acknowledge(answer, response.written.length // PIECE_BYTES, arrived)
        elif kind == "started":
            self._opening -= 1
        elif kind == "finished":
            self._opening -= 1
            if response.finished.message.content != "".join(self._texts[: answer.sent]):
                raise http2.CallFailedError("the message is not what was written")
        else:
            raise http2.CallFailedError(f"unexpected response: {kind}")

    @staticmethod
    def _send(answer: _Answer, request: WriteChatDraftRequest, *, is_last: bool = False) -> None:
        body = http2.message(request.SerializeToString())
        answer.connection.send(answer.stream, body, is_last=is_last)


class _Messages(_Client):
    """A message per piece. Each waits until the one before is created: the order is not kept
    otherwise.
    """

    _counts_messages = True

    def _begin_answers(self) -> None:
        pass

    def _end_answers(self) -> None:
        pass

    def _advance(self, answer: _Answer) -> None:
        if answer.sent > answer.acknowledged or answer.sent == len(answer.due_at):
            return
        message = ChatMessage(role=CHAT_MESSAGE_ROLE_ASSISTANT, content=self._texts[answer.sent])
        request = CreateChatMessageRequest(session_id=answer.session_id, message=message)
        connection = answer.connection
        answer.sent += 1
        stream = connection.call(CREATE, http2.message(request.SerializeToString()))
        self._streams[connection.fileno(), stream] = answer

    def _handle_response(self, answer: _Answer, frame: bytes, arrived: float) -> None:  # noqa: ARG002
        self._acknowledge(answer, answer.acknowledged + 1, arrived)
        self._advance(answer)
