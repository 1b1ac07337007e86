"""Demonstrates the service: real conversations, through the public API of a real server process.

All files are in a temporary directory, which is deleted afterwards. Exits with 1 when a check has
failed. The chats are those of `chitchat-dataset` (MIT), between two people each. The first speaker
plays the user, the other one the assistant.
"""

import argparse
import asyncio
import contextlib
import io
import itertools
import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Awaitable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import chitchat_dataset
import grpc.aio
import psycopg
from google.rpc import error_details_pb2, status_pb2
from tqdm import tqdm

from chat_ticket.v1 import (
    chat_attachment_pb2,
    chat_draft_pb2,
    chat_message_pb2,
    chat_session_pb2,
    chat_ticket_pb2,
)
from chat_ticket.v1.chat_attachment_pb2_grpc import ChatAttachmentServiceStub
from chat_ticket.v1.chat_draft_pb2_grpc import ChatDraftServiceStub
from chat_ticket.v1.chat_message_pb2_grpc import ChatMessageServiceStub
from chat_ticket.v1.chat_session_pb2_grpc import ChatSessionServiceStub
from chat_ticket.v1.chat_ticket_pb2_grpc import ChatTicketServiceStub
from chat_ticket.v1.resources_pb2 import CHAT_MESSAGE_ROLE_ASSISTANT, CHAT_MESSAGE_ROLE_USER
from chat_ticket_svc.embedded import EmbeddedPostgres

TENANTS = ("acme", "globex", "initech")
CHATS = 300  # without --all
CONCURRENT_SESSIONS = 12
BATCH = 500  # the limit of BatchCreateChatMessages
LIVE_MESSAGES = 8  # the last messages of one chat, which are written while the session is watched
ANSWER = "Your parcel left the warehouse on Monday, and will be with you tomorrow before noon."
CALL_SECONDS = 30
SERVER_SECONDS = 60  # to start, and to stop


class Tenant:
    """The API for one tenant. `acknowledged` has the stored sequences of each session."""

    def __init__(self, channel: grpc.aio.Channel, name: str | None):
        self.name = name
        self.acknowledged: dict[str, list[int]] = {}
        self._metadata = () if name is None else (("x-tenant-id", name),)
        self._write_draft = ChatDraftServiceStub(channel).WriteChatDraft
        self._rpcs: dict[str, tuple[Any, Any]] = {}
        for file, stub in (
            (chat_session_pb2, ChatSessionServiceStub(channel)),
            (chat_message_pb2, ChatMessageServiceStub(channel)),
            (chat_attachment_pb2, ChatAttachmentServiceStub(channel)),
            (chat_ticket_pb2, ChatTicketServiceStub(channel)),
        ):
            (service,) = file.DESCRIPTOR.services_by_name.values()
            for rpc in service.methods:
                self._rpcs[rpc.name] = getattr(stub, rpc.name), getattr(file, rpc.input_type.name)

    def __call__(self, rpc: str, **fields: Any) -> Any:
        """Call an RPC by its name, with the fields of its request."""
        method, request = self._rpcs[rpc]
        return method(request(**fields), metadata=self._metadata, timeout=CALL_SECONDS)

    async def start_draft(self, session_id: str, draft_id: str) -> tuple[Any, int]:
        """A stream that writes a draft, and the length from which it goes on."""
        stream: Any = self._write_draft(metadata=self._metadata, timeout=CALL_SECONDS)
        draft = {"id": draft_id, "role": CHAT_MESSAGE_ROLE_ASSISTANT}
        await stream.write(write_request(start={"session_id": session_id, "draft": draft}))
        return stream, (await stream.read()).started.length

    async def write(self, session_id: str, messages: Sequence[dict[str, Any]]) -> list[int]:
        request = {"session_id": session_id, "messages": messages}
        response = await self("BatchCreateChatMessages", **request)
        return [message.sequence for message in response.messages]


