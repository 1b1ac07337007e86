"""What a call takes as the data grows, and as a session does: of one caller, in sequence.

There is a database for each size, loaded by plain SQL, and calls are made on all of them in turn.
Half of the messages are one large tenant's, the others those of a thousand tenants down to a few
messages each; a small one is the same in all. What is called for is as much at every size, or it
is divided by how much it is.
"""

import asyncio
import contextlib
import functools
import itertools
import math
import random
import statistics
import time
import uuid
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, LiteralString

import grpc.aio
import psycopg
import uuid_utils

from benchmarks import chats, service
from benchmarks.figures import Figure
from benchmarks.service import Bench, Server
from chat_ticket.v1 import chat_message_pb2 as messages_pb2
from chat_ticket.v1 import chat_session_pb2 as sessions_pb2
from chat_ticket.v1.chat_message_pb2_grpc import ChatMessageServiceStub
from chat_ticket.v1.chat_session_pb2_grpc import ChatSessionServiceStub
from chat_ticket.v1.resources_pb2 import CHAT_MESSAGE_ROLE_USER, ChatMessage
from chat_ticket_svc.services import paging
from chat_ticket_svc.services.validate import MAX_UUID
from chat_ticket_svc.store import (
    group_commit,
    message_listing,
    messages,
    search,
    session_changes,
    sessions,
)

NAME = "growth"
SECONDS = 240

SIZES = (10_000, 1_000_000, 5_000_000)  # of the data, in messages
LENGTHS = (10, 1_000, 100_000)  # of sessions
LENGTH = 1_000  # where it is the data that grows
TARGET = 1.5

LARGE, SMALL = "large", "small"
OTHER_TENANTS = 1_000
SMALL_SESSIONS = 20
COMMON, RARE = "like", "zyzzyva"
RARE_MESSAGES = 20

PAGE = 50
CALLS = 10  # of a kind in a round
PATIENCE_SECONDS = 30

# In the order in which people would have written it, so that chats overlap.
SAID = """
CREATE UNLOGGED TABLE said AS
SELECT chat, ordinal, role, content, metadata::jsonb AS metadata,
       '7' || substr(digest, 1, 3) || '8' || substr(digest, 4, 15) AS tail
  FROM unnest(%(chats)s::integer[], %(ordinals)s::integer[], %(roles)s::text[],
              %(contents)s::text[], %(metadatas)s::text[])
           AS said (chat, ordinal, role, content, metadata),
       md5(chat || ' ' || ordinal) AS digest
 ORDER BY chat + 2 * ordinal, chat
"""
PLANNED = """
CREATE TEMPORARY TABLE planned (
    tenant_id text, session_id uuid, chat integer, begun timestamptz, length bigint
)
"""
BEGIN_SESSIONS = """
INSERT INTO chat_sessions (tenant_id, id, revision, created_at, updated_at)
SELECT tenant_id, session_id, length, begun, begun + length * interval '20 seconds' FROM planned
"""
SAY = """
INSERT INTO chat_messages
       (tenant_id, id, session_id, sequence, revision, role, content, metadata, created_at)
SELECT tenant_id,
       ('0' || to_hex((extract(epoch FROM begun) * 1000)::bigint + 20000 * ordinal) || tail)::uuid,
       session_id, ordinal, ordinal, role, content, metadata,
       begun + ordinal * interval '20 seconds'
  FROM said JOIN planned USING (chat)
"""
# Older than the chats: lists and searches of the newest meet those.
ADD_SESSION = """
WITH session AS (
    INSERT INTO chat_sessions (tenant_id, id, revision, created_at, updated_at)
    VALUES (%(tenant_id)s, %(id)s::uuid, %(length)s, %(begun)s, %(begun)s + interval '1 day')
)
INSERT INTO chat_messages
       (tenant_id, id, session_id, sequence, revision, role, content, metadata, created_at)
SELECT %(tenant_id)s, uuidv7(), %(id)s::uuid, number, number, role,
       coalesce(%(content)s::text, content), metadata,
       %(begun)s + number * interval '1 microsecond'
  FROM (SELECT *, row_number() OVER () AS number FROM said LIMIT %(length)s) AS numbered
"""
COUNT = """
SELECT count(*) FROM chat_messages
 WHERE tenant_id = %s
   AND to_tsvector('english', content) @@ websearch_to_tsquery('english', %s)
"""
ANY_MESSAGE = """
SELECT id FROM chat_messages
 WHERE tenant_id = %(tenant_id)s AND session_id = %(session_id)s::uuid LIMIT 1
"""


