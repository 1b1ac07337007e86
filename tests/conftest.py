"""One PostgreSQL for a test run, one database and one server in each worker.

Tests that share the worker's server each act for a tenant of their own. Those that break things
take `fresh_database` and `start_server`.
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import psycopg
import pytest
import pytest_asyncio
from support import pooler
from support.client import Api

from chat_ticket_svc import config
from chat_ticket_svc.commands import migrate
from chat_ticket_svc.embedded import EmbeddedPostgres
from chat_ticket_svc.server import Server

NODE = Path(__file__).parent / "support" / "node"

TEMPLATE = "chat_ticket_template"


class Cluster:
    """The PostgreSQL of this run: the embedded one, or the one of TEST_DATABASE_URL."""

    def __init__(self, url: str):
        self._url = url

    def url(self, database: str) -> str:
        return urlunsplit(urlsplit(self._url)._replace(path=f"/{database}"))

    def execute(self, sql: str) -> None:
        with psycopg.connect(self._url, autocommit=True) as connection:
            connection.execute(sql)  # type: ignore[arg-type]

    def create(self, template: str = TEMPLATE) -> str:
        """Clone a database and return its URL."""
        name = f"test_{uuid.uuid4().hex}"
        self.execute(f"CREATE DATABASE {name} TEMPLATE {template}")
        return self.url(name)

    def drop(self, url: str) -> None:
        self.execute(f"DROP DATABASE IF EXISTS {urlsplit(url).path[1:]} WITH (FORCE)")


class Run:
    """What the controller of a test run sets up once, for all of its workers."""

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        url = os.environ.get("TEST_DATABASE_URL", "")
        if not url:
            directory = self._stack.enter_context(
                tempfile.TemporaryDirectory(prefix="chat-ticket-tests-", ignore_cleanup_errors=True)
            )
            # Where root may not use a user namespace, PostgreSQL runs as nobody.
            Path(directory).chmod(0o711)
            postgres = EmbeddedPostgres(Path(directory) / "data", durable=False)
            url = self._stack.enter_context(postgres).url("postgres")
        self.url = url
        cluster = Cluster(url)
        cluster.execute(f"DROP DATABASE IF EXISTS {TEMPLATE}")
        assert migrate.up(cluster.url(TEMPLATE), quiet=True) == 0
        if os.environ.get(pooler.WANTED):
            directory = self._stack.enter_context(
                tempfile.TemporaryDirectory(prefix="chat-ticket-tests-", ignore_cleanup_errors=True)
            )
            Path(directory).chmod(0o711)
            os.environ[pooler.BEHIND] = urlsplit(url)._replace(path="").geturl()
            os.environ[pooler.PLACE] = self._stack.enter_context(
                pooler.pgbouncer(url, Path(directory) / "pgbouncer")
            )

    def close(self) -> None:
        self._stack.close()


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


@contextlib.asynccontextmanager
async def serving(database_url: str, **settings: object) -> AsyncIterator[Server]:
    """A server in this process, on a port of its own, for callers in a hurry."""
    defaults = {
        "port": 0,
        "attachment_url_check": False,
        "drain_seconds": 0.2,
        "quotas": {"tenant_calls_per_second": 100_000},
    }
    database = {
        name.removeprefix(config.PREFIX).lower() if name.startswith(config.PREFIX) else name: value
        for name, value in pooler.environment(database_url).items()
    }
    server = Server(config.load(**{**database, **defaults, **settings}))
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


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
def node(environment: dict[str, str]) -> str:
    """Node, with the packages of tests/support/node/package-lock.json installed."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        pytest.skip("the Node client needs node and npm on PATH")
    lock = NODE / "package-lock.json"
    stamp = NODE / "node_modules" / ".installed"
    with lock.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # the other workers wait
        version = hashlib.sha256(file.read()).hexdigest()
        if not stamp.exists() or stamp.read_text() != version:
            done = subprocess.run(
                [npm, "ci", "--prefer-offline", "--no-progress"],
                cwd=NODE,
                env=environment,
                capture_output=True,
                check=False,
                encoding="utf-8",
                timeout=100,
            )
            assert done.returncode == 0, f"npm ci failed in {NODE}:\n{done.stderr}"
            stamp.write_text(version)
    return node