def write_request(**fields: Any) -> chat_draft_pb2.WriteChatDraftRequest:
    return chat_draft_pb2.WriteChatDraftRequest(**fields)


@dataclass(frozen=True, kw_only=True)
class Chat:
    """A chat of the dataset, to be stored as a session of a tenant."""

    tenant: Tenant
    about: dict[str, Any]
    utterances: list[dict[str, str]]
    empty: int  # the number of utterances without text, which are omitted

    @property
    def session_id(self) -> str:
        # Derived from the chat's id, so that loading the chat again is a retry.
        return str(uuid.uuid5(uuid.NAMESPACE_OID, self.about["id"]))

    @property
    def rating(self) -> float:
        return sum(self.about["ratings"].values()) if "ratings" in self.about else float("inf")

    def speakers(self, last: int = 0) -> int:
        return len({utterance["sender"] for utterance in self.utterances[-last:]})

    def messages(self) -> list[dict[str, Any]]:
        messages = []
        for number, utterance in enumerate(self.utterances):
            metadata: dict[str, Any] = {
                "sent_at": utterance["timestamp"],
                "sender": utterance["sender"],
            }
            if number == 0:
                metadata["chat"] = self.about  # with its ratings: sessions have no metadata
            is_user = utterance["sender"] == self.utterances[0]["sender"]
            message = {
                "id": str(uuid.uuid5(uuid.NAMESPACE_OID, f"{self.about['id']} {number}")),
                "role": CHAT_MESSAGE_ROLE_USER if is_user else CHAT_MESSAGE_ROLE_ASSISTANT,
                "content": utterance["text"],
                "metadata_json": json.dumps(metadata),
            }
            messages.append(message)
        return messages


def read_chats(tenants: Sequence[Tenant], limit: int | None) -> list[Chat]:
    chats = []
    dataset = itertools.islice(chitchat_dataset.Dataset().items(), limit)
    for (chat_id, chat), tenant in zip(dataset, itertools.cycle(tenants), strict=False):
        utterances = [utterance for turn in chat.pop("messages") for utterance in turn]
        with_text = [utterance for utterance in utterances if utterance["text"]]
        about, empty = {"id": chat_id, **chat}, len(utterances) - len(with_text)
        chats.append(Chat(tenant=tenant, about=about, utterances=with_text, empty=empty))
    return chats


class Checks:
    """Prints the result of each check, and counts them."""

    def __init__(self) -> None:
        self.passed = self.failed = 0

    def check(self, ok: bool, text: str) -> None:
        self.passed += ok
        self.failed += not ok
        print(f"  {'✓' if ok else '✗ FAILED:'} {text}")

    async def check_rejected(self, attempt: str, expected: str, call: Awaitable[object]) -> str:
        """Await a call that must fail with `expected`. Returns the error's message."""
        actual, message = "accepted", ""
        try:
            await call
        except grpc.aio.AioRpcError as error:
            actual, message = describe_error(error), error.details() or ""
        difference = "" if actual == expected else f", not {expected}"
        self.check(not difference, f"{attempt:<47} → {actual}{difference}")
        return message


def describe_error(error: grpc.aio.AioRpcError) -> str:
    """The status code with the invalid fields if there are any, otherwise with the reason."""
    status = status_pb2.Status()
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            status.MergeFromString(value)
    info, request = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    for detail in status.details:
        detail.Unpack(info)  # does nothing for a detail of another type
        detail.Unpack(request)
    fields = ", ".join(violation.field for violation in request.field_violations)
    return f"{error.code().name} {fields or info.reason}"