@dataclass(frozen=True)
class Scene:
    """What is called for at one size of the data; sessions are the large tenant's, by length."""

    sessions: Mapping[int, str]  # to read, to write to and to follow
    doomed: Mapping[int, list[str]]  # to delete
    common: int  # messages of the large tenant that have the common word


def load(url: str, size: int, lengths: Sequence[int], doomed: int) -> Scene:
    """Fill a database with chats, a session of each length, and `doomed` more of each."""
    with psycopg.connect(url, autocommit=True) as db:
        # Without checks, triggers and the index that takes most of the time, which is built then.
        for setting in ("session_replication_role = replica", "maintenance_work_mem = '1GB'"):
            db.execute(f"SET {setting}")
        [[index]] = db.execute("SELECT pg_get_indexdef('idx_chat_messages_content'::regclass)")
        db.execute("DROP INDEX idx_chat_messages_content")
        _prepare(db)
        begun = datetime.now(UTC) - timedelta(days=30)
        messages = 0

        def add(tenant_id: str, length: int, content: str | None = None) -> str:
            nonlocal messages
            messages += length
            session_id = str(uuid_utils.uuid7())
            params = {"tenant_id": tenant_id, "id": session_id, "length": length}
            before = {"begun": begun - timedelta(days=10), "content": content}
            db.execute(ADD_SESSION, params | before)
            return session_id

        for tenant_id in (LARGE, SMALL):
            add(tenant_id, RARE_MESSAGES, f"{RARE} and others")
        kept = {length: add(LARGE, length) for length in lengths}
        ending = {length: [add(LARGE, length) for _ in range(doomed)] for length in lengths}
        planned = _plan(begun)
        while messages < size:  # each time all chats, with other ids and at a later time
            db.execute("TRUNCATE planned")
            with db.cursor().copy("COPY planned FROM STDIN") as copy:
                for row in itertools.islice(planned, len(chats.chats())):
                    copy.write_row(row)
                    messages += row[-1]
                    if messages >= size:
                        break
            db.execute("ANALYZE planned")
            db.execute(BEGIN_SESSIONS)
            db.execute(SAY)
        db.execute(index)
        db.execute("VACUUM (ANALYZE)")
        [[common]] = db.execute(COUNT, (LARGE, COMMON)).fetchall()
    return Scene(kept, ending, common)


def _prepare(db: psycopg.Connection) -> None:
    columns = zip(
        *(
            (number, ordinal, each.role, each.content, each.metadata)
            for number, chat in enumerate(chats.chats())
            for ordinal, each in enumerate(chat, start=1)
        ),
        strict=True,
    )
    names = ("chats", "ordinals", "roles", "contents", "metadatas")
    db.execute(SAID, dict(zip(names, map(list, columns), strict=True)))
    db.execute("ANALYZE said")
    db.execute(PLANNED)


def _plan(begun: datetime) -> Iterator[tuple[str, str, int, datetime, int]]:
    """Sessions without an end, one every ten seconds, in the order of the columns of `planned`."""
    chance = random.Random(4)  # noqa: S311 - the same data each time
    for number, (chat, said) in enumerate(itertools.cycle(enumerate(chats.chats()))):
        if number % 2:
            tenant_id = LARGE
        elif number < 2 * SMALL_SESSIONS:
            tenant_id = SMALL
        else:
            # As many tenants have more than n as there are with more than 2 n among those.
            tenant_id = f"tenant-{int(OTHER_TENANTS ** chance.random())}"
        milliseconds = int(begun.timestamp() * 1000)
        tail = chance.getrandbits(62)
        session_id = str(uuid.UUID(int=milliseconds << 80 | 7 << 76 | 2 << 62 | tail))
        yield tenant_id, session_id, chat, begun, len(said)
        begun += timedelta(seconds=10)


