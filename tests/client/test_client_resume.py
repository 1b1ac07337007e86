"""The client's watch() while its servers are killed, drained and stopped."""

import asyncio
import contextlib
import itertools
import os
import random
import shutil
import signal
import subprocess
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg
import pytest
from support.client import a_file, an_id
from support.client_servers import OPTIONS, SETTINGS, Servers, free_port
from support.process import server_process
from support.threaded import ThreadedClient

from chat_ticket import errors
from chat_ticket.client import AsyncChatTicketClient
from chat_ticket.v1 import resources_pb2 as r
from chat_ticket.v1.chat_attachment_pb2 import CreateChatAttachmentRequest
from chat_ticket.v1.chat_message_pb2 import (
    BatchCreateChatMessagesRequest,
    CreateChatMessageRequest,
    DeleteChatMessageRequest,
    UpdateChatMessageRequest,
)
from chat_ticket.v1.chat_session_pb2 import (
    CreateChatSessionRequest,
    GetChatSessionRequest,
    UpdateChatSessionRequest,
    WatchChatSessionResponse,
)

WRITERS = 4
SILENCE = 1.0

NGINX = """
daemon off; master_process off; pid {directory}/pid; error_log {directory}/error.log;
events {{ }}
http {{
    access_log off;
    client_body_temp_path {directory}; proxy_temp_path {directory}; fastcgi_temp_path {directory};
    uwsgi_temp_path {directory}; scgi_temp_path {directory};
    server {{ listen 127.0.0.1:{port} http2; location / {{ grpc_pass grpc://127.0.0.1:{to}; }} }}
}}
"""
THINK = 0.01


class Writer:
    """Makes every kind of change to a session, and retries until the outcome is known."""

    def __init__(self, client: AsyncChatTicketClient, session_id: str, seed: int):
        self._client = client
        self._session_id = session_id
        self._random = random.Random(seed)
        self._mine: list[str] = []
        self._stopped = False

    def stop(self) -> None:
        self._stopped = True

    async def write(self) -> None:
        kinds = (self._create, self._batch, self._update, self._attach, self._delete, self._turn)
        while not self._stopped:
            [kind] = self._random.choices(kinds, (60, 10, 10, 5, 10, 5))
            if self._mine or kind in (self._create, self._batch, self._turn):
                await kind()
            await asyncio.sleep(THINK)

    def _message(self) -> r.ChatMessage:
        return r.ChatMessage(
            id=an_id(), role=r.CHAT_MESSAGE_ROLE_USER, content=str(self._random.random())
        )

    async def _create(self) -> None:
        message = self._message()
        request = CreateChatMessageRequest(session_id=self._session_id, message=message)
        await self._client.retry(self._client.messages.CreateChatMessage, request)
        self._mine.append(message.id)

    async def _batch(self) -> None:
        batch = [self._message() for _ in range(self._random.randint(2, 40))]
        request = BatchCreateChatMessagesRequest(session_id=self._session_id, messages=batch)
        await self._client.retry(self._client.messages.BatchCreateChatMessages, request)
        self._mine += [message.id for message in batch]

    async def _update(self) -> None:
        metadata = f'{{"at": {self._random.random()}}}'
        message = r.ChatMessage(id=self._random.choice(self._mine), metadata_json=metadata)
        request = UpdateChatMessageRequest(message=message)
        request.update_mask.paths.append("metadata_json")
        await self._client.retry(self._client.messages.UpdateChatMessage, request)

    async def _attach(self) -> None:
        request = CreateChatAttachmentRequest(
            message_id=self._random.choice(self._mine), attachment=a_file(id=an_id())
        )
        with contextlib.suppress(errors.FailedPreconditionError):  # it has many already
            await self._client.retry(self._client.attachments.CreateChatAttachment, request)

    async def _delete(self) -> None:
        message_id = self._mine.pop(self._random.randrange(len(self._mine)))
        request = DeleteChatMessageRequest(message_id=message_id)
        with contextlib.suppress(errors.NotFoundError):  # it had happened
            await self._client.retry(self._client.messages.DeleteChatMessage, request)

    async def _turn(self) -> None:
        status = self._random.choice([r.CHAT_SESSION_STATUS_ACTIVE, r.CHAT_SESSION_STATUS_RESOLVED])
        session = r.ChatSession(id=self._session_id, status=status)
        request = UpdateChatSessionRequest(session=session)
        request.update_mask.paths.append("status")
        await self._client.retry(self._client.sessions.UpdateChatSession, request)