async def load(checks: Checks, chats: list[Chat], watched: Chat) -> None:
    tenants = ", ".join(TENANTS)
    print(f"LOAD {len(chats):,} chats as sessions of {tenants}, {CONCURRENT_SESSIONS} at a time")
    total = sum(len(chat.utterances) for chat in chats) - LIVE_MESSAGES
    remaining = iter(chats)

    async def work() -> None:
        for chat in remaining:  # shared: each worker takes the next one
            await chat.tenant("CreateChatSession", session={"id": chat.session_id})
            acknowledged = chat.tenant.acknowledged[chat.session_id] = []
            messages = chat.messages()[: -LIVE_MESSAGES if chat is watched else None]
            for start in range(0, len(messages), BATCH):
                batch = messages[start : start + BATCH]
                acknowledged += await chat.tenant.write(chat.session_id, batch)
                bar.update(len(batch))

    started_at = time.monotonic()
    # Only on a terminal: `disable=None` omits the bar elsewhere.
    with tqdm(total=total, unit=" messages", unit_scale=True, disable=None, leave=False) as bar:
        async with asyncio.TaskGroup() as group:
            for _ in range(CONCURRENT_SESSIONS):
                group.create_task(work())
    seconds = time.monotonic() - started_at
    stored = sum(len(chat.tenant.acknowledged[chat.session_id]) for chat in chats)
    speed = f"{seconds:.1f} s: {stored / seconds:,.0f} messages/s"
    checks.check(stored == total, f"{stored:,} messages acknowledged in {speed}")
    empty, one_sided = sum(c.empty for c in chats), sum(c.speakers() == 1 for c in chats)
    print(f"    dataset: {empty} empty utterances omitted, {one_sided:,} chats without an answer")


async def retry_batch(checks: Checks, chat: Chat, db: psycopg.Connection) -> None:
    def rows() -> object:
        return db.execute("SELECT count(*) FROM chat_messages").fetchone()

    before, batch = rows(), chat.messages()[:BATCH]
    again = await chat.tenant.write(chat.session_id, batch)
    same = again == chat.tenant.acknowledged[chat.session_id][:BATCH] and rows() == before
    checks.check(same, f"a batch of {len(batch)} sent twice: the same sequences, no new row")
    batch[0]["content"] += "!"
    await checks.check_rejected(
        "the batch again, with different content",
        "ALREADY_EXISTS CHAT_MESSAGE_ALREADY_EXISTS",
        chat.tenant.write(chat.session_id, batch),
    )


async def watch(checks: Checks, chat: Chat) -> None:
    tenant, messages = chat.tenant, chat.messages()
    print(f"\nWATCH a session of {tenant.name} while messages are added")
    seen: list[Any] = []
    latencies: list[float] = []
    caught_up = asyncio.Event()

    async def read() -> None:
        async for response in tenant("WatchChatSession", session_id=chat.session_id):
            now = time.time_ns()
            if response.HasField("caught_up"):
                print(f"    {len(seen)} messages of history, then live:")
                caught_up.set()
            for message in response.messages_created.messages:
                seen.append(message)
                if caught_up.is_set():
                    # The create time is from the database's clock, on this machine.
                    latency = (now - message.create_time.ToNanoseconds()) / 1e6
                    latencies.append(latency)
                    who = "user" if message.role == CHAT_MESSAGE_ROLE_USER else "assistant"
                    print(f"    {latency:5.1f} ms  {who:>9}: {message.content[:70]}")

    async with asyncio.TaskGroup() as group:
        reader = group.create_task(read())
        await caught_up.wait()
        history = len(seen)
        for message in messages[-LIVE_MESSAGES:]:
            await asyncio.sleep(0.2)
            request = {"session_id": chat.session_id, "message": message}
            created = (await tenant("CreateChatMessage", **request)).message
            tenant.acknowledged[chat.session_id].append(created.sequence)
        await asyncio.sleep(1)  # for late or repeated events
        reader.cancel()
    checks.check(
        [message.id for message in seen] == [message["id"] for message in messages]
        and [message.sequence for message in seen] == tenant.acknowledged[chat.session_id]
        and history == len(messages) - LIVE_MESSAGES,
        f"all {len(messages)} messages arrived once and in order, "
        f"{statistics.median(latencies or [0]):.1f} ms after the insert (median)",
    )


