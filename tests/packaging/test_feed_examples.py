"""The examples that follow all sessions, against a running service."""

import asyncio
import base64
import contextlib
import hmac
import json
import os
import pty
import signal
import sys
import termios
import threading
from collections.abc import AsyncIterator, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from support.client import an_id
from support.client_calls import create_message, create_session_id, until
from support.feeds import TOLD_SECONDS
from support.tools import run_program

from chat_ticket.client import AsyncChatTicketClient
from chat_ticket.v1 import resources_pb2 as r
from chat_ticket.v1.chat_session_pb2 import DeleteChatSessionRequest
from chat_ticket.v1.chat_ticket_pb2 import CreateTicketRequest, DeleteTicketRequest
from chat_ticket_svc.server import Server

pytestmark = pytest.mark.usefixtures("feed_turn")

EXAMPLES = Path(__file__).parents[2] / "examples" / "python"
SECRET = "a secret"


@pytest_asyncio.fixture
async def client(server: Server) -> AsyncIterator[AsyncChatTicketClient]:
    """Of the tenant that the examples are for."""
    async with AsyncChatTicketClient(f"localhost:{server.port}", tenant="acme") as client:
        yield client


def command(server: Server, name: str, *arguments: str) -> list[str]:
    address = f"localhost:{server.port}"
    return [sys.executable, str(EXAMPLES / f"{name}.py"), *arguments, "--address", address]


async def delete_session(client: AsyncChatTicketClient, session_id: str) -> None:
    await client.sessions.DeleteChatSession(DeleteChatSessionRequest(session_id=session_id))


async def kill(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.kill()
    await process.wait()


class TestInbox:
    async def test_prints_the_chats_that_match_and_ends(
        self, server: Server, client: AsyncChatTicketClient, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The one that changed last on top, with its title as it is."""
        monkeypatch.setenv("COLUMNS", "160")
        labels = {"team": an_id()}
        first = await create_session_id(client, title="[bold]first[/bold]", labels=labels)
        await create_session_id(client, title="second", labels=labels, user_id="jo")
        await create_session_id(client, title="of another team")
        await create_message(client, first)
        label = f"team={labels['team']}"
        output, errors = await run_program(*command(server, "inbox", "--label", label, "--once"))
        rows = [line.split("│")[2:7] for line in output.splitlines() if label in line]
        assert [[cell.strip() for cell in row] for row in rows] == [
            ["[bold]first[/bold]", "", "active", "", label],
            ["second", "jo", "active", "", label],
        ]
        assert "2 chats" in output
        assert not errors

    async def test_follows_what_happens_on_a_terminal(
        self, server: Server, client: AsyncChatTicketClient
    ) -> None:
        """Until it is interrupted."""
        labels, screen = {"team": an_id()}, bytearray()
        terminal, end = pty.openpty()
        termios.tcsetwinsize(end, (30, 160))
        arguments = command(server, "inbox", "--label", f"team={labels['team']}")
        loop = asyncio.get_running_loop()
        loop.add_reader(terminal, lambda: screen.extend(os.read(terminal, 65536)))
        inbox = await asyncio.create_subprocess_exec(*arguments, stdin=end, stdout=end, stderr=end)
        try:
            await until(lambda: b"0 chats" in screen, TOLD_SECONDS)
            session_id = await create_session_id(client, title="a new chat", labels=labels)
            await until(lambda: b"a new chat" in screen, TOLD_SECONDS)
            screen.clear()
            await delete_session(client, session_id)
            await until(lambda: b"0 chats" in screen, TOLD_SECONDS)
            inbox.send_signal(signal.SIGINT)
            assert await asyncio.wait_for(inbox.wait(), 10) == 0, screen.decode()
        finally:
            await kill(inbox)
            loop.remove_reader(terminal)
            os.close(terminal)
            os.close(end)


class Receiver(HTTPServer):
    """Answers its first requests with an error or not at all, and accepts the later ones."""

    def __init__(self, failures: list[str]):
        super().__init__(("127.0.0.1", 0), ReceiverRequest)
        self.failures = failures
        self.refused: list[str] = []
        self.accepted: list[tuple[str, dict[str, Any]]] = []
        self.errors: list[BaseException | None] = []

    def ids(self) -> list[str]:
        """The events that were accepted: their kinds, and the ids that they are about."""
        ids = []
        for _, event in self.accepted:
            [(kind, fields)] = event.items()
            id_ = next(fields[name] for name in ("id", "session_id", "ticket_id") if name in fields)
            ids.append(f"{kind} {id_}")
        return ids

    def handle_error(self, *_: object) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, ConnectionError):  # such as of the program that the test kills
            self.errors.append(error)


class ReceiverRequest(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        message_id, sent = self.headers["webhook-id"], self.headers["webhook-timestamp"]
        signed = f"{message_id}.{sent}.".encode() + body
        expected = base64.b64encode(hmac.digest(SECRET.encode(), signed, "sha256")).decode()
        assert self.headers["webhook-signature"] == f"v1,{expected}"
        if not self.server.failures:
            self.server.accepted.append((message_id, json.loads(body)))
            self.send_response(204)
            self.end_headers()
            return
        self.server.refused.append(message_id)
        if self.server.failures.pop(0) == "error":
            self.send_response(503)
            self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver(["error", "cut", "error"]) as receiver:
        threading.Thread(target=receiver.serve_forever, daemon=True).start()
        yield receiver
        receiver.shutdown()
        assert receiver.errors == [], "a request was not as it should be"


@contextlib.asynccontextmanager
async def relaying(server: Server, receiver: Receiver, cursor_file: Path) -> AsyncIterator[None]:
    """webhooks.py, which has begun and is killed at the end."""
    url = f"http://127.0.0.1:{receiver.server_port}/"
    arguments = command(server, "webhooks", url, "--cursor-file", str(cursor_file))
    environment = {**os.environ, "WEBHOOK_SECRET": SECRET}
    relay = await asyncio.create_subprocess_exec(
        *arguments, env=environment, stderr=asyncio.subprocess.DEVNULL
    )
    try:
        await until(cursor_file.exists, TOLD_SECONDS)
        yield
    finally:
        await kill(relay)


async def test_webhooks_are_posted_until_they_are_accepted(
    server: Server, client: AsyncChatTicketClient, receiver: Receiver, tmp_path: Path
) -> None:
    """In order, signed, with the same id again, and after a restart from where it was."""
    cursor_file = tmp_path / "cursor"
    async with relaying(server, receiver, cursor_file):
        session_id = await create_session_id(client)
        await until(lambda: bool(receiver.accepted), TOLD_SECONDS)
        assert receiver.refused == [receiver.accepted[0][0]] * 3
        ticket = (
            await client.tickets.CreateTicket(CreateTicketRequest(ticket=r.Ticket(title="help")))
        ).ticket
        await until(lambda: len(receiver.accepted) == 2, TOLD_SECONDS)
    assert receiver.ids() == [f"session {session_id}", f"ticket {ticket.id}"]

    receiver.accepted.clear()
    await delete_session(client, session_id)
    await client.tickets.DeleteTicket(DeleteTicketRequest(ticket_id=ticket.id))
    async with relaying(server, receiver, cursor_file):
        await until(lambda: f"ticket_deleted {ticket.id}" in receiver.ids(), TOLD_SECONDS)
    assert f"session_deleted {session_id}" in receiver.ids()
