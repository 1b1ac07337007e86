"""The latency of calls as the data grows, and as a session grows: one caller, one call at a time.

There is one database per size, loaded with plain SQL. Calls are made on all of them in turn. Half
of the messages belong to one large tenant, an eighth to one that writes Japanese, and the others to
a thousand tenants, down to a few messages each. One small tenant is the same in every database.
Each call reads or writes the same amount at every size, or its time is divided by the amount.

Lists are also measured on a tenant of a million sessions and tickets (see lists.py).
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

from benchmarks import chats, japanese, lists, search_index, service
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
    session_listing,
    sessions,
)

NAME = "growth"
SECONDS = 330

SIZES = (10_000, 1_000_000, 5_000_000)  # messages in a database
LENGTHS = (10, 1_000, 100_000)  # messages in a session
LENGTH = 1_000  # when the database grows
ENGLISH_INDEX_SIZE = 1_000_000  # messages of the database in which the expressions are compared
TARGET = 1.5
APPEND_TARGET = 1.05

LARGE, SMALL, JAPANESE = "large", "small", "japanese"
OTHER_TENANTS = 1_000
SMALL_SESSIONS = 20
COMMON = {LARGE: "like", SMALL: "like", JAPANESE: japanese.COMMON}
RARE = {LARGE: "zyzzyva", SMALL: "zyzzyva", JAPANESE: japanese.RARE}
RARE_MESSAGES = 20

PAGE_SIZE = 50
CALLS = 10  # of each kind per round
TIMEOUT_SECONDS = 30

# In the order in which people would have written them, so that chats overlap.
LOAD_UTTERANCES = """
CREATE UNLOGGED TABLE utterances AS
SELECT chat, ordinal, role, content, japanese, metadata::jsonb AS metadata,
       '7' || substr(digest, 1, 3) || '8' || substr(digest, 4, 15) AS tail
  FROM unnest(%(chats)s::integer[], %(ordinals)s::integer[], %(roles)s::text[],
              %(contents)s::text[], %(japanese)s::text[], %(metadatas)s::text[])
           AS utterances (chat, ordinal, role, content, japanese, metadata),
       md5(chat || ' ' || ordinal) AS digest
 ORDER BY chat + 2 * ordinal, chat
"""
CREATE_PLANNED_SESSIONS = """
CREATE TEMPORARY TABLE planned_sessions (
    tenant_id text, session_id uuid, chat integer, started_at timestamptz, length bigint
)
"""
INSERT_SESSIONS = """
INSERT INTO chat_sessions (tenant_id, id, revision, created_at, updated_at)
SELECT tenant_id, session_id, length, started_at, started_at + length * interval '20 seconds'
  FROM planned_sessions
"""
INSERT_MESSAGES = """
INSERT INTO chat_messages
       (tenant_id, id, session_id, sequence, revision, role, content, search_language, metadata,
        created_at)
SELECT tenant_id,
       ('0' || to_hex((extract(epoch FROM started_at) * 1000)::bigint + 20000 * ordinal)
            || tail)::uuid,
       session_id, ordinal, ordinal, role,
       CASE tenant_id WHEN %(japanese)s THEN japanese ELSE content END,
       CASE tenant_id WHEN %(japanese)s THEN 'simple' ELSE 'english' END,
       metadata, started_at + ordinal * interval '20 seconds'
  FROM utterances JOIN planned_sessions USING (chat)
"""
# These sessions are older than the chats, so that lists and searches of the newest find the chats.
ADD_SESSION = """
WITH session AS (
    INSERT INTO chat_sessions (tenant_id, id, revision, created_at, updated_at)
    VALUES (%(tenant_id)s, %(id)s::uuid, %(length)s, %(started_at)s,
            %(started_at)s + interval '1 day')
)
INSERT INTO chat_messages
       (tenant_id, id, session_id, sequence, revision, role, content, metadata, created_at)