async def draft(checks: Checks, tenant: Tenant) -> None:
    print(f"\nDRAFT an answer in {tenant.name}, watched while it is written")
    draft_id = str(uuid.uuid4())
    session_id = (await tenant("CreateChatSession")).session.id
    seen, watching = bytearray(), asyncio.Event()

    async def read_message() -> Any:
        fields = {"session_id": session_id, "include_drafts": True}
        async for response in tenant("WatchChatSession", **fields):
            piece = response.draft_appended
            if response.HasField("caught_up"):
                watching.set()
            elif response.HasField("draft_appended") and piece.offset == len(seen):
                seen.extend(piece.text.encode())
                print(f"    {seen.decode()}")
            elif response.HasField("messages_created"):
                return response.messages_created.messages[0]
        return None

    async def append(stream: Any, offset: int, end: int) -> None:
        """Write a few characters at a time, until all are acknowledged."""
        while offset < end:
            text = ANSWER[offset : min(offset + 12, end)]
            await stream.write(write_request(append={"offset": offset, "text": text}))
            offset += len(text)
            await asyncio.sleep(0.1)
        while (await stream.read()).written.length < end:
            pass

    async with asyncio.TaskGroup() as group:
        reader = group.create_task(read_message())
        await watching.wait()
        stream, _ = await tenant.start_draft(session_id, draft_id)
        await append(stream, 0, 40)
        stream.cancel()
        stream, length = await tenant.start_draft(session_id, draft_id)
        print(f"    (the writer is cut off, and goes on from {length})")
        await append(stream, length, len(ANSWER))
        await stream.write(write_request(finish={}))
        finished = (await stream.read()).finished.message
    tenant.acknowledged[session_id] = [finished.sequence]
    checks.check(
        seen.decode() == ANSWER == finished.content
        and finished == reader.result()
        and length == 40,
        "each character was seen once, before the message with the draft's id was created",
    )


async def search(checks: Checks, tenant: Tenant, query: str) -> None:
    print(f'\nSEARCH "{query}" in {tenant.name}')
    before, after = ("\033[1m", "\033[0m") if sys.stdout.isatty() else ("[", "]")
    hits = (await tenant("SearchChatMessages", query=query, page_size=3)).hits
    for hit in hits:
        parts = (f"{before}{p.text}{after}" if p.hit else p.text for p in hit.snippet)
        print(f"    {hit.score:.2f}  {' '.join(''.join(parts).split())}")
    checks.check(
        bool(hits)
        and all(any(part.hit for part in hit.snippet) for hit in hits)
        and all(hit.sequence in tenant.acknowledged.get(hit.session_id, ()) for hit in hits),
        f"the {len(hits)} best hits, with their matches, are all from sessions of {tenant.name}",
    )


async def escalate(checks: Checks, chat: Chat) -> Any:
    print(f"\nESCALATE the session of {chat.tenant.name} with the lowest rating")
    title = f"rated {chat.rating} of 30: {chat.about.get('prompt', 'no prompt')}"
    session = {"session_id": chat.session_id}
    link = (await chat.tenant("CreateChatTicket", **session, ticket={"title": title})).chat_ticket
    has_ticket = (await chat.tenant("GetChatSession", **session)).session.has_ticket
    ok = has_ticket and link.ticket.title == title
    checks.check(ok, f'has_ticket is true, and the ticket is "{title[:75]}"')
    return link