class Caller:
    """Makes calls on one server, and tells how many milliseconds each took."""

    def __init__(self, channel: grpc.aio.Channel, scene: Scene):
        self._sessions = ChatSessionServiceStub(channel)
        self._messages = ChatMessageServiceStub(channel)
        self._scene = scene

    async def get_session(self, length: int) -> float:
        request = sessions_pb2.GetChatSessionRequest(session_id=self._scene.sessions[length])
        return await _took(self._sessions.GetChatSession(request, **_as(LARGE)))

    async def get_message(self, length: int) -> float:
        [message] = await self._list(length, limit=1)
        request = messages_pb2.GetChatMessageRequest(message_id=message.id)
        return await _took(self._messages.GetChatMessage(request, **_as(LARGE)))

    async def create_message(self, length: int) -> float:
        return await _took(self._create(length))

    async def list_first_messages(self, length: int) -> float:
        return await _took(self._list(length, limit=LENGTHS[0]))

    async def list_last_messages(self, length: int) -> float:
        return await _took(self._list(length, limit=LENGTHS[0], after=length - LENGTHS[0]))

    async def follow(self, length: int) -> float:
        """From a create to its event."""
        session_id = self._scene.sessions[length]
        get = sessions_pb2.GetChatSessionRequest(session_id=session_id)
        session = (await self._sessions.GetChatSession(get, **_as(LARGE))).session
        watch = sessions_pb2.WatchChatSessionRequest(
            session_id=session_id, after_revision=session.revision
        )
        stream: Any = self._sessions.WatchChatSession(watch, **_as(LARGE))
        while not (await stream.read()).HasField("caught_up"):
            pass

        async def create_and_hear() -> None:
            creating = asyncio.create_task(self._create(length))
            while not (await stream.read()).HasField("messages_created"):
                pass
            await creating

        took = await _took(create_and_hear())
        stream.cancel()
        return took

    async def delete_session(self, length: int) -> float:
        """For each of its messages, in microseconds."""
        session_id = self._scene.doomed[length].pop()
        request = sessions_pb2.DeleteChatSessionRequest(session_id=session_id)
        took = await _took(self._sessions.DeleteChatSession(request, **_as(LARGE)))
        return 1000 * took / length

    async def list_sessions(self, order: str) -> float:
        request = sessions_pb2.ListChatSessionsRequest(
            order_by=f"CHAT_SESSION_ORDER_{order}",  # type: ignore[arg-type]
            page_size=PAGE,
        )
        return await _took(self._sessions.ListChatSessions(request, **_as(LARGE)))

    async def search(self, tenant_id: str, word: str) -> float:
        """Of what is common in the large tenant, microseconds for each message looked at."""
        request = messages_pb2.SearchChatMessagesRequest(query=word, page_size=PAGE)
        began = time.perf_counter()
        found = await self._messages.SearchChatMessages(request, **_as(tenant_id))
        took = 1000 * (time.perf_counter() - began)
        if word == RARE and (len(found.hits), found.incomplete_results) != (RARE_MESSAGES, False):
            raise RuntimeError(f"{len(found.hits)} rare messages were found")
        if (tenant_id, word) == (LARGE, COMMON):
            looked_at = search.MAX_MESSAGES if found.incomplete_results else self._scene.common
            took = 1000 * took / looked_at
        return took

    async def _create(self, length: int) -> None:
        message = ChatMessage(role=CHAT_MESSAGE_ROLE_USER, content="Where is my order?")
        request = messages_pb2.CreateChatMessageRequest(
            session_id=self._scene.sessions[length], message=message
        )
        await self._messages.CreateChatMessage(request, **_as(LARGE))

    async def _list(self, length: int, *, limit: int, after: int = 0) -> list[ChatMessage]:
        request = messages_pb2.ListChatMessagesRequest(
            session_id=self._scene.sessions[length], after_sequence=after, limit=limit
        )
        found: list[ChatMessage] = []
        async for response in self._messages.ListChatMessages(request, **_as(LARGE)):
            found += response.messages
        if len(found) != limit:
            raise RuntimeError(f"{len(found)} messages were listed")
        return found


def _as(tenant_id: str) -> Any:
    return {"metadata": [("x-tenant-id", tenant_id)], "timeout": PATIENCE_SECONDS}


async def _took(call: Awaitable[object]) -> float:
    began = time.perf_counter()
    await call
    return 1000 * (time.perf_counter() - began)


