"""The service as its operator runs it: a separate process."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from chat_ticket_svc import event_engine
from support import pooler
from support.fork_server import ForkedProcess

START_SECONDS = 30
# The variables that are read before the service is imported, or while it is.
READ_AT_START = ("PYTHON", "GRPC_")


class ServerProcess:
    """A running `chat-ticket-svc serve` and what it logged so far."""

    def __init__(
        self,
        *arguments: str,
        environment: dict[str, str],
        module: str = "chat_ticket_svc",
        command: Sequence[str] = (),
        directory: Path | None = None,
    ):
        """`command` is run instead of the module of this environment.

        The service is forked, from a process that has imported it, unless it is to start otherwise:
        as another program, with children of its own, or where Python or gRPC have other settings.
        """
        self.log: list[dict[str, Any]] = []
        self.output = ""  # both streams, as they came
        self._logged = threading.Condition()
        is_forked = not (command or arguments or directory) and module == "chat_ticket_svc"
        at_start = [environment[name] for name in environment if name.startswith(READ_AT_START)]
        is_forked = is_forked and not any(at_start)
        environment = {**os.environ, "CHAT_TICKET_LOG_FORMAT": "json", **environment}
        program = [*(command or (sys.executable, "-m", module, "serve")), *arguments]
        self.popen: subprocess.Popen[bytes] | ForkedProcess
        read, write = os.pipe()
        try:
            if is_forked:
                self.popen = ForkedProcess(["serve"], environment, write, write)
            else:
                self.popen = subprocess.Popen(
                    program, cwd=directory, env=environment, stdout=write, stderr=write
                )
        except BaseException:
            os.close(read)
            raise
        finally:
            os.close(write)
        self._output = os.fdopen(read)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self._output:
            with self._logged:
                self.output += line
                try:
                    self.log.append(json.loads(line))
                except ValueError:
                    self.log.append({"event": line.rstrip("\n")})
                self._logged.notify_all()

    def wait_for(self, event: str, timeout: float = START_SECONDS) -> dict[str, Any]:
        """The first log line with this event, which has come or will come."""

        return self.wait_for_all(event, 1, timeout)[0]

    def wait_for_all(
        self, event: str, count: int, timeout: float = START_SECONDS
    ) -> list[dict[str, Any]]:
        """The first `count` log lines with this event, which have come or will come."""

        def found() -> list[dict[str, Any]]:
            return [line for line in self.log if line["event"] == event][:count]

        def settled() -> bool:
            return len(found()) == count or self.popen.poll() is not None

        with self._logged:
            self._logged.wait_for(settled, timeout)
            lines = found()
        assert len(lines) == count, f"not {count} of {event!r} in the log: {self.log}"
        return lines

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.wait_for('listening')['port']}"

    def printed(self, timeout: float = START_SECONDS) -> str:
        """The first line that is not of the log, which has come or will come."""

        def found() -> str | None:
            return next((line["event"] for line in self.log if "level" not in line), None)

        with self._logged:
            line = self._logged.wait_for(found, timeout)
        assert line, f"nothing but the log: {self.log}"
        return line

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal, and return the exit status."""
        if self.popen.poll() is None:
            self.popen.send_signal(number)
        status = self.popen.wait(timeout=30)
        self._reader.join(timeout=5)
        self._output.close()
        return status


@contextmanager
def server_process(database_url: str = "", *arguments: str, **settings: str) -> Iterator[Any]:
    """A server process on a free port; `settings` are environment variables."""
    defaults = {
        "CHAT_TICKET_PORT": "0",
        # Tests attach no real URLs. Without the check a server starts a quarter faster.
        "CHAT_TICKET_ATTACHMENT_URL_CHECK": "false",
        event_engine.VARIABLE: "",  # the tests have set it for the servers in their process
    }
    environment = {**pooler.environment(database_url), **defaults, **settings}
    process = ServerProcess(*arguments, environment=environment)
    try:
        yield process
    finally:
        if process.popen.poll() is None:
            process.popen.kill()
        process.stop()


class Finished(NamedTuple):
    """A command that has come to its end."""

    status: int
    output: str
    errors: str


async def command(*arguments: str, **environment: str) -> Finished:
    """Run `chat-ticket-svc` with these arguments, to its end."""
    return await asyncio.to_thread(_run, arguments, environment)


def _run(arguments: Sequence[str], environment: Mapping[str, str]) -> Finished:
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        streams = output.fileno(), errors.fileno()
        status = ForkedProcess(arguments, {**os.environ, **environment}, *streams).wait()
        output.seek(0)
        errors.seek(0)
        return Finished(status, output.read().decode(), errors.read().decode())


async def log_line(process: ServerProcess, event: str, **of: str) -> dict[str, Any]:
    """The one with this event and these values; a line follows its call by a moment."""
    async with asyncio.timeout(10):
        while True:
            found = [
                line
                for line in process.log
                if line["event"] == event and of.items() <= line.items()
            ]
            if found:
                assert len(found) == 1
                return found[0]
            await asyncio.sleep(0.01)


def run_command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    done = _run(arguments, {"DATABASE_URL": "", **environment})
    return subprocess.CompletedProcess(arguments, done.status, done.output, done.errors)


def is_postgres_running(pid: int, data: Path) -> bool:
    """Whether this pid is still the PostgreSQL of a data directory that it was."""
    try:
        return os.fsencode(data) in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
