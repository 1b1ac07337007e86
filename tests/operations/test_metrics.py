"""The metrics that Prometheus scrapes from a server."""

import asyncio
import json
import re
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import psycopg
import pytest
from grpc import StatusCode
from prometheus_client.parser import text_string_to_metric_families
from support.authority import Authority
from support.client import Api, an_id, refused
from support.database import session_locked
from support.drafts import leave_draft, writing
from support.feeds import caught_up_feed
from support.process import ServerProcess, server_process
from support.watching import watching

from chat_ticket.v1.chat_session_pb2 import GetChatSessionRequest
from chat_ticket_svc.telemetry import metrics

DOCS = Path(__file__).parents[2] / "docs"
SESSIONS = "chat_ticket.v1.ChatSessionService"


class Metrics:
    """A scrape of a server's samples."""

    def __init__(self, process: ServerProcess):
        line = process.wait_for("serving metrics")
        url = f"http://127.0.0.1:{line['port']}/metrics"
        with urllib.request.urlopen(url, timeout=10) as answer:
            self.text = answer.read().decode()
        self.families = list(text_string_to_metric_families(self.text))
        self.samples = [
            (sample.name, sample.labels, sample.value)
            for family in self.families
            for sample in family.samples
        ]

    def __call__(self, name: str, **labels: str) -> float:
        """The sum of all samples with these labels."""
        return sum(
            value
            for each, has, value in self.samples
            if each == name and labels.items() <= has.items()
        )


async def until(process: ServerProcess, name: str, value: float, **labels: str) -> None:
    """Wait for a value: the server counts a call a moment after the caller has its response."""
    async with asyncio.timeout(10):
        while Metrics(process)(name, **labels) != value:
            await asyncio.sleep(0.1)


@pytest.fixture(scope="module")
def process(database: str) -> Iterator[ServerProcess]:
    settings = {
        "CHAT_TICKET_METRICS_PORT": "0",
        "CHAT_TICKET_QUOTAS__SESSION_STREAMS": "1",
        "CHAT_TICKET_POOL_SIZE": "3",
    }
    with server_process(database, **settings) as process:
        process.wait_for("serving")
        yield process


async def test_calls_are_counted_and_timed_by_method_and_status(
    process: ServerProcess, tenant: str
) -> None:
    """With the metric names of other gRPC implementations."""
    before = Metrics(process)
    async with Api(process.address, tenant) as api:
        session = await api.session()
        for _ in range(3):
            await api.sessions.GetChatSession(GetChatSessionRequest(session_id=session.id))
        with refused(StatusCode.NOT_FOUND):
            await api.sessions.GetChatSession(GetChatSessionRequest(session_id=an_id()))
    of = {"grpc_type": "unary", "grpc_service": SESSIONS, "grpc_method": "GetChatSession"}
    for code, count in (("OK", 3), ("NOT_FOUND", 1)):
        for name in ("grpc_server_handled_total", "grpc_server_handling_seconds_count"):
            labels = {**of, "grpc_code": code}
            await until(process, name, before(name, **labels) + count, **labels)


async def test_started_calls_and_their_messages_are_counted(
    process: ServerProcess, tenant: str
) -> None:
    """Of unary calls and of streams that are still open, by method."""
    create = {"grpc_type": "unary", "grpc_service": SESSIONS, "grpc_method": "CreateChatSession"}
    watch = {**create, "grpc_type": "server_stream", "grpc_method": "WatchChatSession"}
    before = Metrics(process)
    async with Api(process.address, tenant) as api:
        session = await api.session()
        async with watching(api, session.id) as watcher:
            await watcher.until("caught_up")
            now = Metrics(process)
    for labels in (create, watch):
        for name in ("grpc_server_started_total", "grpc_server_msg_received_total"):
            assert now(name, **labels) == before(name, **labels) + 1, name
        name = "grpc_server_msg_sent_total"
        assert now(name, **labels) > before(name, **labels)


async def test_drafts_are_counted(process: ServerProcess, tenant: str) -> None:
    """Their writers while they write, their text, and how often writers come back or are lost."""
    before = Metrics(process)
    async with Api(process.address, tenant) as api:
        session = await api.session()
        async with writing(api, session.id) as stream:
            await stream.write("hello, ")
            await stream.write("wörld")
            await stream.append()
            assert Metrics(process)("chat_ticket_draft_writers") == 1
        await until(process, "chat_ticket_draft_writers", 0)
        assert await leave_draft(api, session.id, "!", stream.draft_id) == stream.draft_id
    now = Metrics(process)
    for name, count in (("takeovers", 1), ("pieces", 3), ("bytes", 14)):
        total = f"chat_ticket_draft_{name}_total"
        assert now(total) == before(total) + count, name
    commits = "chat_ticket_draft_commit_seconds_count"
    assert now(commits) >= before(commits) + 3
    await until(process, "chat_ticket_draft_writers", 0)


