"""Recall and precision of the search, on the labelled queries of `search_labels`.

All messages belong to one tenant. They are created and searched through the API. For comparison,
the same queries are asked of the expression that was indexed before `search_vector`.
"""

import contextlib
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import grpc
import psycopg
import uuid_utils

from benchmarks import load, search_labels, service
from benchmarks.figures import Figure
from benchmarks.load import Load
from benchmarks.search_labels import Message, Query
from benchmarks.service import Bench, Server
from chat_ticket.v1 import chat_message_pb2 as messages_pb2
from chat_ticket.v1.chat_message_pb2_grpc import ChatMessageServiceStub
from chat_ticket.v1.resources_pb2 import ChatMessage
from chat_ticket_svc.services import convert

NAME = "search"
SECONDS = 60

PATH = "/chat_ticket.v1.ChatMessageService/BatchCreateChatMessages"
BATCH = 500  # the limit of the RPC
CALLERS = 4
TENANT = "acme"
PAGE_SIZE = 1_000  # the limit of the RPC

# Kinds whose recall must be complete.
EXACT = ("exact word", "number")

CREATE_SESSIONS = "INSERT INTO chat_sessions (tenant_id, id) SELECT %s, unnest(%s::uuid[])"
CREATE_INDEX_BEFORE = """
CREATE INDEX ON chat_messages USING gin (tenant_id, to_tsvector('english', content))
"""
SEARCH_BEFORE = """
SELECT id::text FROM chat_messages
 WHERE tenant_id = %s
   AND to_tsvector('english', content) @@ websearch_to_tsquery('english', %s)
"""

# The messages that each query has found, by the text of the query.
Found = Mapping[str, frozenset[str]]


def measure(bench: Bench) -> list[Figure]:
    bench.progress("reading the labels")
    queries = search_labels.queries()
    with contextlib.ExitStack() as stack:
        url = stack.enter_context(bench.postgres.database())
        db = stack.enter_context(psycopg.connect(url, autocommit=True))
        server = stack.enter_context(service.server(url, log=bench.directory / "server.log"))
        bench.progress("creating the messages")
        names = _create_messages(db, server)
        bench.progress("searching")
        found, incomplete = _search(server, queries, names)
        bench.progress("searching by the expression before")
        db.execute(CREATE_INDEX_BEFORE)
        before = {
            query.text: frozenset(
                names[message_id]
                for (message_id,) in db.execute(SEARCH_BEFORE, (TENANT, query.text))
            )
            for query in queries
        }
    if incomplete:
        raise RuntimeError(f"incomplete results: {', '.join(incomplete)}")
    by_kind = defaultdict(list)
    for query in queries:
        by_kind[query.kind].append(query)
    return [
        figure for kind, each in by_kind.items() for figure in _figures(kind, each, found, before)
    ]


def _create_messages(db: psycopg.Connection, server: Server) -> dict[str, str]:
    """Create all messages. Returns their names by id."""
    names: dict[str, str] = {}
    session_ids: list[str] = []
    requests = []
    for session in search_labels.sessions():
        session_ids.append(str(uuid_utils.uuid7()))
        for start in range(0, len(session), BATCH):
            batch = session[start : start + BATCH]
            ids = [str(uuid_utils.uuid7()) for _ in batch]
            names |= zip(ids, (message.name for message in batch), strict=True)
            requests.append(
                messages_pb2.BatchCreateChatMessagesRequest(
                    session_id=session_ids[-1], messages=map(_message, ids, batch)
                ).SerializeToString()
            )
    db.execute(CREATE_SESSIONS, (TENANT, session_ids))
    with load.client() as call:
        outcome = call(
            Load(
                address=server.address,
                path=PATH,
                requests=requests,
                callers=CALLERS,
                seconds=None,
                watched={},
                tenants=[TENANT],
            )
        )
    if outcome.calls != len(requests):
        raise RuntimeError(f"{outcome.calls} of {len(requests)} batches were created")
    db.execute("VACUUM ANALYZE chat_messages")
    return names


def _message(message_id: str, message: Message) -> ChatMessage:
    return ChatMessage(
        id=message_id,
        role=convert.MESSAGE_ROLE[message.role],
        content=message.content,
        language_code=message.language_code,
    )


def _search(
    server: Server, queries: Sequence[Query], names: Mapping[str, str]
) -> tuple[Found, list[str]]:
    """What the queries find, and the texts of those with incomplete results."""
    found = {}
    incomplete = []
    with grpc.insecure_channel(server.address) as channel:
        stub = ChatMessageServiceStub(channel)
        for query in queries:
            pages = list(_pages(stub, query.text))
            found[query.text] = frozenset(
                names[hit.message_id] for page in pages for hit in page.hits
            )
            if any(page.incomplete_results for page in pages):
                incomplete.append(query.text)
    return found, incomplete


def _pages(
    stub: ChatMessageServiceStub, query: str
) -> Iterator[messages_pb2.SearchChatMessagesResponse]:
    token = ""
    while True:
        request = messages_pb2.SearchChatMessagesRequest(
            query=query, page_size=PAGE_SIZE, page_token=token
        )
        page = stub.SearchChatMessages(
            request, metadata=(("x-tenant-id", TENANT),), timeout=load.TIMEOUT_SECONDS
        )
        yield page
        token = page.next_page_token
        if not token:
            return


def _figures(kind: str, queries: Sequence[Query], found: Found, before: Found) -> Iterator[Figure]:
    """The recall and the precision of the queries of one kind."""
    recall, precision = _rates(queries, found)
    recall_before, precision_before = _rates(queries, before)
    missed = {each.text: sorted(each.messages - found[each.text]) for each in queries}
    others = {each.text: sorted(found[each.text] - each.messages) for each in queries}
    yield Figure(
        part=NAME,
        name=f"recall, {kind}, {len(queries)} queries",
        unit="",
        measured=[recall],
        must=1.0 if kind in EXACT else None,
        noise_of=None,
        note=f"{recall_before:.3g} by the expression before",
        details={"missed": {text: names for text, names in missed.items() if names}},
    )
    yield Figure(
        part=NAME,
        name=f"precision, {kind}, {len(queries)} queries",
        unit="",
        measured=[precision],
        noise_of=None,
        note=f"{precision_before:.3g} by the expression before",
        details={"others": {text: names for text, names in others.items() if names}},
    )


def _rates(queries: Sequence[Query], found: Found) -> tuple[float, float]:
    """The mean recall of the queries, and the mean precision of those that find anything."""
    right = {query.text: len(query.messages & found[query.text]) for query in queries}
    recalls = [right[query.text] / len(query.messages) for query in queries]
    precisions = [
        right[query.text] / len(found[query.text]) for query in queries if found[query.text]
    ]
    return statistics.fmean(recalls), statistics.fmean(precisions or [0])
