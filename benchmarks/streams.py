"""Reading a session of 100,000 messages, compared with COPY of the same rows in index order.

One COPY reads the rows as they are stored, the other the columns that the service reads, which
include the attachments.
"""

import contextlib
import itertools
import select
import statistics
import time
from collections import defaultdict

import psycopg

from benchmarks import chats, http2, load, service
from benchmarks.figures import Figure
from benchmarks.service import Bench, Server
from chat_ticket.v1.chat_message_pb2 import (
    GetChatMessageRequest,
    ListChatMessagesRequest,
    ListChatMessagesResponse,
)
from chat_ticket_svc.store import messages

NAME = "streams"
SECONDS = 55

TENANT = "acme"
MESSAGES = 100_000
# Two sessions with the same messages, one of them without metadata.
SESSIONS = {
    "with": "0197a000-0000-7000-8000-000000000001",
    "without": "0197a000-0000-7000-8000-000000000002",
}
COMPARED_LISTS = 4  # of each session per round, when two versions are compared
FIRST_MESSAGES = 100  # streams per round that are cancelled after the first message
PAUSE_SECONDS = 0.005  # in which a cancelled stream ends
OPEN_STREAMS = 20
OPEN_SECONDS = 2
TIMEOUT_SECONDS = 20
MAX_MIB_PER_STREAM = 4

LIST = http2.request_headers("/chat_ticket.v1.ChatMessageService/ListChatMessages", TENANT)
GET = http2.request_headers("/chat_ticket.v1.ChatMessageService/GetChatMessage", TENANT)

COPY = """
COPY (
    SELECT {} FROM chat_messages m
     WHERE m.tenant_id = '{}' AND m.session_id = '{}' ORDER BY m.sequence
) TO STDOUT;
"""
ROWS = "m.id, m.session_id, m.sequence, m.revision, m.role, m.content, m.metadata, m.created_at"


def measure(bench: Bench) -> list[Figure]:
    with bench.postgres.database() as url:
        bench.progress("loading")
        with psycopg.connect(url, autocommit=True) as db:
            utterances = list(itertools.islice(chats.repeated(), MESSAGES))
            chats.store(db, TENANT, SESSIONS["with"], utterances)
            bare = (utterance._replace(metadata=None) for utterance in utterances)
            chats.store(db, TENANT, SESSIONS["without"], bare)
            db.execute("VACUUM ANALYZE")
        with service.server(url, log=bench.directory / "server.log") as server:
            speed = _measure_speed(bench, url, server)
            first = _measure_first_message(bench, server)
        memory = _measure_memory(bench, url) if bench.with_limits else []
        return [*speed, first, *memory]


def _measure_speed(bench: Bench, url: str, server: Server) -> list[Figure]:
    listed: dict[str, list[float]] = defaultdict(list)
    copied: dict[str, list[float]] = defaultdict(list)
    copied_same: dict[str, list[float]] = defaultdict(list)
    cpu: dict[str, list[dict[str, float]]] = defaultdict(list)
    pids = {"server": server.pid, "postgres": bench.postgres.pid}
    # A step of a comparison of versions is over in a third of a second.
    rounds = bench.rounds if bench.with_limits else COMPARED_LISTS * bench.rounds
    for number in range(rounds + 1):  # the first is a warm-up
        for name, session_id in SESSIONS.items():
            bench.progress(f"round {number}, {name} metadata")
            before = {of: service.cpu_seconds(pid) for of, pid in pids.items()}
            listed[name].append(MESSAGES / _list(server, session_id))
            used = {of: service.cpu_seconds(pid) - before[of] for of, pid in pids.items()}
            cpu[name].append({of: 1e6 * seconds / MESSAGES for of, seconds in used.items()})
            limits = ((ROWS, copied[name]), (messages.COLUMNS, copied_same[name]))
            for columns, rates in limits if bench.with_limits else ():
                command = COPY.format(columns, TENANT, session_id)
                rates.append(MESSAGES / bench.postgres.psql_seconds(url, command))
    figures = []
    for name in SESSIONS:
        what = f"ListChatMessages of {MESSAGES:,} {name} metadata"
        figures += [
            Figure(
                part=NAME,
                name=what,
                unit="messages/s",
                measured=listed[name][1:],
                limit=limit[name][1:],
                against=against,
                must=0.90,
                stretch=1.0,
                note=load.cpu_note(cpu[name][1:]),
                details={"cpu_us": cpu[name][1:]},
            )
            for limit, against in (
                (copied, "by COPY of the rows"),
                (copied_same, "by COPY of the same columns"),
            )
        ]
        figures.append(
            Figure(
                part=NAME,
                name=f"CPU of the server, {what}",
                unit="µs/message",
                measured=[used["server"] for used in cpu[name][1:]],
                at_most=True,
            )
        )
    slowdown = Figure(
        part=NAME,
        name="a message with metadata",
        unit="µs",
        measured=[1e6 / rate for rate in listed["with"][1:]],
        limit=[1e6 / rate for rate in listed["without"][1:]],
        against="without",
        must=1.2,
        at_most=True,
    )
    return [*figures, slowdown]