@dataclass
class Watcher:
    """Watches from a revision, and stores the delivered events."""

    start: int
    pause: float = 0  # after each event
    leaves: float = 0  # how likely after each event, to come back by the revision it has kept
    events: list[WatchChatSessionResponse] = field(default_factory=list)
    revision: int = 0
    turns: int = 1

    async def watch(self, client: AsyncChatTicketClient, session_id: str) -> None:
        self.revision = self.start
        chance = random.Random(self.start)
        while True:
            async for event in client.watch(session_id, self.revision, silence_seconds=SILENCE):
                self.events.append(event)
                self.revision = event.revision
                await asyncio.sleep(self.pause)
                if chance.random() < self.leaves:
                    self.turns += 1
                    break


@dataclass
class Truth:
    """What the database holds."""

    messages: dict[str, tuple[int, int, str]]  # id → sequence, revision, content
    tombstones: dict[str, int]
    status: str


def truth(database_url: str, session_id: str) -> Truth:
    with psycopg.connect(database_url) as connection:
        messages = connection.execute(
            "SELECT id::text, sequence, revision, content FROM chat_messages WHERE session_id = %s",
            [session_id],
        ).fetchall()
        tombstones = connection.execute(
            "SELECT message_id::text, revision FROM chat_message_tombstones WHERE session_id = %s",
            [session_id],
        ).fetchall()
        [status] = connection.execute(
            "SELECT status FROM chat_sessions WHERE id = %s", [session_id]
        ).fetchone() or ("",)
    return Truth({id_: tuple(rest) for id_, *rest in messages}, dict(tombstones), status)


def compare(watcher: Watcher, truth: Truth) -> None:
    """Check that every change was delivered once and in order."""
    created: list[tuple[int, str]] = []
    updated: list[tuple[str, int]] = []
    deleted: list[str] = []
    states: list[tuple[int, bool]] = []
    caught_up = 0
    stored: dict[str, r.ChatMessage] = {}
    position = watcher.start
    for event in watcher.events:
        assert event.revision >= position, "never backwards"
        match event.WhichOneof("event"):
            case "messages_created":
                for message in event.messages_created.messages:
                    assert position < message.sequence <= event.revision
                    created.append((message.sequence, message.id))
                    stored[message.id] = message
            case "message_updated":
                message = event.message_updated
                assert position < message.revision, "nothing is delivered twice"
                updated.append((message.id, message.revision))
                stored[message.id] = message
            case "message_deleted":
                deleted.append(event.message_deleted.message_id)
                stored.pop(event.message_deleted.message_id, None)
            case "session":
                states.append((event.session.status, event.session.has_ticket))
            case "caught_up":
                caught_up += 1
        position = event.revision

    assert created == sorted(set(created)), "each once, in the order of the sequence"
    assert max(Counter(updated).values(), default=1) == 1
    ids = {id_ for _, id_ in created}
    survivors = {id_ for id_, (at, _, _) in truth.messages.items() if at > watcher.start}
    assert survivors <= ids, "none is left out"
    assert ids - survivors <= truth.tombstones.keys()
    gone = [id_ for id_, at in truth.tombstones.items() if at > watcher.start]
    assert sorted(deleted) == sorted(gone), "each deletion once"
    changed = {
        id_: (at, revision, content)
        for id_, (at, revision, content) in truth.messages.items()
        if revision > watcher.start
    }
    assert {m.id: (m.sequence, m.revision, m.content) for m in stored.values()} == changed
    assert states[-1][0] == r.ChatSessionStatus.Value(f"CHAT_SESSION_STATUS_{truth.status.upper()}")
    if watcher.turns == 1:
        assert caught_up == 1
        assert all(one != other for one, other in itertools.pairwise(states))


async def read(client: AsyncChatTicketClient, session_id: str) -> int:
    """Reads until it is cancelled, and never fails."""
    count = 0
    try:
        while True:
            await client.sessions.GetChatSession(GetChatSessionRequest(session_id=session_id))
            count += 1
            await asyncio.sleep(THINK)
    except asyncio.CancelledError:
        return count


@contextlib.asynccontextmanager
async def clients(
    client_class: type[AsyncChatTicketClient], target: str, tenant: str
) -> AsyncIterator[list[AsyncChatTicketClient]]:
    """One client for the writers and one for the watchers, with separate connections."""
    async with (
        client_class(target, tenant=tenant, timeout=2, options=OPTIONS) as one,
        client_class(target, tenant=tenant, timeout=10, options=OPTIONS) as other,
    ):
        yield [one, other]


