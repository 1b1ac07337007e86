"""Batches of messages, compared with COPY of the same rows into the same table and its indexes.

Both write to sessions that exist before. COPY also checks the foreign keys and runs the triggers.
Its file contains the ids, sequences and times, which the service has to determine.
"""

import contextlib
import itertools
import time
from collections.abc import Sequence
from pathlib import Path

import psycopg
import uuid_utils

from benchmarks import chats, load, service
from benchmarks.chats import Utterance
from benchmarks.figures import Figure
from benchmarks.load import Load
from benchmarks.service import Bench, Server
from chat_ticket.v1.chat_message_pb2 import BatchCreateChatMessagesRequest
from chat_ticket.v1.resources_pb2 import ChatMessage
from chat_ticket_svc.services import convert

NAME = "batch"
SECONDS = 35

PATH = "/chat_ticket.v1.ChatMessageService/BatchCreateChatMessages"
BATCH = 500  # the limit of the RPC
BATCHES = 40  # per run, each to a session of its own
CALLERS = (1, 4)
TENANT = "acme"

CREATE_SESSIONS = "INSERT INTO chat_sessions (tenant_id, id) SELECT %s, unnest(%s::uuid[])"
COPY = """\
\\copy chat_messages (tenant_id, id, session_id, sequence, revision, role, content, metadata, \
created_at) from '{}'"""


def measure(bench: Bench) -> list[Figure]:
    utterances = chats.repeated()
    copied: list[float] = []
    batched: dict[int, list[load.Outcome]] = {callers: [] for callers in CALLERS}
    with contextlib.ExitStack() as stack:
        url = stack.enter_context(bench.postgres.database())
        db = stack.enter_context(psycopg.connect(url, autocommit=True))
        server = stack.enter_context(service.server(url, log=bench.directory / "server.log"))
        call = stack.enter_context(load.client())

        def sessions() -> list[str]:
            ids = [str(uuid_utils.uuid7()) for _ in range(BATCHES)]
            db.execute(CREATE_SESSIONS, (TENANT, ids))
            return ids

        for number in range(bench.rounds + 1):  # the first is a warm-up
            rows = list(itertools.islice(utterances, BATCHES * BATCH))
            bench.progress(f"round {number}, COPY")
            file = _file(bench.directory / "rows", sessions(), rows)
            copied.append(len(rows) / bench.postgres.psql_seconds(url, COPY.format(file)))
            for callers, outcomes in batched.items():
                bench.progress(f"round {number}, {callers} callers")
                outcomes.append(call(_load(bench, server, sessions(), rows, callers)))
        runs = (bench.rounds + 1) * (1 + len(CALLERS))
        stored = db.execute("SELECT count(*) FROM chat_messages").fetchone()
        if stored != (runs * BATCHES * BATCH,):
            raise RuntimeError(f"{runs} runs have stored {stored} messages")
    return [
        Figure(
            part=NAME,
            name=f"BatchCreateChatMessages of {BATCH}, {callers} callers",
            unit="rows/s",
            measured=[outcome.calls_per_second * BATCH for outcome in outcomes[1:]],
            limit=copied[1:],
            against="by COPY",
            must=0.4,
            stretch=0.6,
            note=load.note(outcomes[1:]),
            details={"rounds": outcomes[1:]},
        )
        for callers, outcomes in batched.items()
    ]


def _load(
    bench: Bench, server: Server, sessions: Sequence[str], rows: Sequence[Utterance], callers: int
) -> Load:
    rest = iter(rows)
    requests = [
        BatchCreateChatMessagesRequest(
            session_id=session_id,
            messages=[
                ChatMessage(
                    role=convert.MESSAGE_ROLE[utterance.role],
                    content=utterance.content,
                    metadata_json=utterance.metadata or "",
                )
                for utterance in itertools.islice(rest, BATCH)
            ],
        )
        for session_id in sessions
    ]
    return Load(
        address=server.address,
        path=PATH,
        requests=[request.SerializeToString() for request in requests],
        callers=callers,
        seconds=None,
        watched={"server": server.pid, "postgres": bench.postgres.pid},
        tenants=[TENANT],
    )


def _file(path: Path, sessions: Sequence[str], rows: Sequence[Utterance]) -> Path:
    """A file with the same rows in the text format of COPY."""
    escapes = str.maketrans({"\\": r"\\", "\t": r"\t", "\n": r"\n", "\r": r"\r"})
    rest = iter(rows)
    with path.open("w") as file:
        for session_id in sessions:
            for sequence, utterance in enumerate(itertools.islice(rest, BATCH), start=1):
                columns = [TENANT, str(uuid_utils.uuid7()), session_id, *[str(sequence)] * 2]
                columns += [utterance.role, utterance.content, utterance.metadata or r"\N"]
                columns.append(time.strftime("%Y-%m-%d %H:%M:%S") + f".{sequence:06}")
                file.write("\t".join(column.translate(escapes) for column in columns) + "\n")
    return path