async def test_lost_writers_are_counted(fresh_database: str, tenant: str) -> None:
    """By the server that finishes their drafts: no other one uses this database."""
    settings = {"CHAT_TICKET_METRICS_PORT": "0", "CHAT_TICKET_DRAFT_SECONDS": "1"}
    with server_process(fresh_database, **settings) as process:
        process.wait_for("serving")
        async with Api(process.address, tenant) as api:
            await leave_draft(api, (await api.session()).id, "text")
        await until(process, "chat_ticket_drafts_expired_total", 1)


def test_database_is_up_or_down(process: ServerProcess) -> None:
    assert Metrics(process)("chat_ticket_database_up") == 1
    assert Metrics(process)("chat_ticket_tls_certificate_not_after_timestamp_seconds") == 0
    away = {"CHAT_TICKET_METRICS_PORT": "0"}
    certificate = Authority().server(seconds=5000)
    with TemporaryDirectory() as directory:
        for name, value in certificate.write(Path(directory)).items():
            away[f"CHAT_TICKET_{name.upper()}"] = value
        with server_process("postgresql://nobody@127.0.0.1:1/none", **away) as other:
            other.wait_for("not serving")
            down = Metrics(other)
    assert down("chat_ticket_database_up") == 0
    left = down("chat_ticket_tls_certificate_not_after_timestamp_seconds") - time.time()
    assert 4000 < left < 5000


async def test_cancelled_calls_are_counted(process: ServerProcess, tenant: str) -> None:
    """With the code CANCELLED."""
    labels = {"grpc_method": "WatchChatSession", "grpc_code": "CANCELLED"}
    before = Metrics(process)("grpc_server_handled_total", **labels)
    async with Api(process.address, tenant) as api:
        session = await api.session()
        async with watching(api, session.id) as watcher:
            await watcher.until("caught_up")
    await until(process, "grpc_server_handled_total", before + 1, **labels)


async def test_streams_watchers_and_delivery(process: ServerProcess, tenant: str) -> None:
    """The numbers of both, and the time until watchers receive a change."""
    open_now = {"grpc_service": SESSIONS, "grpc_method": "WatchChatSession"}
    async with Api(process.address, tenant) as api:
        session = await api.session()
        before = Metrics(process)
        async with watching(api, session.id) as watcher:
            await watcher.until("caught_up")
            await api.message(session.id)
            await watcher.until("messages_created")
            now = Metrics(process)
    assert now("chat_ticket_streams_open", **open_now) == 1
    assert now("chat_ticket_watchers") == 1
    for name in (
        "chat_ticket_watch_delivery_seconds_count",
        "chat_ticket_notify_batch_sessions_count",
    ):
        assert now(name) > before(name), name


@pytest.mark.usefixtures("feed_turn")
@pytest.mark.holds_up_feeds
async def test_feeds(process: ServerProcess, tenant: str, database: str) -> None:
    """Their followers, what they are told and how soon, and how long they have been held up."""
    before = Metrics(process)
    async with Api(process.address, tenant) as api, caught_up_feed(api) as feed:
        open_now = {"grpc_service": SESSIONS, "grpc_method": "WatchChatSessions"}
        await feed.settle(api)
        now = Metrics(process)
        assert now("chat_ticket_feed_followers") == 1
        assert now("chat_ticket_streams_open", **open_now) == 1
        changes = "chat_ticket_feed_changes_total"
        deliveries = "chat_ticket_feed_delivery_seconds_count"
        assert now(changes) >= before(changes) + 2
        async with asyncio.timeout(10):  # a read that has begun before a change counts no delivery
            while Metrics(process)(deliveries) < before(deliveries) + 2:
                await feed.settle(api)
        with psycopg.connect(database) as writer:
            writer.execute("SELECT pg_current_xact_id()")
            await api.session()
            async with asyncio.timeout(10):
                while Metrics(process)("chat_ticket_feed_held_up_seconds") < 0.2:
                    await asyncio.sleep(0.1)
        await until(process, "chat_ticket_feed_held_up_seconds", 0)
    await until(process, "chat_ticket_feed_followers", 0)


async def test_rejected_by_limit(process: ServerProcess, tenant: str) -> None:
    """The label names the limit."""
    async with Api(process.address, tenant) as api:
        session = await api.session()
        async with watching(api, session.id) as watcher:
            await watcher.until("caught_up")
            with refused(StatusCode.RESOURCE_EXHAUSTED):
                async with watching(api, session.id) as other:
                    await other.next()
    await until(process, "chat_ticket_rejected_total", 1, limit="session_streams")


