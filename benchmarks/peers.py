"""What a caller would use instead: libraries that keep conversations in PostgreSQL themselves.

They run in the caller's process, on the same PostgreSQL. Ours is called through gRPC, by a process
that counts as well, and pays for what they do not have: the RPC, revisions, a full-text index. Each
has a process of its own, which does the same work on the same texts, and they take turns. What the
libraries do not promise, and ours does:

- **Order.** PostgresChatMessageHistory reads by a serial number that is drawn before the commit,
  SQLAlchemySession by the time at which the transaction began: with several callers, a message may
  come to stand before some that were read already. Ours reads in the order of the commits.
- **Retries.** Both keep a message that is added again twice, even with the same id.
- **Tenants.** Neither knows any: who has the name of a conversation has the conversation.

SQLAlchemySession makes its tables in Python anew for each conversation, so that SQLAlchemy finds
none of their statements in its cache once more of them are in use than the 500 it holds. That is a
good half of its time to append here: with `query_cache_size=20000` it was twice as fast.
"""

import collections
import contextlib
import itertools
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psycopg

from benchmarks import chats, load, service
from benchmarks.figures import Figure
from benchmarks.load import Load
from benchmarks.peers_worker import CALLERS
from benchmarks.service import ROOT, Bench, Server
from chat_ticket.v1.chat_message_pb2 import CreateChatMessageRequest
from chat_ticket.v1.resources_pb2 import ChatMessage
from chat_ticket_svc.services import convert

NAME = "peers"
SECONDS = 100

CONVERSATIONS = 256  # that are appended to
SIZES = (10, 1_000, 10_000)
APPEND_SECONDS = 1.3
READ_SECONDS = 0.7
FOLLOW_SECONDS = 0.5

OURS = "ours"
LIBRARIES = {"peer_langchain": "langchain-postgres", "peer_openai_agents": "openai-agents"}

CREATE_SESSIONS = """
INSERT INTO chat_sessions (tenant_id) SELECT %s FROM generate_series(1, %s) RETURNING id::text
"""

# Half of its connections are for one tenant at most: so many as the libraries have.
SETTINGS = {**service.UNLIMITED, "CHAT_TICKET_POOL_SIZE": str(2 * CALLERS)}

BENCH_PYTHON = str(ROOT / ".venv-bench" / "bin" / "python")

# By what was done, and by whom, the answers of each round.
Answers = dict[str, dict[str, list[Any]]]


class Process:
    """A worker, obeying; see peers_worker."""

    def __init__(self, popen: subprocess.Popen[str], log: Path):
        self.popen = popen
        self._log = log

    def __call__(self, order: str, **arguments: Any) -> Any:
        assert self.popen.stdin is not None  # noqa: S101 - for the type checker
        assert self.popen.stdout is not None  # noqa: S101
        print(json.dumps([order, arguments]), file=self.popen.stdin, flush=True)
        if not (answer := self.popen.stdout.readline()):
            raise RuntimeError(f"{order} failed: {self._log.read_text()[-2000:]}")
        return json.loads(answer)


@contextlib.contextmanager
def process(python: str, module: str, address: str, log: Path) -> Iterator[Process]:
    with log.open("wb") as output:
        popen = subprocess.Popen(
            [python, "-m", f"benchmarks.{module}", address],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=output,
            text=True,
            start_new_session=True,  # Ctrl-C is for us, who end it in our turn
        )
    with popen:
        try:
            yield Process(popen, log)
        finally:
            popen.terminate()