# In a session of some length.
SESSION_CALLS: Mapping[str, Callable[[Caller, int], Awaitable[float]]] = {
    "GetChatSession": Caller.get_session,
    "GetChatMessage": Caller.get_message,
    "CreateChatMessage": Caller.create_message,
    "ListChatMessages, the first 10": Caller.list_first_messages,
    "ListChatMessages, the last 10": Caller.list_last_messages,
    "from a create to its event": Caller.follow,
    "DeleteChatSession, each message": Caller.delete_session,
}
TENANT_CALLS: Mapping[str, Callable[[Caller], Awaitable[float]]] = {
    "ListChatSessions, 50 by create time": lambda caller: caller.list_sessions("CREATE_TIME"),
    "ListChatSessions, 50 by update time": lambda caller: caller.list_sessions("UPDATE_TIME"),
    "search of a rare word, large tenant": lambda caller: caller.search(LARGE, RARE),
    "search of a rare word, small tenant": lambda caller: caller.search(SMALL, RARE),
    "search of a common word, small tenant": lambda caller: caller.search(SMALL, COMMON),
    "search of a common word, large tenant, each message": lambda caller: caller.search(
        LARGE, COMMON
    ),
}
# Of which there is one in a round, and no more sessions than rounds.
DELETE = "DeleteChatSession, each message"

# The medians of the rounds, by the size of the data and the name of the call; and the length of the
# session, if it is about one.
Rounds = dict[tuple[int, str, int | None], list[float]]


def measure(bench: Bench) -> list[Figure]:
    with contextlib.ExitStack() as stack:
        urls: dict[int, str] = {}
        scenes: dict[int, Scene] = {}
        servers: dict[int, Server] = {}
        for size in SIZES:
            bench.progress(f"loading {size:,} messages")
            urls[size] = stack.enter_context(bench.postgres.database())
            lengths = LENGTHS if size == SIZES[-1] else (LENGTH,)
            scenes[size] = load(urls[size], size, lengths, bench.rounds)
        with psycopg.connect(urls[size], autocommit=True) as db:
            # Or what calls write would wait for what was loaded to reach the disk.
            db.execute("CHECKPOINT")
        for size, url in urls.items():
            log = bench.directory / f"{size}.log"
            servers[size] = stack.enter_context(service.server(url, log=log))
        found = asyncio.run(_rounds(bench, servers, scenes))
        plans = _plans(urls[size], scenes[size])
    of_data = [
        _figure(name, "all", {each: found[each, name, length] for each in SIZES}, plans)
        for names, length in ((SESSION_CALLS, LENGTH), (TENANT_CALLS, None))
        for name in names
    ]
    of_sessions = [
        _figure(name, "a session", {each: found[size, name, each] for each in LENGTHS}, plans)
        for name in SESSION_CALLS
    ]
    return of_data + of_sessions


def _figure(
    name: str, where: str, by_size: Mapping[int, list[float]], plans: Mapping[str, str]
) -> Figure:
    """The largest size against the smallest."""
    medians = {size: statistics.median(rounds) for size, rounds in by_size.items()}
    sizes = sorted(by_size)
    return Figure(
        part=NAME,
        name=f"{name}, {sizes[-1]:,} messages in {where}",
        unit="µs" if name.endswith("each message") else "ms",
        measured=by_size[sizes[-1]],
        limit=by_size[sizes[0]],
        against=f"with {sizes[0]:,}",
        must=TARGET,
        at_most=True,
        note=", ".join(f"{size:,}: {median:.3g}" for size, median in medians.items()),
        details={
            "by_size": {str(size): median for size, median in medians.items()},
            "plan": plans.get(name, ""),
        },
    )


async def _rounds(
    bench: Bench, servers: Mapping[int, Server], scenes: Mapping[int, Scene]
) -> Rounds:
    """Calls of one kind follow one another, of whatever size, so that they meet the same."""
    found: Rounds = defaultdict(list)
    async with contextlib.AsyncExitStack() as stack:
        callers = {}
        for size, server in servers.items():
            channel = await stack.enter_async_context(grpc.aio.insecure_channel(server.address))
            callers[size] = Caller(channel, scenes[size])
        calls: dict[tuple[int, str, int | None], Callable[[], Awaitable[float]]] = {}
        for name, call in SESSION_CALLS.items():
            for size, caller in callers.items():
                for length in scenes[size].sessions:
                    calls[size, name, length] = functools.partial(call, caller, length)
        for name, call_tenant in TENANT_CALLS.items():
            for size, caller in callers.items():
                calls[size, name, None] = functools.partial(call_tenant, caller)
        for number in range(bench.rounds + 1):
            bench.progress(f"round {number}")
            for key, make_call in calls.items():
                is_delete = key[1] == DELETE
                if number == 0 and is_delete:
                    continue
                took = [await make_call() for _ in range(1 if is_delete else CALLS)]
                if number:  # the first warms up
                    found[key].append(statistics.median(took))
    return found