async def rules_1_to_3(
    checks: Checks, channel: grpc.aio.Channel, chat: Chat, other_chat: Chat, files: str
) -> None:
    """The rules of sessions, messages and attachments. `other_chat` belongs to another tenant."""
    for what, tenant, session, expected in (
        ("no tenant", Tenant(channel, None), {}, "UNAUTHENTICATED TENANT_REQUIRED"),
        ("an empty tenant", Tenant(channel, ""), {}, "INVALID_ARGUMENT x-tenant-id"),
        ("an unknown status", chat.tenant, {"status": 99}, "INVALID_ARGUMENT session.status"),
    ):
        call = tenant("CreateChatSession", session=session)
        await checks.check_rejected(f"rule 1: a session of {what}", expected, call)

    absent, here, there = str(uuid.uuid4()), chat.session_id, other_chat.session_id
    hello = {"content": "hello", "role": CHAT_MESSAGE_ROLE_USER}
    not_there, bad = "NOT_FOUND CHAT_SESSION_NOT_FOUND", "INVALID_ARGUMENT message."
    errors = {}
    for what, session_id, wrong, expected in (
        ("to an absent session", absent, {}, not_there),
        (f"to a session of {other_chat.tenant.name}", there, {}, not_there),
        ("without content", here, {"content": ""}, bad + "content"),
        ("without a role", here, {"role": 0}, bad + "role"),
        ("with a list as metadata", here, {"metadata_json": "[1]"}, bad + "metadata_json"),
    ):
        call = chat.tenant("CreateChatMessage", session_id=session_id, message=hello | wrong)
        text = await checks.check_rejected(f"rule 2: a message {what}", expected, call)
        errors[session_id] = text.replace(session_id, "")
    checks.check(
        errors[absent] == errors[there], "rule 2: same error for absent and foreign sessions"
    )

    message_id, gone = chat.messages()[0]["id"], "FAILED_PRECONDITION ATTACHMENT_URL_NOT_ACCESSIBLE"
    for what, on, url, expected in (
        ("of no message", absent, f"{files}/photo.png", "NOT_FOUND CHAT_MESSAGE_NOT_FOUND"),
        ("without a valid URL", message_id, "photo.png", "INVALID_ARGUMENT attachment.file_url"),
        ("that is missing", message_id, f"{files}/gone.png", gone),
        ("on an unknown host", message_id, "https://files.invalid/photo.png", gone),
        ("in a private network", message_id, "https://127.0.0.1/photo.png", gone),
    ):
        call = chat.tenant("CreateChatAttachment", message_id=on, attachment=photo(url))
        await checks.check_rejected(f"rule 3: a file {what}", expected, call)


def photo(url: str) -> dict[str, str]:
    return {"file_url": url, "file_name": "photo.png", "file_type": "image/png"}


async def rules_4_and_5(checks: Checks, link: Any, tenant: Tenant, to_delete: Chat) -> None:
    """The rules of tickets. `link` is of `tenant`; `to_delete`, of another tenant, is deleted."""
    other, session_id, ticket = to_delete.tenant, to_delete.session_id, str(uuid.uuid4())
    request = {"session": {"status": "CHAT_SESSION_STATUS_ARCHIVED"}}
    archived = (await tenant("CreateChatSession", **request)).session.id
    linked = link.session_id
    for what, who, session, expected in (
        ("a ticket of another tenant", other, session_id, "NOT_FOUND TICKET_NOT_FOUND"),
        ("a second ticket of a session", tenant, linked, "ALREADY_EXISTS SESSION_HAS_TICKET"),
        (
            "a ticket of an archived one",
            tenant,
            archived,
            "FAILED_PRECONDITION SESSION_ARCHIVED",
        ),
    ):
        call = who("CreateChatTicket", session_id=session, ticket_id=link.ticket_id)
        await checks.check_rejected(f"rule 4: {what}", expected, call)

    opened = {"id": ticket, "title": "to be solved"}
    await other("CreateChatTicket", session_id=session_id, ticket=opened)
    await checks.check_rejected(
        "rule 5: deleting a session with an open ticket",
        "FAILED_PRECONDITION SESSION_HAS_ACTIVE_TICKET",
        other("DeleteChatSession", session_id=session_id),
    )
    await checks.check_rejected(
        "rule 5: deleting a ticket linked to a session",
        "FAILED_PRECONDITION TICKET_LINKED",
        other("DeleteTicket", ticket_id=ticket),
    )
    solved = {"id": ticket, "status": "TICKET_STATUS_SOLVED"}
    await other("UpdateTicket", ticket=solved, update_mask={"paths": ["status"]})
    await other("DeleteChatSession", session_id=session_id)
    del other.acknowledged[session_id]
    await checks.check_rejected(
        "rule 5: a message of a deleted session",
        "NOT_FOUND CHAT_MESSAGE_NOT_FOUND",
        other("GetChatMessage", message_id=to_delete.messages()[0]["id"]),
    )


