"""The alternatives: libraries that store conversations in PostgreSQL directly.

The libraries run in the caller's process, on the same PostgreSQL. Our service is called through
gRPC, by a client process whose time counts as well, and it pays for what the libraries lack: the
RPC, revisions and a full-text index. Each peer has a process of its own, which does the same work
on the same texts. They take turns. The service guarantees what the libraries do not:

- **Order.** PostgresChatMessageHistory orders by a serial number that is drawn before the commit,
  SQLAlchemySession by the start time of the transaction. With several callers, a message may appear
  in front of messages that were already read. The service orders by commit.
- **Retries.** Both libraries store a message twice when it is added again, even with the same id.
- **Tenants.** Neither library has tenants: whoever knows the name of a conversation can use it.

SQLAlchemySession creates its Python table objects anew for each conversation. SQLAlchemy's cache
holds 500 statements, so with more conversations in use it never finds them. That takes more than
half of the time to append here: with `query_cache_size=20000` it was twice as fast.
"""

import collections
import contextlib
import itertools
import json
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psycopg

from benchmarks import chats, checkout, load, service
from benchmarks.checkout import ROOT, Checkout
from benchmarks.figures import Figure
from benchmarks.load import Load
from benchmarks.peers_worker import CALLERS
from benchmarks.service import Bench, Server
from chat_ticket.v1.chat_message_pb2 import CreateChatMessageRequest
from chat_ticket.v1.resources_pb2 import ChatMessage
from chat_ticket_svc.services import convert

NAME = "peers"
SECONDS = 70

CONVERSATIONS = 256  # to append to
SIZES = (10, 1_000, 10_000)
APPEND_SECONDS = 1.3
READ_SECONDS = 0.7
ORDER_SECONDS = 0.5

OURS = "ours"
LIBRARIES = {"peer_langchain": "langchain-postgres", "peer_openai_agents": "openai-agents"}

CREATE_SESSIONS = """
INSERT INTO chat_sessions (tenant_id) SELECT %s FROM generate_series(1, %s) RETURNING id::text
"""

# One tenant may use half of the connections: as many as the libraries have.
SETTINGS = {**service.UNLIMITED, "CHAT_TICKET_POOL_SIZE": str(2 * CALLERS)}

WITH_LIBRARIES = Checkout(ROOT, str(ROOT / ".venv-bench" / "bin" / "python"))

# The answers of each round, by operation and peer.
Answers = dict[str, dict[str, list[Any]]]


class Process:
    """A worker process; see peers_worker."""

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
def process(version: Checkout, module: str, address: str, log: Path) -> Iterator[Process]:
    with log.open("wb") as output:
        popen = subprocess.Popen(
            [version.python, "-m", f"benchmarks.{module}", address],
            env=version.environment,
            cwd=version.root,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=output,
            text=True,
            start_new_session=True,  # Ctrl-C reaches only us, and we stop the process
        )
    with popen:
        try:
            yield Process(popen, log)
        finally:
            popen.terminate()


def measure(bench: Bench) -> list[Figure]:
    answers: Answers = collections.defaultdict(lambda: collections.defaultdict(list))
    raw: list[load.Outcome] = []
    with contextlib.ExitStack() as stack:
        url = stack.enter_context(bench.postgres.database())
        log = bench.directory / "server.log"
        server = stack.enter_context(service.server(url, log=log, settings=SETTINGS))
        call = stack.enter_context(load.client())
        peers = [(OURS, checkout.CURRENT.get(), "peer_ours", server.address)]
        if bench.with_limits:
            peers += [(name, WITH_LIBRARIES, module, url) for module, name in LIBRARIES.items()]
        processes = {
            name: stack.enter_context(
                process(version, module, address, bench.directory / f"{module}.log")
            )
            for name, version, module, address in peers
        }
        utterances = list(itertools.islice(chats.repeated(), max(SIZES)))
        for name, work in processes.items():
            bench.progress(f"{name}: fill")
            texts = [(utterance.role, utterance.content) for utterance in utterances]
            work("prepare", utterances=texts, conversations=CONVERSATIONS, sizes=SIZES)
            answers["repeat"][name].append(work("repeat"))
        with psycopg.connect(url, autocommit=True) as db:
            appends = raw_appends(db, server, utterances)
            db.execute("VACUUM ANALYZE")

        orders: list[tuple[str, str, dict[str, Any]]] = [
            ("append", "append", {"seconds": APPEND_SECONDS}),
            *((f"read {n}", "read", {"size": n, "seconds": READ_SECONDS}) for n in SIZES),
            ("order", "read_while_appending", {"seconds": ORDER_SECONDS}),
        ]
        for _ in range(bench.rounds):
            bench.progress("raw client: append")
            raw.append(call(appends))
            for what, order, arguments in orders:
                for name, work in processes.items():
                    bench.progress(f"{name}: {what}")
                    server_cpu = service.cpu_seconds(server.pid)
                    postgres_cpu = service.cpu_seconds(bench.postgres.pid)
                    answer = work(order, **arguments)
                    server_cpu = service.cpu_seconds(server.pid) - server_cpu
                    postgres_cpu = service.cpu_seconds(bench.postgres.pid) - postgres_cpu
                    answer |= {
                        "server_cpu_seconds": server_cpu,
                        "postgres_cpu_seconds": postgres_cpu,
                    }
                    answers[what][name].append(answer)
    rates = [outcome.calls_per_second for outcome in raw]
    return list(figures(answers, rates)) if bench.with_limits else list(own_figures(answers, rates))