def _plans(url: str, scene: Scene) -> dict[str, str]:
    """How PostgreSQL runs what the calls send."""
    session = {"tenant_id": LARGE, "session_id": scene.sessions[LENGTH]}
    by_id = {"tenant_id": LARGE, "id": scene.sessions[LENGTH]}
    page = {
        **session,
        "roles": None,
        "limit": LENGTHS[0],
        "message_bytes": message_listing.FIRST_READ_MESSAGE_BYTES,
    }
    newest = {"after_time": paging.END_OF_TIME, "after_id": MAX_UUID, "limit": PAGE + 1}
    every = dict.fromkeys(sessions.Filter._fields)
    asked = {
        "messages": search.MAX_MESSAGES,
        "bytes": search.MAX_BYTES,
        "sessions": search.MAX_SESSIONS,
        "after_score": math.inf,
        "headline": "",
        "characters": search.HEADLINE_CHARACTERS,
        **dict.fromkeys(("session_id", "roles", "created_from", "created_to")),
        **newest,
    }
    rare, common = asked | {"query": RARE}, asked | {"query": COMMON}
    statements: dict[str, tuple[LiteralString, dict[str, Any]]] = {
        "GetChatSession": (sessions.GET, by_id),
        "CreateChatMessage": (
            group_commit.APPEND_BATCH,
            {
                "tenant_ids": [LARGE],
                "session_ids": [scene.sessions[LENGTH]],
                "ids": [str(uuid_utils.uuid7())],
                "roles": ["user"],
                "contents": ["Where is my order?"],
                "metadatas": [None],
            },
        ),
        "ListChatMessages, the first 10": (
            message_listing.FIRST_ASC,
            page | {"after": 0, "before": LENGTH + 1},
        ),
        "ListChatMessages, the last 10": (
            message_listing.FIRST_ASC,
            page | {"after": LENGTH - LENGTHS[0], "before": LENGTH + 1},
        ),
        "from a create to its event": (
            session_changes.PAGE,
            session | {"after": LENGTH - 1, "limit": PAGE, "bytes": messages.PAGE_BYTES},
        ),
        DELETE: (sessions.DELETE, by_id),
        "ListChatSessions, 50 by create time": (
            sessions.LIST_BY_CREATE_TIME,
            {"tenant_id": LARGE, **every, **newest},
        ),
        "ListChatSessions, 50 by update time": (
            sessions.LIST_BY_UPDATE_TIME,
            {"tenant_id": LARGE, **every, **newest},
        ),
        "search of a rare word, large tenant": (
            search.SEARCH_BY_INDEX,
            {"tenant_id": LARGE, **rare},
        ),
        "search of a rare word, small tenant": (
            search.SEARCH_BY_INDEX,
            {"tenant_id": SMALL, **rare},
        ),
        "search of a common word, small tenant": (
            search.SEARCH_BY_INDEX,
            {"tenant_id": SMALL, **common},
        ),
        "search of a common word, large tenant, each message": (
            search.SEARCH_BY_SESSION,
            {"tenant_id": LARGE, **common},
        ),
    }
    plans = {}
    with psycopg.connect(url, autocommit=True) as db:
        [[message_id]] = db.execute(ANY_MESSAGE, session).fetchall()
        statements["GetChatMessage"] = messages.GET, {"tenant_id": LARGE, "id": message_id}
        for name, (statement, params) in statements.items():
            with db.transaction(force_rollback=True):
                if statement in (search.SEARCH_BY_INDEX, search.SEARCH_BY_SESSION):
                    db.execute(search.SETTINGS, {"timeout": None})
                plan = db.execute(f"EXPLAIN (ANALYZE, BUFFERS) {statement}", params).fetchall()
                plans[name] = "\n".join(line for [line] in plan)
    return plans