async def rules_6_and_7(checks: Checks, chat: Chat, files: str) -> None:
    """The rules that the service maintains by itself."""
    session = {"session_id": chat.session_id}
    message, link = {"message_id": chat.messages()[0]["id"]}, {"chat_ticket_id": str(uuid.uuid4())}
    sessions = []
    for rpc, fields in (
        ("GetChatSession", session),
        ("CreateChatAttachment", message | {"attachment": photo(f"{files}/photo.png")}),
        ("CreateChatTicket", session | link | {"ticket": {"title": "please call"}}),
        ("DeleteChatTicket", link),
    ):
        await chat.tenant(rpc, **fields)
        sessions.append((await chat.tenant("GetChatSession", **session)).session)
    checks.check(
        [session.has_ticket for session in sessions] == [False, False, True, False],
        "rule 6: has_ticket is true while a ticket is linked, and false otherwise",
    )
    times = [session.update_time.ToNanoseconds() for session in sessions]
    checks.check(
        all(earlier < later for earlier, later in itertools.pairwise(times)),
        "rule 7: update_time increases with an attachment, a linked and an unlinked ticket",
    )


def summary(checks: Checks, db: psycopg.Connection, tenants: Sequence[Tenant]) -> None:
    columns = ("sessions", "messages", "attachments", "tickets", "chat tickets")
    print(f"\n{'IN THE DATABASE':<18}" + "".join(f"{column:>14}" for column in columns))
    for name, *counts in db.execute(
        """
        SELECT tenant_id, count(*),
               (SELECT count(*) FROM chat_messages WHERE tenant_id = s.tenant_id),
               (SELECT count(*) FROM chat_attachments WHERE tenant_id = s.tenant_id),
               (SELECT count(*) FROM tickets WHERE tenant_id = s.tenant_id),
               (SELECT count(*) FROM chat_tickets WHERE tenant_id = s.tenant_id)
          FROM chat_sessions s GROUP BY tenant_id ORDER BY tenant_id
        """
    ):
        print(f"    {name:<14}" + "".join(f"{count:>14,}" for count in counts))

    stored = db.execute(
        """
        SELECT tenant_id, session_id::text, array_agg(sequence ORDER BY created_at)
          FROM chat_messages GROUP BY tenant_id, session_id
        """
    ).fetchall()
    total = sum(len(sequences) for _, _, sequences in stored)
    acknowledged = [(t.name, *item) for t in tenants for item in t.acknowledged.items() if item[1]]
    checks.check(
        sorted(stored) == sorted(acknowledged),
        f"the {total:,} stored messages are the acknowledged ones, with their sequences",
    )
    checks.check(
        all(a < b for _, _, sequences in stored for a, b in itertools.pairwise(sequences)),
        "in every session the sequences are distinct and increase with the create time",
    )


