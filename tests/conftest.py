"""One PostgreSQL for a test run, one database and one server in each worker.

Tests that share the worker's server each act for a tenant of their own. Those that break things
take `fresh_database` and `start_server`.
"""

import asyncio
import contextlib
import fcntl
import os
import shutil
import sys
import tempfile
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from chat_ticket_svc import event_engine

# Before the tests are imported. With compiled modules kept, a server process starts in a sixth less
# time, and a run without workers collects its tests in half the time.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# Before the imports: gRPC reads the environment when it is imported.
event_engine.disable_listener(os.environ)  # for the servers in this process, as `serve` does

# pytest rewrites the asserts of a module when it is imported.
pytest.register_assert_rewrite("support", "fuzz")

from support import pooler
from support.client import Api
from support.cluster import Cluster, Run
from support.npm import NODE_CLIENT, PLAIN_NODE_CLIENT, Npm, build, install, npm_runner
from support.process import ServerProcess, server_process
from support.scratch_directory import copied_data, scratch_directory
from support.server import serving

from chat_ticket_svc.commands import migrate
from chat_ticket_svc.embedded import EmbeddedPostgres
from chat_ticket_svc.server import Server

RUN = pytest.StashKey[Run]()


def pytest_sessionstart(session: pytest.Session) -> None:
    if not hasattr(session.config, "workerinput") and not session.config.option.collectonly:
        session.config.stash[RUN] = Run()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get(pooler.WANTED):
        for item in items:
            for mark in item.iter_markers("direct"):
                item.add_marker(pytest.mark.skip(f"not by PgBouncer: {mark.args[0]}"))


def pytest_configure_node(node: object) -> None:
    """Tell an xdist worker where PostgreSQL is."""
    node.workerinput["postgres"] = node.config.stash[RUN].url  # type: ignore[attr-defined]


def pytest_unconfigure(config: pytest.Config) -> None:
    if RUN in config.stash:
        config.stash[RUN].close()


@pytest.fixture(scope="session")
def cluster(pytestconfig: pytest.Config) -> Cluster:
    if hasattr(pytestconfig, "workerinput"):
        return Cluster(pytestconfig.workerinput["postgres"])
    return Cluster(pytestconfig.stash[RUN].url)


@pytest.fixture(scope="session")
def database(cluster: Cluster) -> Iterator[str]:
    """The URL of the worker's database."""
    url = cluster.create()
    yield url
    cluster.drop(url)


@pytest.fixture
def fresh_database(cluster: Cluster) -> Iterator[str]:
    """The URL of a database of the test's own."""
    url = cluster.create()
    yield url
    cluster.drop(url)


@pytest.fixture(scope="session")
def migrated_data() -> Iterator[Path]:
    """The data directory of an embedded PostgreSQL that was stopped, for copies: it takes a second.

    Its database is `chat_ticket`, as that of `serve --embedded`.
    """
    with scratch_directory() as directory:
        with EmbeddedPostgres(directory / "data", durable=False) as postgres:
            assert migrate.up(postgres.url("chat_ticket"), quiet=True) == 0
        yield directory / "data"


@pytest.fixture
def served_data(migrated_data: Path) -> Iterator[Path]:
    """A data directory as `serve --embedded` leaves it, of the test's own."""
    with copied_data(migrated_data) as data:
        yield data


@pytest_asyncio.fixture(scope="session")
async def server(database: str) -> AsyncIterator[Server]:
    """The worker's server."""
    async with serving(database) as server:
        yield server


@pytest.fixture
def tenant() -> str:
    return f"tenant {uuid.uuid4()}"


@pytest_asyncio.fixture
async def api(server: Server, tenant: str) -> AsyncIterator[Api]:
    """A client of the worker's server, acting for a tenant of the test's own."""
    async with Api(f"127.0.0.1:{server.port}", tenant) as api:
        yield api


@pytest_asyncio.fixture
async def other(server: Server) -> AsyncIterator[Api]:
    """Another tenant's client."""
    async with Api(f"127.0.0.1:{server.port}", f"stranger {uuid.uuid4()}") as api:
        yield api


@pytest_asyncio.fixture
async def start_server(tenant: str) -> AsyncIterator[Callable[..., object]]:
    """`await start_server(database_url, **settings)`: a client of a server of the test's own."""
    async with contextlib.AsyncExitStack() as stack:

        async def start(database_url: str, **settings: object) -> Api:
            server = await stack.enter_async_context(serving(database_url, **settings))
            return await stack.enter_async_context(Api(f"127.0.0.1:{server.port}", tenant))

        yield start


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of other programs, whose home can be written to: buf and npm want one."""
    environment = dict(os.environ)
    if not os.access(environment.get("HOME", ""), os.W_OK):
        environment["HOME"] = str(tmp_path_factory.mktemp("home"))
    return environment


@pytest.fixture(scope="session")
def npm(environment: dict[str, str]) -> Npm:
    """`npm(directory, …)`: run npm, or another program of Node, and return what it prints."""
    return npm_runner(environment)


@pytest.fixture(scope="session")
def node(npm: Npm) -> str:
    """Node, with the packages of tests/support/node/package-lock.json installed."""
    install(npm, PLAIN_NODE_CLIENT)
    return shutil.which("node") or ""


@pytest.fixture(scope="session")
def node_client(npm: Npm) -> Path:
    """clients/node, installed and built."""
    install(npm, NODE_CLIENT)
    build(npm, NODE_CLIENT)
    return NODE_CLIENT


# So long that only a notification can arrive sooner.
NO_POLL = "3600"


@pytest.fixture
def two_servers(fresh_database: str) -> Iterator[list[ServerProcess]]:
    """Two servers on one database, which never poll."""
    poll = {"CHAT_TICKET_WATCH_POLL_INTERVAL_SECONDS": NO_POLL}
    with (
        server_process(fresh_database, **poll) as one,
        server_process(fresh_database, **poll) as two,
    ):
        yield [one, two]


@pytest.fixture
async def two_clients(
    two_servers: list[ServerProcess], tenant: str
) -> AsyncIterator[tuple[Api, Api]]:
    async with (
        Api(two_servers[0].address, tenant) as one,
        Api(two_servers[1].address, tenant) as two,
    ):
        yield one, two


@pytest_asyncio.fixture
async def feed_turn(request: pytest.FixtureRequest) -> AsyncIterator[None]:
    """The turn of a test that follows a feed.

    A test that is marked `holds_up_feeds` is the only one, in all processes: its open transaction
    holds up the feeds of all databases of this PostgreSQL. Two of them would wait for each other.
    """
    is_alone = request.node.get_closest_marker("holds_up_feeds") is not None
    with (Path(tempfile.gettempdir()) / f"chat-ticket-feeds-{os.getuid()}.lock").open("w") as lock:
        # The event loop goes on meanwhile: it may be in the middle of a transaction of the server,
        # for whose end the test that has the turn waits.
        operation = fcntl.LOCK_EX if is_alone else fcntl.LOCK_SH
        await asyncio.to_thread(fcntl.flock, lock, operation)
        yield
