"""The PostgreSQL of a test run, and databases on it."""

import contextlib
import os
import uuid
from urllib.parse import urlsplit, urlunsplit

import psycopg

from chat_ticket_svc.commands import migrate
from chat_ticket_svc.embedded import EmbeddedPostgres
from support import pooler
from support.scratch_directory import scratch_directory

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
        # The default strategy writes the template to the WAL too.
        self.execute(f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY file_copy")
        return self.url(name)

    def drop(self, url: str) -> None:
        self.execute(f"DROP DATABASE IF EXISTS {urlsplit(url).path[1:]} WITH (FORCE)")


class Run:
    """What the controller of a test run sets up once, for all of its workers."""

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        url = os.environ.get("TEST_DATABASE_URL", "")
        if not url:
            directory = self._stack.enter_context(scratch_directory())
            postgres = EmbeddedPostgres(directory / "data", durable=False)
            url = self._stack.enter_context(postgres).url("postgres")
        self.url = url
        cluster = Cluster(url)
        cluster.execute(f"DROP DATABASE IF EXISTS {TEMPLATE}")
        assert migrate.up(cluster.url(TEMPLATE), quiet=True) == 0
        if os.environ.get(pooler.WANTED):
            directory = self._stack.enter_context(scratch_directory())
            os.environ[pooler.BEHIND] = urlsplit(url)._replace(path="").geturl()
            os.environ[pooler.ADDRESS] = self._stack.enter_context(
                pooler.pgbouncer(url, directory / "pgbouncer")
            )

    def close(self) -> None:
        self._stack.close()