def _list(server: Server, session_id: str) -> float:
    """The seconds until all messages of the session have arrived. Raises unless in order."""
    request = ListChatMessagesRequest(session_id=session_id).SerializeToString()
    received: list[bytes | None] = []
    with contextlib.closing(http2.Connection(server.address)) as connection:
        started_at = time.perf_counter()
        connection.call(LIST, http2.message(request))
        while received[-1:] != [None]:
            received += [data for _, data in connection.receive()]
        seconds = time.perf_counter() - started_at
    sequences = [
        message.sequence
        for response in http2.messages(b"".join(data for data in received if data))
        for message in ListChatMessagesResponse.FromString(response).messages
    ]
    if sequences != list(range(1, MESSAGES + 1)):
        raise RuntimeError(f"{len(sequences)} messages arrived, or not in order")
    return seconds


def _measure_first_message(bench: Bench, server: Server) -> Figure:
    """The time to the first message of a stream, compared with a call that reads one message."""
    listing = ListChatMessagesRequest(session_id=SESSIONS["with"])
    firsts, gets = [], []
    with contextlib.closing(http2.Connection(server.address)) as connection:

        def first(headers: bytes, request: bytes) -> tuple[float, bytes]:
            """The milliseconds until the first response, and the response."""
            started_at = time.perf_counter()
            stream = connection.call(headers, http2.message(request))
            data = b""
            while not (responses := list(http2.messages(data))):
                data += b"".join(part or b"" for of, part in connection.receive() if of == stream)
            milliseconds = 1000 * (time.perf_counter() - started_at)
            connection.cancel(stream)
            time.sleep(PAUSE_SECONDS)
            return milliseconds, responses[0]

        _, response = first(LIST, listing.SerializeToString())
        message_id = ListChatMessagesResponse.FromString(response).messages[0].id
        get = GetChatMessageRequest(message_id=message_id)
        for number in range(bench.rounds):
            bench.progress(f"round {number + 1}, first messages")
            pairs = [
                (
                    first(LIST, listing.SerializeToString())[0],
                    first(GET, get.SerializeToString())[0],
                )
                for _ in range(FIRST_MESSAGES)
            ]
            firsts.append(statistics.median(pair[0] for pair in pairs))
            gets.append(statistics.median(pair[1] for pair in pairs))
    return Figure(
        part=NAME,
        name="first message",
        unit="ms",
        measured=firsts,
        limit=gets,
        against="GetChatMessage",
        must=2,
        at_most=True,
    )


def _measure_memory(bench: Bench, url: str) -> list[Figure]:
    """The memory that open streams add to a new server: first all unread, then all read."""
    unread: list[float] = []
    read: list[float] = []
    for number in range(bench.rounds):
        bench.progress(f"round {number + 1}, memory")
        with service.server(url, log=bench.directory / "memory.log") as server:
            before = service.rss_bytes(server.pid)
            for growth, window in ((unread, http2.DEFAULT_WINDOW), (read, http2.LARGEST_WINDOW)):
                service.reset_peak_rss(server.pid)
                _read_streams(server, window)
                growth.append((service.peak_rss_bytes(server.pid) - before) / OPEN_STREAMS / 2**20)
    return [
        Figure(
            part=NAME,
            name=f"memory of a stream, {OPEN_STREAMS} {what}",
            unit="MiB",
            measured=growth,
            must=MAX_MIB_PER_STREAM,
            at_most=True,
            noise_of=None,
        )
        for what, growth in (("unread", unread), ("that are read", read))
    ]


def _read_streams(server: Server, window: int) -> None:
    """Read from several streams for some seconds, each up to its flow-control window."""
    request = ListChatMessagesRequest(session_id=SESSIONS["with"]).SerializeToString()
    with contextlib.ExitStack() as stack:
        poll = stack.enter_context(select.epoll())
        connections = {}
        for _ in range(OPEN_STREAMS):
            connection = stack.enter_context(
                contextlib.closing(http2.Connection(server.address, window=window))
            )
            connection.call(LIST, http2.message(request))
            connections[connection.fileno()] = connection
            poll.register(connection.fileno(), select.EPOLLIN)
        received = dict.fromkeys(connections, 0)
        started_at = time.perf_counter()
        while (passed := time.perf_counter() - started_at) < OPEN_SECONDS or not all(
            received.values()
        ):
            if passed > TIMEOUT_SECONDS:
                raise RuntimeError(f"a stream received nothing in {TIMEOUT_SECONDS} seconds")
            for descriptor, _ in poll.poll(OPEN_SECONDS / 10):
                for _, data in connections[descriptor].receive():
                    received[descriptor] += len(data or b"")