def raw_appends(
    db: psycopg.Connection, server: Server, utterances: Sequence[chats.Utterance]
) -> Load:
    """Appends by a minimal client: an estimate for callers in faster languages."""
    ids = [session_id for (session_id,) in db.execute(CREATE_SESSIONS, ("raw", CONVERSATIONS))]
    requests = [
        CreateChatMessageRequest(
            session_id=session_id,
            message=ChatMessage(
                role=convert.MESSAGE_ROLE[utterance.role], content=utterance.content
            ),
        )
        for session_id, utterance in zip(itertools.cycle(ids), utterances, strict=False)
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


APPEND = f"append, {CALLERS} callers, {CONVERSATIONS} conversations"


def own_figures(answers: Answers, raw: list[float]) -> Iterator[Figure]:
    """The figures without the libraries."""

    def figure(name: str, unit: str, measured: list[float], *, at_most: bool = False) -> Figure:
        return Figure(part=NAME, name=name, unit=unit, measured=measured, at_most=at_most)

    appends = answers["append"][OURS]
    yield figure(APPEND, "messages/s", [rate(answer) for answer in appends])
    yield figure(f"{APPEND}, by a raw client", "messages/s", raw)
    yield figure(f"{APPEND}: CPU of all", "µs a message", [cpu(a) for a in appends], at_most=True)
    for what in ("append", *(f"read {size}" for size in SIZES)):
        for process, name in (("cpu_seconds", "client"), ("server_cpu_seconds", "server")):
            measured = [1e6 * answer[process] / answer["calls"] for answer in answers[what][OURS]]
            yield figure(f"{what}: CPU of the {name}", "µs a call", measured, at_most=True)
    for size in SIZES:
        reads = [size * rate(answer) for answer in answers[f"read {size}"][OURS]]
        yield figure(f"read a conversation of {size:,}", "messages/s", reads)


def figures(answers: Answers, raw: list[float]) -> Iterator[Figure]:
    longest = max(SIZES)
    for library in LIBRARIES.values():
        yield compared(answers["append"], library, APPEND, rate, "messages/s", must=1)
        yield compared(
            answers["append"], library, f"{APPEND}: CPU of all", cpu, "µs a message", at_most=True
        )
        yield Figure(
            part=NAME,
            name=f"{APPEND}, by a raw client",
            unit="messages/s",
            measured=raw,
            limit=[rate(answer) for answer in answers["append"][library]],
            against=library,
        )
        for size in SIZES:
            yield compared(
                answers[f"read {size}"],
                library,
                f"read a conversation of {size:,}",
                lambda answer, size=size: size * rate(answer),
                "messages/s",
                must=1 if size == longest else None,
            )
    for name in (OURS, *LIBRARIES.values()):
        rounds = answers["order"][name]
        yield Figure(
            part=NAME,
            name=f"{name}: reads with a message out of order, {CALLERS} callers adding",
            unit="of 100",
            measured=[100 * answer["reordered"] / answer["reads"] for answer in rounds],
            must=0 if name == OURS else None,
            at_most=True,
            noise_of=None,
            details={"rounds": rounds},
        )
        yield Figure(
            part=NAME,
            name=f"{name}: a message that is added twice is stored",
            unit="times",
            measured=answers["repeat"][name],
            must=1 if name == OURS else None,
            at_most=True,
            noise_of=None,
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
    """The microseconds per call of the caller, PostgreSQL and, for the service, the server."""
    names = ("cpu_seconds", "server_cpu_seconds", "postgres_cpu_seconds")
    return 1e6 * sum(answer[name] for name in names) / answer["calls"]
