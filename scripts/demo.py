"""Show the service at work: real conversations through the public API of a real server process.

Everything lives in a temporary directory and is gone afterwards. Exits 1 when anything was not as
it must be. The chats are those of `chitchat-dataset` (MIT), of two people each: who spoke first
stands for the user, the other one for the assistant.
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

from chat_ticket.v1 import chat_attachment_pb2, chat_message_pb2, chat_session_pb2, chat_ticket_pb2
from chat_ticket.v1.chat_attachment_pb2_grpc import ChatAttachmentServiceStub
from chat_ticket.v1.chat_message_pb2_grpc import ChatMessageServiceStub
from chat_ticket.v1.chat_session_pb2_grpc import ChatSessionServiceStub
from chat_ticket.v1.chat_ticket_pb2_grpc import ChatTicketServiceStub
from chat_ticket.v1.resources_pb2 import CHAT_MESSAGE_ROLE_ASSISTANT, CHAT_MESSAGE_ROLE_USER
from chat_ticket_svc.embedded import EmbeddedPostgres

TENANTS = ("acme", "globex", "initech")
CHATS = 300  # without --all
AT_ONCE = 12  # sessions that are loaded at the same time
BATCH = 500  # the limit of BatchCreateChatMessages
LIVE = 8  # messages of one chat that are kept back, to be written while it is followed
CALL_SECONDS = 30
SERVER_SECONDS = 60  # to start, and to end


class Tenant:
    """The API for one tenant, and what it has acknowledged: session id → sequences."""

    def __init__(self, channel: grpc.aio.Channel, name: str | None):
        self.name = name
        self.acknowledged: dict[str, list[int]] = {}
        self._metadata = () if name is None else (("x-tenant-id", name),)
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
        """Call an RPC by name with the fields of its request, as one does with grpcurl."""
        method, request = self._rpcs[rpc]
        return method(request(**fields), metadata=self._metadata, timeout=CALL_SECONDS)

    async def write(self, session_id: str, messages: Sequence[dict[str, Any]]) -> list[int]:
        request = {"session_id": session_id, "messages": messages}
        response = await self("BatchCreateChatMessages", **request)
        return [message.sequence for message in response.messages]


@dataclass(frozen=True, kw_only=True)
class Chat:
    """A chat of the dataset, on its way to become a session of a tenant."""

    tenant: Tenant
    about: dict[str, Any]
    utterances: list[dict[str, str]]
    empty: int  # utterances left out: a message must have content

    @property
    def session_id(self) -> str:
        # Always the same for the same chat, so that loading it again is a retry.
        return str(uuid.uuid5(uuid.NAMESPACE_OID, self.about["id"]))

    @property
    def rating(self) -> float:
        return sum(self.about["ratings"].values()) if "ratings" in self.about else float("inf")

    def speakers(self, last: int = 0) -> int:
        return len({utterance["sender"] for utterance in self.utterances[-last:]})

    def messages(self) -> list[dict[str, Any]]:
        messages = []
        for number, said in enumerate(self.utterances):
            metadata: dict[str, Any] = {"sent_at": said["timestamp"], "sender": said["sender"]}
            if number == 0:
                metadata["chat"] = self.about  # with its ratings: a session has no metadata
            first = said["sender"] == self.utterances[0]["sender"]
            message = {
                "id": str(uuid.uuid5(uuid.NAMESPACE_OID, f"{self.about['id']} {number}")),
                "role": CHAT_MESSAGE_ROLE_USER if first else CHAT_MESSAGE_ROLE_ASSISTANT,
                "content": said["text"],
                "metadata_json": json.dumps(metadata),
            }
            messages.append(message)
        return messages


def read_chats(tenants: Sequence[Tenant], limit: int | None) -> list[Chat]:
    chats = []
    dataset = itertools.islice(chitchat_dataset.Dataset().items(), limit)
    for (chat_id, chat), tenant in zip(dataset, itertools.cycle(tenants), strict=False):
        said = [utterance for turn in chat.pop("messages") for utterance in turn]
        spoken = [utterance for utterance in said if utterance["text"]]
        about, empty = {"id": chat_id, **chat}, len(said) - len(spoken)
        chats.append(Chat(tenant=tenant, about=about, utterances=spoken, empty=empty))
    return chats


class Expectations:
    """Prints what was expected, marked with whether it was so, and counts."""

    def __init__(self) -> None:
        self.met = self.failed = 0

    def check(self, ok: bool, text: str) -> None:
        self.met += ok
        self.failed += not ok
        print(f"  {'✓' if ok else '✗ NOT SO:'} {text}")

    async def refused(self, tried: str, expected: str, call: Awaitable[object]) -> str:
        """Await a call that must be refused with `expected`; returns the words of the refusal."""
        got, words = "accepted", ""
        try:
            await call
        except grpc.aio.AioRpcError as error:
            got, words = refusal(error), error.details() or ""
        wanted = "" if got == expected else f", not {expected}"
        self.check(not wanted, f"{tried:<47} → {got}{wanted}")
        return words


def refusal(error: grpc.aio.AioRpcError) -> str:
    """The status, and with it the fields at fault where there are any, else the reason."""
    status = status_pb2.Status()
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            status.MergeFromString(value)
    info, request = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    for detail in status.details:
        detail.Unpack(info)  # does nothing to a detail of another kind
        detail.Unpack(request)
    fields = ", ".join(violation.field for violation in request.field_violations)
    return f"{error.code().name} {fields or info.reason}"


async def load(expect: Expectations, chats: list[Chat], kept_back: Chat) -> None:
    print(f"LOAD {len(chats):,} chats, {AT_ONCE} at a time, as sessions of {', '.join(TENANTS)}")
    total = sum(len(chat.utterances) for chat in chats) - LIVE
    waiting = iter(chats)

    async def work() -> None:
        for chat in waiting:  # shared: each worker takes the next one
            await chat.tenant("CreateChatSession", session={"id": chat.session_id})
            acknowledged = chat.tenant.acknowledged[chat.session_id] = []
            messages = chat.messages()[: -LIVE if chat is kept_back else None]
            for start in range(0, len(messages), BATCH):
                batch = messages[start : start + BATCH]
                acknowledged += await chat.tenant.write(chat.session_id, batch)
                bar.update(len(batch))

    began = time.monotonic()
    # On a terminal only: in a file a bar is noise.
    with tqdm(total=total, unit=" messages", unit_scale=True, disable=None, leave=False) as bar:
        async with asyncio.TaskGroup() as group:
            for _ in range(AT_ONCE):
                group.create_task(work())
    took = time.monotonic() - began
    stored = sum(len(chat.tenant.acknowledged[chat.session_id]) for chat in chats)
    speed = f"{took:.1f} s: {stored / took:,.0f} messages/s"
    expect.check(stored == total, f"{stored:,} messages acknowledged in {speed}")
    empty, alone = sum(c.empty for c in chats), sum(c.speakers() == 1 for c in chats)
    print(f"    of the dataset: {empty} empty utterances left out, {alone:,} chats got no answer")


async def retry(expect: Expectations, chat: Chat, db: psycopg.Connection) -> None:
    def rows() -> object:
        return db.execute("SELECT count(*) FROM chat_messages").fetchone()

    before, batch = rows(), chat.messages()[:BATCH]
    again = await chat.tenant.write(chat.session_id, batch)
    same = again == chat.tenant.acknowledged[chat.session_id][:BATCH] and rows() == before
    expect.check(same, f"a batch of {len(batch)} sent again: the same sequences, no new row")
    batch[0]["content"] += "!"
    await expect.refused(
        "the batch again, with another content",
        "ALREADY_EXISTS CHAT_MESSAGE_ALREADY_EXISTS",
        chat.tenant.write(chat.session_id, batch),
    )


async def follow(expect: Expectations, chat: Chat) -> None:
    tenant, messages = chat.tenant, chat.messages()
    print(f"\nFOLLOW a session of {tenant.name} while it grows")
    seen: list[Any] = []
    latencies: list[float] = []
    caught_up = asyncio.Event()

    async def read() -> None:
        async for response in tenant("WatchChatSession", session_id=chat.session_id):
            now = time.time_ns()
            if response.HasField("caught_up"):
                print(f"    {len(seen)} messages of history, caught up; now live:")
                caught_up.set()
            for message in response.messages_created.messages:
                seen.append(message)
                if caught_up.is_set():
                    # By the clock of the database, which is that of this machine.
                    latency = (now - message.create_time.ToNanoseconds()) / 1e6
                    latencies.append(latency)
                    who = "user" if message.role == CHAT_MESSAGE_ROLE_USER else "assistant"
                    print(f"    {latency:5.1f} ms  {who:>9}: {message.content[:70]}")

    async with asyncio.TaskGroup() as group:
        reader = group.create_task(read())
        await caught_up.wait()
        history = len(seen)
        for message in messages[-LIVE:]:
            await asyncio.sleep(0.2)
            request = {"session_id": chat.session_id, "message": message}
            created = (await tenant("CreateChatMessage", **request)).message
            tenant.acknowledged[chat.session_id].append(created.sequence)
        await asyncio.sleep(1)  # for whatever comes late, or twice
        reader.cancel()
    expect.check(
        [message.id for message in seen] == [message["id"] for message in messages]
        and [message.sequence for message in seen] == tenant.acknowledged[chat.session_id]
        and history == len(messages) - LIVE,
        f"all {len(messages)} messages came once and in order; from insert to delivery "
        f"{statistics.median(latencies or [0]):.1f} ms (median)",
    )


async def search(expect: Expectations, tenant: Tenant, query: str) -> None:
    print(f'\nSEARCH "{query}" in {tenant.name}')
    before, after = ("\033[1m", "\033[0m") if sys.stdout.isatty() else ("[", "]")
    hits = (await tenant("SearchChatMessages", query=query, page_size=3)).hits
    for hit in hits:
        parts = (f"{before}{p.text}{after}" if p.hit else p.text for p in hit.snippet)
        print(f"    {hit.score:.2f}  {' '.join(''.join(parts).split())}")
    expect.check(
        bool(hits)
        and all(any(part.hit for part in hit.snippet) for hit in hits)
        and all(hit.sequence in tenant.acknowledged.get(hit.session_id, ()) for hit in hits),
        f"the {len(hits)} best, with the words that matched, from {tenant.name}'s own sessions",
    )


async def escalate(expect: Expectations, chat: Chat) -> Any:
    print(f"\nESCALATE the worst rated session of {chat.tenant.name}")
    title = f"rated {chat.rating} of 30: {chat.about.get('prompt', 'no prompt')}"
    session = {"session_id": chat.session_id}
    link = (await chat.tenant("CreateChatTicket", **session, ticket={"title": title})).chat_ticket
    has_ticket = (await chat.tenant("GetChatSession", **session)).session.has_ticket
    ok = has_ticket and link.ticket.title == title
    expect.check(ok, f'has_ticket is true; its ticket: "{title[:75]}"')
    return link


async def rules_1_to_3(
    expect: Expectations, channel: grpc.aio.Channel, chat: Chat, foreign: Chat, files: str
) -> None:
    """Sessions, messages, attachments; `foreign` is of another tenant than `chat`."""
    for what, tenant, session, expected in (
        ("no tenant", Tenant(channel, None), {}, "UNAUTHENTICATED TENANT_REQUIRED"),
        ("an empty tenant", Tenant(channel, ""), {}, "INVALID_ARGUMENT x-tenant-id"),
        ("an unknown status", chat.tenant, {"status": 99}, "INVALID_ARGUMENT session.status"),
    ):
        call = tenant("CreateChatSession", session=session)
        await expect.refused(f"rule 1: a session of {what}", expected, call)

    absent, here, there = str(uuid.uuid4()), chat.session_id, foreign.session_id
    hello = {"content": "hello", "role": CHAT_MESSAGE_ROLE_USER}
    not_there, bad = "NOT_FOUND CHAT_SESSION_NOT_FOUND", "INVALID_ARGUMENT message."
    words = {}
    for what, session_id, wrong, expected in (
        ("to an absent session", absent, {}, not_there),
        (f"to a session of {foreign.tenant.name}", there, {}, not_there),
        ("without content", here, {"content": ""}, bad + "content"),
        ("without a role", here, {"role": 0}, bad + "role"),
        ("with a list for metadata", here, {"metadata_json": "[1]"}, bad + "metadata_json"),
    ):
        call = chat.tenant("CreateChatMessage", session_id=session_id, message=hello | wrong)
        text = await expect.refused(f"rule 2: a message {what}", expected, call)
        words[session_id] = text.replace(session_id, "")
    expect.check(words[absent] == words[there], "rule 2: absent and foreign in the same words")

    message_id, gone = chat.messages()[0]["id"], "FAILED_PRECONDITION ATTACHMENT_URL_NOT_ACCESSIBLE"
    for what, on, url, expected in (
        ("of no message", absent, f"{files}/photo.png", "NOT_FOUND CHAT_MESSAGE_NOT_FOUND"),
        ("without a real URL", message_id, "photo.png", "INVALID_ARGUMENT attachment.file_url"),
        ("that is gone", message_id, f"{files}/gone.png", gone),
        ("of an unknown host", message_id, "https://files.invalid/photo.png", gone),
        ("in our own network", message_id, "https://127.0.0.1/photo.png", gone),
    ):
        call = chat.tenant("CreateChatAttachment", message_id=on, attachment=photo(url))
        await expect.refused(f"rule 3: a file {what}", expected, call)


def photo(url: str) -> dict[str, str]:
    return {"file_url": url, "file_name": "photo.png", "file_type": "image/png"}


async def rules_4_and_5(expect: Expectations, link: Any, tenant: Tenant, doomed: Chat) -> None:
    """Tickets; `link` is one of `tenant`, `doomed` a session of another, which will be deleted."""
    other, session_id, ticket = doomed.tenant, doomed.session_id, str(uuid.uuid4())
    request = {"session": {"status": "CHAT_SESSION_STATUS_ARCHIVED"}}
    archived = (await tenant("CreateChatSession", **request)).session.id
    linked = link.session_id
    for what, who, session, expected in (
        ("another tenant's ticket for a session", other, session_id, "NOT_FOUND TICKET_NOT_FOUND"),
        ("a second ticket for a session", tenant, linked, "ALREADY_EXISTS SESSION_HAS_TICKET"),
        ("a ticket for an archived one", tenant, archived, "FAILED_PRECONDITION SESSION_ARCHIVED"),
    ):
        call = who("CreateChatTicket", session_id=session, ticket_id=link.ticket_id)
        await expect.refused(f"rule 4: {what}", expected, call)

    opened = {"id": ticket, "title": "to be solved"}
    await other("CreateChatTicket", session_id=session_id, ticket=opened)
    await expect.refused(
        "rule 5: deleting a session whose ticket is open",
        "FAILED_PRECONDITION SESSION_HAS_ACTIVE_TICKET",
        other("DeleteChatSession", session_id=session_id),
    )
    await expect.refused(
        "rule 5: deleting a ticket that a session has",
        "FAILED_PRECONDITION TICKET_LINKED",
        other("DeleteTicket", ticket_id=ticket),
    )
    solved = {"id": ticket, "status": "TICKET_STATUS_SOLVED"}
    await other("UpdateTicket", ticket=solved, update_mask={"paths": ["status"]})
    await other("DeleteChatSession", session_id=session_id)
    del other.acknowledged[session_id]
    await expect.refused(
        "rule 5: solved, it is deleted; then its message",
        "NOT_FOUND CHAT_MESSAGE_NOT_FOUND",
        other("GetChatMessage", message_id=doomed.messages()[0]["id"]),
    )


async def rules_6_and_7(expect: Expectations, chat: Chat, files: str) -> None:
    """What the service keeps true by itself."""
    session = {"session_id": chat.session_id}
    message, link = {"message_id": chat.messages()[0]["id"]}, {"chat_ticket_id": str(uuid.uuid4())}
    looks = []
    for rpc, fields in (
        ("GetChatSession", session),
        ("CreateChatAttachment", message | {"attachment": photo(f"{files}/photo.png")}),
        ("CreateChatTicket", session | link | {"ticket": {"title": "please call"}}),
        ("DeleteChatTicket", link),
    ):
        await chat.tenant(rpc, **fields)
        looks.append((await chat.tenant("GetChatSession", **session)).session)
    expect.check(
        [look.has_ticket for look in looks] == [False, False, True, False],
        "rule 6: has_ticket became true with the link and false without it",
    )
    times = [look.update_time.ToNanoseconds() for look in looks]
    expect.check(
        all(earlier < later for earlier, later in itertools.pairwise(times)),
        "rule 7: update_time moved with an accessible file, the link and its end",
    )


def summary(expect: Expectations, db: psycopg.Connection, tenants: Sequence[Tenant]) -> None:
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
    expect.check(
        sorted(stored) == sorted(acknowledged),
        f"the {total:,} messages are those that were acknowledged, each at its sequence",
    )
    expect.check(
        all(a < b for _, _, sequences in stored for a, b in itertools.pairwise(sequences)),
        "in every session the sequences are distinct and increase with the time of creation",
    )


async def serve_file(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A web server with one file: rule 3 needs a URL that is accessible."""
    request = await reader.readuntil(b"\r\n\r\n")
    status = b"200 OK" if request.startswith(b"GET /photo.png ") else b"404 Not Found"
    writer.write(b"HTTP/1.1 " + status + b"\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
    writer.close()


async def show(
    expect: Expectations, port: int, db: psycopg.Connection, web: socket.socket, limit: int | None
) -> None:
    files = f"http://127.0.0.1:{web.getsockname()[1]}"
    async with (
        grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
        await asyncio.start_server(serve_file, sock=web),
    ):
        tenants = [Tenant(channel, name) for name in TENANTS]
        acme, globex, _ = tenants
        chats = read_chats(tenants, limit)
        middling = (chat for chat in chats if 30 <= len(chat.utterances) <= 60)
        grows = next(chat for chat in middling if chat.speakers(last=LIVE) == 2)
        await load(expect, chats, grows)
        await retry(expect, chats[0], db)
        await follow(expect, grows)
        await search(expect, globex, "favorite movie")
        rated = (chat for chat in chats if chat.tenant is acme)
        link = await escalate(expect, min(rated, key=lambda chat: chat.rating))
        print("\nRULES, and what they refuse")
        await rules_1_to_3(expect, channel, chats[0], chats[1], files)
        await rules_4_and_5(expect, link, acme, chats[1])
        await rules_6_and_7(expect, chats[2], files)
        summary(expect, db, tenants)


@contextlib.contextmanager
def serving(expect: Expectations, data: Path, allowed_host: str) -> Iterator[int]:
    """A server process with an embedded PostgreSQL on `data`; gives its port."""
    log = data.with_name("server.log")
    settings = {
        "CHAT_TICKET_LOG_FORMAT": "json",
        # Our own web server has no certificate and a private address; nothing else is opened.
        "CHAT_TICKET_ATTACHMENT_URL_SCHEMES": "https,http",
        "CHAT_TICKET_ATTACHMENT_URL_ALLOWED_HOSTS": allowed_host,
        # One tenant loads all it has as fast as it can.
        "CHAT_TICKET_QUOTAS__TENANT_CALLS_PER_SECOND": "100000",
    }
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "chat_ticket_svc", "serve", "--port", "0", "--embedded", data],
            env={**os.environ, **settings},
            stdout=subprocess.DEVNULL,
            stderr=output,
            start_new_session=True,  # Ctrl-C is for us, who end the server in our turn
        )

    try:
        deadline = time.monotonic() + SERVER_SECONDS
        while not (listening := re.search(r'^.*"listening".*}$', log.read_text(), re.MULTILINE)):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("the server did not start")
            time.sleep(0.05)
        yield json.loads(listening[0])["port"]
    except Exception:
        print("The server's log ends:", log.read_text()[-2000:], sep="\n", file=sys.stderr)
        raise
    finally:
        process.terminate()
        try:
            process.wait(SERVER_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
    troubles = [line for line in log.read_text().splitlines() if '"level": "info"' not in line]
    calm = process.wait() == 0 and not troubles
    expect.check(calm, "\n".join(["the server ended well, with no trouble in its log", *troubles]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", action="store_true", help=f"all chats, not only {CHATS}")
    limit = None if parser.parse_args().all else CHATS

    # In step with stderr when both go to one file; and people write what not every locale has.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True, errors="replace")
    # Every way to be ended is a Ctrl-C, which leaves nothing behind.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: signal.raise_signal(signal.SIGINT))

    began, expect = time.monotonic(), Expectations()
    print("START a server process, with a PostgreSQL of its own in a temporary directory")
    try:
        with (
            tempfile.TemporaryDirectory(prefix="chat-ticket-demo-") as directory,
            socket.create_server(("127.0.0.1", 0)) as web,
        ):
            Path(directory).chmod(0o711)  # PostgreSQL may have to run as somebody else
            data = Path(directory, "data")
            with serving(expect, data, f"127.0.0.1:{web.getsockname()[1]}") as port:
                # Not started here: it knows where the PostgreSQL of the server listens.
                database_url = EmbeddedPostgres(data).url("chat_ticket")
                with psycopg.connect(database_url, autocommit=True) as db:
                    asyncio.run(show(expect, port, db, web, limit))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    result = f"{expect.met} expectations were met, {expect.failed} were not"
    print(f"\n{result}, in {time.monotonic() - began:.0f} s")
    return 1 if expect.failed else 0


if __name__ == "__main__":
    sys.exit(main())