def measure(bench: Bench) -> list[Figure]:
    found: Answers = collections.defaultdict(lambda: collections.defaultdict(list))
    raw: list[load.Outcome] = []
    with contextlib.ExitStack() as stack:
        url = stack.enter_context(bench.postgres.database())
        log = bench.directory / "server.log"
        server = stack.enter_context(service.server(url, log=log, settings=SETTINGS))
        call = stack.enter_context(load.client())
        processes = {
            name: stack.enter_context(
                process(python, module, address, bench.directory / f"{module}.log")
            )
            for name, python, module, address in (
                (OURS, sys.executable, "peer_ours", server.address),
                *((name, BENCH_PYTHON, module, url) for module, name in LIBRARIES.items()),
            )
        }
        said = list(itertools.islice(chats.repeated(), max(SIZES)))
        for name, work in processes.items():
            bench.progress(f"{name}: fill")
            texts = [(each.role, each.content) for each in said]
            work("prepare", said=texts, conversations=CONVERSATIONS, sizes=SIZES)
            found["repeat"][name].append(work("repeat"))
        with psycopg.connect(url, autocommit=True) as db:
            appends = raw_appends(db, server, said)
            db.execute("VACUUM ANALYZE")

        orders: list[tuple[str, str, dict[str, Any]]] = [
            ("append", "append", {"seconds": APPEND_SECONDS}),
            *((f"read {n}", "read", {"size": n, "seconds": READ_SECONDS}) for n in SIZES),
            ("follow", "follow", {"seconds": FOLLOW_SECONDS}),
        ]
        for _ in range(bench.rounds):
            bench.progress("raw client: append")
            raw.append(call(appends))
            for what, order, arguments in orders:
                for name, work in processes.items():
                    bench.progress(f"{name}: {what}")
                    servers = service.cpu_seconds(server.pid)
                    databases = service.cpu_seconds(bench.postgres.pid)
                    answer = work(order, **arguments)
                    servers = service.cpu_seconds(server.pid) - servers
                    databases = service.cpu_seconds(bench.postgres.pid) - databases
                    answer |= {"server_cpu_seconds": servers, "postgres_cpu_seconds": databases}
                    found[what][name].append(answer)
    return list(figures(found, [outcome.calls_per_second for outcome in raw]))


def raw_appends(db: psycopg.Connection, server: Server, said: Sequence[chats.Utterance]) -> Load:
    """The same by a client that costs little: what a caller in another language may come to."""
    ids = [session_id for (session_id,) in db.execute(CREATE_SESSIONS, ("raw", CONVERSATIONS))]
    requests = [
        CreateChatMessageRequest(
            session_id=session_id,
            message=ChatMessage(role=convert.MESSAGE_ROLE[each.role], content=each.content),
        )
        for session_id, each in zip(itertools.cycle(ids), said, strict=False)
    ]
    return Load(
        address=server.address,
        path="/chat_ticket.v1.ChatMessageService/CreateChatMessage",
        requests=[request.SerializeToString() for request in requests],
        callers=CALLERS,
        seconds=APPEND_SECONDS,
        watched={},
        tenants=["raw"],
    )


def figures(found: Answers, raw: list[float]) -> Iterator[Figure]:
    append = f"append, {CALLERS} callers, {CONVERSATIONS} conversations"
    longest = max(SIZES)
    for library in LIBRARIES.values():
        yield compared(found["append"], library, append, rate, "messages/s", must=1)
        yield compared(
            found["append"], library, f"{append}: CPU of all", cpu, "µs a message", at_most=True
        )
        yield Figure(
            part=NAME,
            name=f"{append}, by a raw client",
            unit="messages/s",
            measured=raw,
            limit=[rate(answer) for answer in found["append"][library]],
            against=library,
        )
        for size in SIZES:
            yield compared(
                found[f"read {size}"],
                library,
                f"read a conversation of {size:,}",
                lambda answer, size=size: size * rate(answer),
                "messages/s",
                must=1 if size == longest else None,
            )
    for name in (OURS, *LIBRARIES.values()):
        follows = found["follow"][name]
        yield Figure(
            part=NAME,
            name=f"{name}: reads that a message was slipped into, {CALLERS} callers adding",
            unit="of 100",
            measured=[100 * each["overtaken"] / each["reads"] for each in follows],
            must=0 if name == OURS else None,
            at_most=True,
            details={"rounds": follows},
        )
        yield Figure(
            part=NAME,
            name=f"{name}: a message that is added again is kept",
            unit="times",
            measured=found["repeat"][name],
            must=1 if name == OURS else None,
            at_most=True,
        )


def compared(
    answers: dict[str, list[Any]],
    library: str,
    name: str,
    value: Any,
    unit: str,
    *,
    must: float | None = None,
    at_most: bool = False,
) -> Figure:
    return Figure(
        part=NAME,
        name=name,
        unit=unit,
        measured=[value(answer) for answer in answers[OURS]],
        limit=[value(answer) for answer in answers[library]],
        against=library,
        must=must,
        at_most=at_most,
        details={OURS: answers[OURS], library: answers[library]},
    )


def rate(answer: dict[str, float]) -> float:
    return answer["calls"] / answer["seconds"]


def cpu(answer: dict[str, float]) -> float:
    """Microseconds a call, of the caller's process, PostgreSQL and, for ours, the server."""
    names = ("cpu_seconds", "server_cpu_seconds", "postgres_cpu_seconds")
    return 1e6 * sum(answer[name] for name in names) / answer["calls"]