@pytest.mark.parametrize("client_class", [AsyncChatTicketClient, ThreadedClient])
async def test_watch_delivers_everything_once_while_servers_fail(
    fresh_database: str, tenant: str, client_class: Any, caplog: Any
) -> None:
    """Killed, drained, stopped, and all gone at once, while writers write.

    And reads do not fail when one of the two is killed.
    """
    caplog.set_level("INFO", "chat_ticket.client")
    with contextlib.ExitStack() as stack:
        servers = await asyncio.to_thread(Servers, fresh_database, stack)
        await servers.serving()
        async with clients(client_class, servers.target, tenant) as (writing, watching):
            session_id = an_id()
            request = CreateChatSessionRequest(session=r.ChatSession(id=session_id))
            await writing.retry(writing.sessions.CreateChatSession, request)
            writers = [Writer(writing, session_id, seed) for seed in range(WRITERS)]
            writes = [asyncio.create_task(writer.write()) for writer in writers]
            watchers = [
                Watcher(start=0),
                Watcher(start=0),
                Watcher(start=0, pause=0.01),
                Watcher(start=0, leaves=0.05),
            ]
            watches = [asyncio.create_task(w.watch(watching, session_id)) for w in watchers]
            reads = [asyncio.create_task(read(watching, session_id)) for _ in range(4)]

            await asyncio.sleep(0.3)
            await servers.restart(signal.SIGKILL, 0)
            for task in reads:
                task.cancel()
            assert all(count > 10 for count in await asyncio.gather(*reads))
            late = Watcher(start=watchers[0].revision // 2)
            watchers.append(late)
            watches.append(asyncio.create_task(late.watch(watching, session_id)))
            await servers.restart(signal.SIGTERM, 1)
            await servers.freeze(0, 2 * SILENCE)
            await servers.restart(signal.SIGKILL, 0, 1)
            await asyncio.sleep(0.3)
            for writer in writers:
                writer.stop()
            async with asyncio.timeout(45):
                await asyncio.gather(*writes)

            request = GetChatSessionRequest(session_id=session_id)
            end = (await watching.retry(watching.sessions.GetChatSession, request)).session
            async with asyncio.timeout(45):
                while any(watcher.revision < end.revision for watcher in watchers):
                    assert not any(task.done() for task in watches), watches
                    await asyncio.sleep(0.05)
            for task in watches:
                task.cancel()
            await asyncio.gather(*watches, return_exceptions=True)

    found = truth(fresh_database, session_id)
    assert len(found.messages) > 100
    for watcher in watchers:
        compare(watcher, found)
    resumed = [entry.getMessage() for entry in caplog.records]
    assert any("no response for" in text for text in resumed), resumed
    assert any("DRAINING" in text for text in resumed), resumed
    assert len(resumed) >= len(watchers), resumed


@pytest.fixture
def nginx(tmp_path: Path) -> Iterator[Callable[[int], int]]:
    """`nginx(port)`: the port of an nginx before a server."""
    path = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
    if path is None:
        pytest.skip("needs nginx on PATH")
    with contextlib.ExitStack() as stack:

        def start(to: int) -> int:
            port, file = free_port(), tmp_path / "nginx.conf"
            file.write_text(NGINX.format(directory=tmp_path, port=port, to=to))
            command = [path, "-c", str(file), "-e", str(tmp_path / "error.log")]
            process = stack.enter_context(subprocess.Popen(command))
            stack.callback(process.kill)
            return port

        yield start


async def test_watch_resumes_behind_a_proxy(
    database: str, tenant: str, nginx: Callable[[int], int], caplog: Any
) -> None:
    """The proxy answers INTERNAL or UNKNOWN if it loses the server during a stream."""
    caplog.set_level("INFO", "chat_ticket.client")
    port = free_port()
    target, contents = f"127.0.0.1:{nginx(port)}", []
    settings = {**SETTINGS, "CHAT_TICKET_PORT": str(port)}
    async with AsyncChatTicketClient(target, tenant=tenant, options=OPTIONS) as client:
        session_id = an_id()
        request = CreateChatSessionRequest(session=r.ChatSession(id=session_id))
        events = client.watch(session_id)
        for content in ("one", "two"):
            with server_process(database, **settings) as server:
                await asyncio.to_thread(server.wait_for, "serving")
                await client.retry(client.sessions.CreateChatSession, request)
                message = r.ChatMessage(id=an_id(), role=r.CHAT_MESSAGE_ROLE_USER, content=content)
                await client.retry(
                    client.messages.CreateChatMessage,
                    CreateChatMessageRequest(session_id=session_id, message=message),
                )
                async with asyncio.timeout(20):
                    while content not in contents:
                        event = await anext(events)
                        contents += [each.content for each in event.messages_created.messages]
                server.popen.kill()
        await events.aclose()
    assert contents == ["one", "two"]
    assert "INTERNAL" in caplog.text or "UNKNOWN" in caplog.text