SELECT %(tenant_id)s, uuidv7(), %(id)s::uuid, number, number, role,
       coalesce(%(content)s::text, content), metadata,
       %(started_at)s + number * interval '1 microsecond'
  FROM (SELECT *, row_number() OVER () AS number FROM utterances LIMIT %(length)s) AS numbered
"""
COUNT = """
SELECT count(*) FROM chat_messages
 WHERE tenant_id = %s
   AND search_vector(content, search_language) @@ quote_literal(%s)::tsquery
"""
ANY_MESSAGE = """
SELECT id FROM chat_messages
 WHERE tenant_id = %(tenant_id)s AND session_id = %(session_id)s::uuid LIMIT 1
"""


@dataclass(frozen=True)
class Dataset:
    """What the calls use at one size of the data: sessions of the large tenant, by length."""

    sessions: Mapping[int, str]  # to read, to write to and to watch
    to_delete: Mapping[int, list[str]]
    common: Mapping[str, int]  # messages that contain the common word, by tenant


def load(url: str, size: int, lengths: Sequence[int], to_delete: int) -> Dataset:
    """Fill a database with chats, a session of each length, and `to_delete` more of each length."""
    with psycopg.connect(url, autocommit=True) as db:
        service.prepare_load(db)
        # Without the index that would take most of the time. It is built afterwards.
        [[index]] = db.execute("SELECT pg_get_indexdef('idx_chat_messages_content'::regclass)")
        db.execute("DROP INDEX idx_chat_messages_content")
        _load_utterances(db)
        started_at = datetime.now(UTC) - timedelta(days=30)
        messages = 0

        def add(tenant_id: str, length: int, content: str | None = None) -> str:
            nonlocal messages
            messages += length
            session_id = str(uuid_utils.uuid7())
            params = {"tenant_id": tenant_id, "id": session_id, "length": length}
            before = {"started_at": started_at - timedelta(days=10), "content": content}
            db.execute(ADD_SESSION, params | before)
            return session_id

        for tenant_id, word in RARE.items():
            add(tenant_id, RARE_MESSAGES, f"{word} and others")
        sessions_by_length = {length: add(LARGE, length) for length in lengths}
        sessions_to_delete = {
            length: [add(LARGE, length) for _ in range(to_delete)] for length in lengths
        }
        planned_sessions = _generate_sessions(started_at)
        while messages < size:  # each pass adds all chats, with new ids and later times
            db.execute("TRUNCATE planned_sessions")
            with db.cursor().copy("COPY planned_sessions FROM STDIN") as copy:
                for row in itertools.islice(planned_sessions, len(chats.chats())):
                    copy.write_row(row)
                    messages += row[-1]
                    if messages >= size:
                        break
            db.execute("ANALYZE planned_sessions")
            db.execute(INSERT_SESSIONS)
            db.execute(INSERT_MESSAGES, {"japanese": JAPANESE})
        db.execute(index)
        db.execute("VACUUM (ANALYZE)")
        common = {
            tenant_id: count
            for tenant_id, word in COMMON.items()
            for (count,) in db.execute(COUNT, (tenant_id, word))
        }
    return Dataset(sessions_by_length, sessions_to_delete, common)


def _load_utterances(db: psycopg.Connection) -> None:
    sentences = japanese.messages()
    columns = zip(
        *(
            (
                number,
                ordinal,
                utterance.role,
                utterance.content,
                next(sentences),
                utterance.metadata,
            )
            for number, chat in enumerate(chats.chats())
            for ordinal, utterance in enumerate(chat, start=1)
        ),
        strict=True,
    )
    names = ("chats", "ordinals", "roles", "contents", "japanese", "metadatas")
    db.execute(LOAD_UTTERANCES, dict(zip(names, map(list, columns), strict=True)))
    db.execute("ANALYZE utterances")
    db.execute(CREATE_PLANNED_SESSIONS)


def _generate_sessions(started_at: datetime) -> Iterator[tuple[str, str, int, datetime, int]]:
    """An endless series of rows of `planned_sessions`, one session every ten seconds."""
    generator = random.Random(4)  # noqa: S311 - the same data in every run
    for number, (chat, utterances) in enumerate(itertools.cycle(enumerate(chats.chats()))):
        if number % 2:
            tenant_id = LARGE
        elif number < 2 * SMALL_SESSIONS:
            tenant_id = SMALL
        elif number % 8 == 0:
            tenant_id = JAPANESE
        else:
            # The sizes of the tenants follow a power law: tenant n has a share of 1/n.
            tenant_id = f"tenant-{int(OTHER_TENANTS ** generator.random())}"
        milliseconds = int(started_at.timestamp() * 1000)
        tail = generator.getrandbits(62)
        session_id = str(uuid.UUID(int=milliseconds << 80 | 7 << 76 | 2 << 62 | tail))
        yield tenant_id, session_id, chat, started_at, len(utterances)
        started_at += timedelta(seconds=10)


class Caller:
    """Makes calls on one server. Each method returns the milliseconds that its call took."""

    def __init__(self, channel: grpc.aio.Channel, dataset: Dataset):
        self._sessions = ChatSessionServiceStub(channel)
        self._messages = ChatMessageServiceStub(channel)
        self._dataset = dataset

    async def get_session(self, length: int) -> float:
        request = sessions_pb2.GetChatSessionRequest(session_id=self._dataset.sessions[length])
        return await _milliseconds(self._sessions.GetChatSession(request, **_options(LARGE)))

    async def get_message(self, length: int) -> float:
        [message] = await self._list(length, limit=1)
        request = messages_pb2.GetChatMessageRequest(message_id=message.id)
        return await _milliseconds(self._messages.GetChatMessage(request, **_options(LARGE)))

    async def create_message(self, length: int) -> float:
        return await _milliseconds(self._create(length))

    async def list_first_messages(self, length: int) -> float:
        return await _milliseconds(self._list(length, limit=LENGTHS[0]))

    async def list_last_messages(self, length: int) -> float:
        return await _milliseconds(self._list(length, limit=LENGTHS[0], after=length - LENGTHS[0]))

    async def receive_event(self, length: int) -> float:
        """The time from a create to its event."""
        session_id = self._dataset.sessions[length]
        get = sessions_pb2.GetChatSessionRequest(session_id=session_id)
        session = (await self._sessions.GetChatSession(get, **_options(LARGE))).session
        watch = sessions_pb2.WatchChatSessionRequest(
            session_id=session_id, after_revision=session.revision
        )
        stream: Any = self._sessions.WatchChatSession(watch, **_options(LARGE))
        while not (await stream.read()).HasField("caught_up"):
            pass

        async def create_and_receive() -> None:
            creating = asyncio.create_task(self._create(length))
            while not (await stream.read()).HasField("messages_created"):
                pass
            await creating

        milliseconds = await _milliseconds(create_and_receive())
        stream.cancel()
        return milliseconds

    async def delete_session(self, length: int) -> float:
        """The microseconds per message of the session."""
        session_id = self._dataset.to_delete[length].pop()
        request = sessions_pb2.DeleteChatSessionRequest(session_id=session_id)
        milliseconds = await _milliseconds(
            self._sessions.DeleteChatSession(request, **_options(LARGE))
        )
        return 1000 * milliseconds / length

    async def list_sessions(self, order: str) -> float:
        request = sessions_pb2.ListChatSessionsRequest(
            order_by=f"CHAT_SESSION_ORDER_{order}",  # type: ignore[arg-type]
            page_size=PAGE_SIZE,
        )
        return await _milliseconds(self._sessions.ListChatSessions(request, **_options(LARGE)))

    async def search_rare(self, tenant_id: str) -> float:
        milliseconds, response = await self._search(tenant_id, RARE[tenant_id])
        if (len(response.hits), response.incomplete_results) != (RARE_MESSAGES, False):
            raise RuntimeError(f"the search has results {len(response.hits)} rare messages")
        return milliseconds

    async def search_common(self, tenant_id: str) -> float:
        milliseconds, _ = await self._search(tenant_id, COMMON[tenant_id])
        return milliseconds

    async def search_common_per_message(self, tenant_id: str) -> float:
        """The microseconds per message examined."""
        milliseconds, response = await self._search(tenant_id, COMMON[tenant_id])
        common = self._dataset.common[tenant_id]
        examined = search.MAX_MESSAGES if response.incomplete_results else common
        return 1000 * milliseconds / examined

    async def _search(
        self, tenant_id: str, word: str
    ) -> tuple[float, messages_pb2.SearchChatMessagesResponse]:
        """The milliseconds and the response."""
        request = messages_pb2.SearchChatMessagesRequest(query=word, page_size=PAGE_SIZE)
        started_at = time.perf_counter()
        response = await self._messages.SearchChatMessages(request, **_options(tenant_id))
        return 1000 * (time.perf_counter() - started_at), response

    async def _create(self, length: int) -> None:
        message = ChatMessage(role=CHAT_MESSAGE_ROLE_USER, content="Where is my order?")
        request = messages_pb2.CreateChatMessageRequest(
            session_id=self._dataset.sessions[length], message=message
        )
        await self._messages.CreateChatMessage(request, **_options(LARGE))

    async def _list(self, length: int, *, limit: int, after: int = 0) -> list[ChatMessage]:
        request = messages_pb2.ListChatMessagesRequest(
            session_id=self._dataset.sessions[length], after_sequence=after, limit=limit
        )
        result: list[ChatMessage] = []
        async for response in self._messages.ListChatMessages(request, **_options(LARGE)):
            result += response.messages
        if len(result) != limit:
            raise RuntimeError(f"{len(result)} messages were listed, not {limit}")
        return result


def _options(tenant_id: str) -> Any:
    return {"metadata": [("x-tenant-id", tenant_id)], "timeout": TIMEOUT_SECONDS}


async def _milliseconds(call: Awaitable[object]) -> float:
    started_at = time.perf_counter()
    await call
    return 1000 * (time.perf_counter() - started_at)


# Calls on a session of a given length.
SESSION_CALLS: Mapping[str, Callable[[Caller, int], Awaitable[float]]] = {
    "GetChatSession": Caller.get_session,
    "GetChatMessage": Caller.get_message,
    "CreateChatMessage": Caller.create_message,
    "ListChatMessages, the first 10": Caller.list_first_messages,
    "ListChatMessages, the last 10": Caller.list_last_messages,
    "from a create to its event": Caller.receive_event,
    "DeleteChatSession, each message": Caller.delete_session,
}
TENANT_CALLS: Mapping[str, Callable[[Caller], Awaitable[float]]] = {
    "ListChatSessions, 50 by create time": lambda caller: caller.list_sessions("CREATE_TIME"),
    "ListChatSessions, 50 by update time": lambda caller: caller.list_sessions("UPDATE_TIME"),
    "search of a rare word, large tenant": lambda caller: caller.search_rare(LARGE),
    "search of a rare word, small tenant": lambda caller: caller.search_rare(SMALL),
    "search of a rare word, Japanese tenant": lambda caller: caller.search_rare(JAPANESE),
    "search of a common word, small tenant": lambda caller: caller.search_common(SMALL),
    "search of a common word, large tenant, each message": (
        lambda caller: caller.search_common_per_message(LARGE)
    ),
    "search of a common word, Japanese tenant, each message": (
        lambda caller: caller.search_common_per_message(JAPANESE)
    ),
}
# This call is made once per round: there is one session to delete per round.
DELETE = "DeleteChatSession, each message"

# The medians of the rounds, by the size of the data, the name of the call, and the length of the
# session, if the call is about one.
Rounds = dict[tuple[int, str, int | None], list[float]]


def measure(bench: Bench) -> list[Figure]:
    with contextlib.ExitStack() as stack:
        urls: dict[int, str] = {}
        datasets: dict[int, Dataset] = {}
        servers: dict[int, Server] = {}
        for size in SIZES:
            bench.progress(f"loading {size:,} messages")
            urls[size] = stack.enter_context(bench.postgres.database())
            lengths = LENGTHS if size == SIZES[-1] else (LENGTH,)
            datasets[size] = load(urls[size], size, lengths, bench.rounds)
        with psycopg.connect(urls[size], autocommit=True) as db:
            # Otherwise the writes of calls would wait until the loaded data is on disk.
            db.execute("CHECKPOINT")
        for size, url in urls.items():
            log = bench.directory / f"{size}.log"
            servers[size] = stack.enter_context(service.server(url, log=log))
        results = asyncio.run(_measure_rounds(bench, servers, datasets))
        plans = _explain(urls[size], datasets[size])
        bench.progress("the size of the search index")
        index_bytes = search_index.index_bytes(urls[size])
        english_index_bytes = search_index.english_index_bytes(urls[ENGLISH_INDEX_SIZE])
    append_cpu = search_index.append_cpu(bench)
    of_lists_by_size, list_plans = lists.measure(bench)
    of_data = [
        _figure(
            name, "messages in all", {each: results[each, name, length] for each in SIZES}, plans
        )
        for names, length in ((SESSION_CALLS, LENGTH), (TENANT_CALLS, None))
        for name in names
    ]
    of_sessions = [
        _figure(
            name,
            "messages in a session",
            {each: results[size, name, each] for each in LENGTHS},
            plans,
        )
        for name in SESSION_CALLS
    ]
    of_lists = [
        _figure(
            name,
            "tickets of the tenant" if name.startswith(lists.TICKETS) else "sessions of the tenant",
            by_size,
            list_plans,
        )
        for name, by_size in of_lists_by_size.items()
    ]
    of_index = [
        Figure(
            part=NAME,
            name=f"search index, {SIZES[-1]:,} messages",
            unit="bytes/message",
            measured=[index_bytes],
            at_most=True,
            noise_of=None,
        ),
        Figure(
            part=NAME,
            name=f"search index of English text, {ENGLISH_INDEX_SIZE:,} messages",
            unit="bytes/message",
            measured=[english_index_bytes[search_index.EXPRESSION]],
            limit=[english_index_bytes[search_index.EXPRESSION_BEFORE]],
            against="by the expression before",
            at_most=True,
        ),
    ]
    of_appends = [
        Figure(
            part=NAME,
            name=f"CPU of {call}, each message",
            unit="µs",
            measured=append_cpu[call, search_index.EXPRESSION],
            limit=append_cpu[call, search_index.EXPRESSION_BEFORE],
            against="with the index expression before",
            must=APPEND_TARGET,
            at_most=True,
            noise_of="cpu",
        )
        for call in search_index.CALLERS
    ]
    return of_data + of_sessions + of_lists + of_index + of_appends


def _figure(
    name: str, of_what: str, by_size: Mapping[int, list[float]], plans: Mapping[str, str]
) -> Figure:
    """The latency at the largest size, compared with that at the smallest."""
    medians = {size: statistics.median(rounds) for size, rounds in by_size.items()}
    sizes = sorted(by_size)
    return Figure(
        part=NAME,
        name=f"{name}, {sizes[-1]:,} {of_what}",
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


async def _measure_rounds(
    bench: Bench, servers: Mapping[int, Server], datasets: Mapping[int, Dataset]
) -> Rounds:
    """Make all calls in each round. Calls of one kind run in succession, so that other load on the
    machine affects all sizes alike.
    """
    results: Rounds = defaultdict(list)
    async with contextlib.AsyncExitStack() as stack:
        callers = {}
        for size, server in servers.items():
            channel = await stack.enter_async_context(grpc.aio.insecure_channel(server.address))
            callers[size] = Caller(channel, datasets[size])
        calls: dict[tuple[int, str, int | None], Callable[[], Awaitable[float]]] = {}
        for name, call in SESSION_CALLS.items():
            for size, caller in callers.items():
                for length in datasets[size].sessions:
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
                times = [await make_call() for _ in range(1 if is_delete else CALLS)]
                if number:  # the first is a warm-up
                    results[key].append(statistics.median(times))
    return results


def _explain(url: str, dataset: Dataset) -> dict[str, str]:
    """PostgreSQL's plans for the statements of the calls."""
    session = {"tenant_id": LARGE, "session_id": dataset.sessions[LENGTH]}
    by_id = {"tenant_id": LARGE, "id": dataset.sessions[LENGTH]}
    page = {
        **session,
        "roles": None,
        "limit": LENGTHS[0],
        "message_bytes": message_listing.FIRST_READ_MESSAGE_BYTES,
    }
    newest = {"after_time": paging.END_OF_TIME, "after_id": MAX_UUID, "limit": PAGE_SIZE + 1}
    no_filter = dict.fromkeys(session_listing.Filter._fields)
    search_params = {
        "has_prefix": False,
        "has_phrase": False,
        "messages": search.MAX_MESSAGES,
        "bytes": search.MAX_BYTES,
        "sessions": search.MAX_SESSIONS,
        "after_score": math.inf,
        **dict.fromkeys(("any_placed", "session_id", "roles", "created_from", "created_to")),
        **newest,
    }

    def searching(tenant_id: str, word: str) -> dict[str, Any]:
        return {"tenant_id": tenant_id, **_asked(word), **search_params}

    statements: dict[str, tuple[LiteralString, dict[str, Any]]] = {
        "GetChatSession": (sessions.GET, by_id),
        "CreateChatMessage": (
            group_commit.APPEND_BATCH,
            {
                "tenant_ids": [LARGE],
                "session_ids": [dataset.sessions[LENGTH]],
                "ids": [str(uuid_utils.uuid7())],
                "roles": ["user"],
                "contents": ["Where is my order?"],
                "language_codes": [None],
                "search_languages": [None],
                "search_language": "english",
                "metadatas": [None],
                "author_kinds": [None],
                "author_ids": [None],
                "expected_revisions": [None],
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
            session | {"after": LENGTH - 1, "limit": PAGE_SIZE, "bytes": messages.PAGE_BYTES},
        ),
        DELETE: (sessions.DELETE, by_id),
        "ListChatSessions, 50 by create time": (
            session_listing.LIST_BY_CREATE_TIME,
            {"tenant_id": LARGE, **no_filter, **newest},
        ),
        "ListChatSessions, 50 by update time": (
            session_listing.LIST_BY_UPDATE_TIME,
            {"tenant_id": LARGE, **no_filter, **newest},
        ),
        "search of a rare word, large tenant": (
            search.SEARCH_BY_INDEX,
            searching(LARGE, RARE[LARGE]),
        ),
        "search of a rare word, small tenant": (
            search.SEARCH_BY_INDEX,
            searching(SMALL, RARE[SMALL]),
        ),
        "search of a rare word, Japanese tenant": (
            search.SEARCH_BY_INDEX,
            searching(JAPANESE, RARE[JAPANESE]),
        ),
        "search of a common word, small tenant": (
            search.SEARCH_BY_INDEX,
            searching(SMALL, COMMON[SMALL]),
        ),
        "search of a common word, large tenant, each message": (
            search.SEARCH_BY_SESSION,
            searching(LARGE, COMMON[LARGE]),
        ),
        "search of a common word, Japanese tenant, each message": (
            search.SEARCH_BY_SESSION,
            searching(JAPANESE, COMMON[JAPANESE]),
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


def _asked(word: str) -> dict[str, Any]:
    """What a search asks the messages of the databases for, as `search.page` does: the word, or
    its pairs of characters.
    """
    parts = [word] if word.isascii() else map("".join, itertools.pairwise(word))
    query = " & ".join(f"'{part}'" for part in parts)
    return {
        "any_query": query,
        "languages": ["english", "simple"],
        "indexed_queries": [query, query],
        "exact_queries": [query, query],
        "scattered_queries": [query, query],
    }