async def test_pool(process: ServerProcess, tenant: str, database: str) -> None:
    """Its size, the calls that wait for a connection, and the time that they waited."""
    async with Api(process.address, tenant) as api:
        locked = [(await api.session()).id for _ in range(5)]
        with session_locked(database, *locked):
            calls = [asyncio.create_task(api.message(session_id)) for session_id in locked]
            # A tenant may have two of the three. The look for lost writers may wait too, briefly.
            await until(process, "chat_ticket_pool_waiting_calls", 3)
            under_load = Metrics(process)
        await asyncio.gather(*calls)
    assert under_load("chat_ticket_pool_connections") >= 2
    await until(process, "chat_ticket_pool_waiting_calls", 0)
    assert Metrics(process)("chat_ticket_pool_wait_seconds_count") >= 5


def test_build_and_process(process: ServerProcess) -> None:
    """The versions, and the memory and file descriptors of the process."""
    now = Metrics(process)
    [labels] = [has for name, has, _ in now.samples if name == "chat_ticket_build_info"]
    assert labels.keys() == {"version", "python", "grpcio"}
    assert now("process_resident_memory_bytes") > 2**20
    assert now("process_open_fds") > 10


async def test_no_label_has_an_id(process: ServerProcess, tenant: str) -> None:
    """More tenants do not mean more time series, and metrics do not reveal who they are."""
    async with Api(process.address, tenant) as api:
        session = await api.session()
        await api.message(session.id)
    text = Metrics(process).text
    assert tenant not in text
    assert not re.search(r"[0-9a-f]{8}-[0-9a-f]{4}-", text)


def test_each_worker_has_its_own_port(database: str) -> None:
    """The first worker has the configured port, the next worker the port after it."""
    # Below those that the system gives to outgoing connections.
    with server_process(database, "--workers", "2", CHAT_TICKET_METRICS_PORT="19464") as process:
        lines = process.wait_for_all("serving metrics", 2)
    assert sorted(line["port"] for line in lines) == [19464, 19465]


def test_port_in_use_is_reported(database: str, process: ServerProcess) -> None:
    """The server exits, because the operator relies on the metrics."""
    port = process.wait_for("serving metrics")["port"]
    with server_process(database, CHAT_TICKET_METRICS_PORT=str(port)) as other:
        assert other.popen.wait(timeout=30) == 1
        other.stop()
    assert f"cannot listen on 127.0.0.1:{port}" in other.output


def alerts() -> list[str]:
    """The expressions of docs/alerts.yml."""
    text = (DOCS / "alerts.yml").read_text()
    found = re.findall(
        r"^ +expr: (?:>-\n)?(.*?)\n +(?:for|annotations):", text, re.MULTILINE | re.DOTALL
    )
    assert len(found) == text.count("alert:")
    return found


def dashboard() -> list[str]:
    """The queries of docs/dashboard.json, without their variables."""
    panels = json.loads((DOCS / "dashboard.json").read_text())["panels"]
    queries = [target["expr"] for panel in panels for target in panel["targets"]]
    return [query.replace('job="$job"', "").replace("$__rate_interval", "5m") for query in queries]


@pytest.mark.parametrize("queries", [alerts, dashboard])
async def test_queries_are_about_what_is_exported(
    process: ServerProcess, tenant: str, queries: Callable[[], list[str]]
) -> None:
    """Every metric in the alerts and the dashboard is one that a server has, with these labels."""
    async with Api(process.address, tenant) as api:
        await api.session()
    now = Metrics(process)
    names = {name for name, _, _ in now.samples} | {
        # Before its first sample a metric with labels has only a name.
        f"{family.name}_total" if family.type == "counter" else family.name
        for family in now.families
    }
    # `job` and `instance` are Prometheus's own; `limit` has no sample until a limit rejects a call.
    labels = {"job", "instance", "limit"}.union(*(has for _, has, _ in now.samples))
    for query in queries():
        used = set(re.findall(r"\b(?:grpc_server|chat_ticket|process)_\w+", query))
        assert used or "up{" in query, query
        assert used <= names, query
        of_metrics = ",".join(re.findall(r"\{(.*?)\}", query))
        matched = set(re.findall(r"(\w+)(?:=~|!=|=)", of_metrics))
        grouped = set(re.findall(r"\w+", ",".join(re.findall(r"by \((.*?)\)", query))))
        assert matched | grouped <= labels, query


def test_dashboard_shows_every_metric() -> None:
    """Those that metrics.py declares."""
    text = " ".join(dashboard())
    declared = [value for value in vars(metrics).values() if hasattr(value, "_labelnames")]
    assert len(declared) > 10
    for metric in declared:
        assert metric._name in text, metric._name