async def serve_file(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A web server with one file, because rule 3 needs an accessible URL."""
    request = await reader.readuntil(b"\r\n\r\n")
    status = b"200 OK" if request.startswith(b"GET /photo.png ") else b"404 Not Found"
    writer.write(b"HTTP/1.1 " + status + b"\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
    writer.close()


async def run_demo(
    checks: Checks, port: int, db: psycopg.Connection, web: socket.socket, limit: int | None
) -> None:
    files = f"http://127.0.0.1:{web.getsockname()[1]}"
    async with (
        grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
        await asyncio.start_server(serve_file, sock=web),
    ):
        tenants = [Tenant(channel, name) for name in TENANTS]
        acme, globex, _ = tenants
        chats = read_chats(tenants, limit)
        medium = (chat for chat in chats if 30 <= len(chat.utterances) <= 60)
        watched_chat = next(chat for chat in medium if chat.speakers(last=LIVE_MESSAGES) == 2)
        await load(checks, chats, watched_chat)
        await retry_batch(checks, chats[0], db)
        await watch(checks, watched_chat)
        await draft(checks, acme)
        await search(checks, globex, "favorite movie")
        rated = (chat for chat in chats if chat.tenant is acme)
        link = await escalate(checks, min(rated, key=lambda chat: chat.rating))
        print("\nRULES and the errors of calls that break them")
        await rules_1_to_3(checks, channel, chats[0], chats[1], files)
        await rules_4_and_5(checks, link, acme, chats[1])
        await rules_6_and_7(checks, chats[2], files)
        summary(checks, db, tenants)


@contextlib.contextmanager
def serving(checks: Checks, data: Path, allowed_host: str) -> Iterator[int]:
    """A server process with an embedded PostgreSQL on `data`. Yields the port."""
    log = data.with_name("server.log")
    settings = {
        "CHAT_TICKET_LOG_FORMAT": "json",
        # The demo's web server has no certificate and a private address. Only it is allowed.
        "CHAT_TICKET_ATTACHMENT_URL_SCHEMES": "https,http",
        "CHAT_TICKET_ATTACHMENT_URL_ALLOWED_HOSTS": allowed_host,
        # The tenants load their chats as fast as they can.
        "CHAT_TICKET_QUOTAS__TENANT_CALLS_PER_SECOND": "100000",
    }
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "chat_ticket_svc", "serve", "--port", "0", "--embedded", data],
            env={**os.environ, **settings},
            stdout=subprocess.DEVNULL,
            stderr=output,
            start_new_session=True,  # Ctrl-C reaches only us, and we stop the server
        )

    try:
        deadline = time.monotonic() + SERVER_SECONDS
        while not (listening := re.search(r'^.*"listening".*}$', log.read_text(), re.MULTILINE)):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("the server did not start")
            time.sleep(0.05)
        yield json.loads(listening[0])["port"]
    except Exception:
        print("the end of the server's log:", log.read_text()[-2000:], sep="\n", file=sys.stderr)
        raise
    finally:
        process.terminate()
        try:
            process.wait(SERVER_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
    problems = [line for line in log.read_text().splitlines() if '"level": "info"' not in line]
    is_clean = process.wait() == 0 and not problems
    checks.check(
        is_clean,
        "\n".join(
            ["the server exited with 0, without a warning or an error in its log", *problems]
        ),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", action="store_true", help=f"load all chats, not only {CHATS}")
    limit = None if parser.parse_args().all else CHATS

    # Line-buffered, to stay in order with stderr when both go to one file. The chats contain
    # characters that not every locale can encode.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True, errors="replace")
    # Other signals are turned into Ctrl-C, which cleans up.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: signal.raise_signal(signal.SIGINT))

    started_at, checks = time.monotonic(), Checks()
    print("START a server process with an embedded PostgreSQL in a temporary directory")
    try:
        with (
            tempfile.TemporaryDirectory(prefix="chat-ticket-demo-") as directory,
            socket.create_server(("127.0.0.1", 0)) as web,
        ):
            Path(directory).chmod(0o711)  # PostgreSQL may have to run as another user
            data = Path(directory, "data")
            with serving(checks, data, f"127.0.0.1:{web.getsockname()[1]}") as port:
                # Not started here: only used for the URL of the server's PostgreSQL.
                database_url = EmbeddedPostgres(data).url("chat_ticket")
                with psycopg.connect(database_url, autocommit=True) as db:
                    asyncio.run(run_demo(checks, port, db, web, limit))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    result = f"{checks.passed} checks passed, {checks.failed} failed"
    print(f"\n{result}, in {time.monotonic() - started_at:.0f} s")
    return 1 if checks.failed else 0


if __name__ == "__main__":
    sys.exit(main())
