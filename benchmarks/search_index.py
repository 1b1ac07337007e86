"""The size of the search index and its share of an append, compared with the expression before.

The expression before is what was indexed until `search_vector`: English, without any rewriting.
"""

import contextlib
import itertools
import uuid
from collections import defaultdict

import psycopg

from benchmarks import calls, chats, load, service
from benchmarks.load import Load
from benchmarks.service import Bench, Server
from chat_ticket.v1.chat_message_pb2 import BatchCreateChatMessagesRequest
from chat_ticket.v1.resources_pb2 import ChatMessage
from chat_ticket_svc.services import convert

EXPRESSION = "search_vector(content, search_language)"
EXPRESSION_BEFORE = "to_tsvector('english', content)"
EXPRESSIONS = (EXPRESSION, EXPRESSION_BEFORE)

CREATE, BATCH_CREATE = "CreateChatMessage", "BatchCreateChatMessages"
CALLERS = {CREATE: 16, BATCH_CREATE: 4}
MESSAGES = {CREATE: 1, BATCH_CREATE: 500}  # in a call
BATCHES = 40  # in a phase
PAIRS = 2  # of phases per round, since the difference is small

INDEX_BYTES = """
SELECT pg_relation_size('idx_chat_messages_content')::float / count(*) FROM chat_messages
"""
CREATE_ENGLISH_INDEX = """
CREATE INDEX english_index ON chat_messages USING gin (tenant_id, {})
 WHERE search_language = 'english'
"""
ENGLISH_INDEX_BYTES = """
SELECT pg_relation_size('english_index')::float / count(*) FROM chat_messages
 WHERE search_language = 'english'
"""
REPLACE_INDEX = f"""
DROP INDEX idx_chat_messages_content;
CREATE INDEX idx_chat_messages_content ON chat_messages
 USING gin (tenant_id, {EXPRESSION_BEFORE}) WITH (gin_pending_list_limit = 512)
"""


def index_bytes(url: str) -> float:
    """The bytes of the search index per message."""
    with psycopg.connect(url) as db:
        size: float
        [[size]] = db.execute(INDEX_BYTES).fetchall()
    return size


def english_index_bytes(url: str) -> dict[str, float]:
    """The bytes per message of an index of the English messages, by its expression."""
    sizes = {}
    with psycopg.connect(url) as db:
        for expression in EXPRESSIONS:
            with db.transaction(force_rollback=True):
                db.execute(CREATE_ENGLISH_INDEX.format(expression))
                [[sizes[expression]]] = db.execute(ENGLISH_INDEX_BYTES).fetchall()
    return sizes


def append_cpu(bench: Bench) -> dict[tuple[str, str], list[float]]:
    """The microseconds of CPU per message, of the server and PostgreSQL together, by the call and
    the expression of the index.

    Both databases are small and get the same English messages.
    """
    result = defaultdict(list)
    with contextlib.ExitStack() as stack:
        urls: dict[str, str] = {}
        servers: dict[str, Server] = {}
        for expression in EXPRESSIONS:
            urls[expression] = stack.enter_context(bench.postgres.database())
            with psycopg.connect(urls[expression], autocommit=True) as db:
                if expression == EXPRESSION_BEFORE:
                    db.execute(REPLACE_INDEX)
                calls.create_sessions(db)
            log = bench.directory / f"append-{len(servers)}.log"
            servers[expression] = stack.enter_context(service.server(urls[expression], log=log))
        call = stack.enter_context(load.client())
        requests = {CREATE: calls.requests()[CREATE][1], BATCH_CREATE: _batches()}
        for number, name in itertools.product(range(1 + PAIRS * bench.rounds), requests):
            bench.progress(f"pair {number}, {name}")
            for expression in EXPRESSIONS[:: -1 if number % 2 else 1]:
                server = servers[expression]
                outcome = call(
                    Load(
                        address=server.address,
                        path=f"/chat_ticket.v1.ChatMessageService/{name}",
                        requests=requests[name],
                        callers=CALLERS[name],
                        seconds=None,
                        watched={"server": server.pid, "postgres": bench.postgres.pid},
                    )
                )
                if number == 0:  # a warm-up, after which the planner must know the tables
                    with psycopg.connect(urls[expression], autocommit=True) as db:
                        db.execute("ANALYZE")
                else:
                    cpu = outcome.cpu_us["server"] + outcome.cpu_us["postgres"]
                    result[name, expression].append(cpu / MESSAGES[name])
    return result


def _batches() -> list[bytes]:
    utterances = chats.repeated()
    return [
        BatchCreateChatMessagesRequest(
            session_id=str(uuid.UUID(f"{number:032}")),
            messages=[
                ChatMessage(role=convert.MESSAGE_ROLE[utterance.role], content=utterance.content)
                for utterance in itertools.islice(utterances, MESSAGES[BATCH_CREATE])
            ],
        ).SerializeToString()
        for number in range(1, BATCHES + 1)
    ]
