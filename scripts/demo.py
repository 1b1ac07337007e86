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
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc.aio
import psycopg
from demo_chats import Chat, Checks, Tenant, read_chats, write_request
from demo_rules import rules_1_to_3, rules_4_and_5, rules_6_and_8
from demo_writes import write_together
from tqdm import tqdm

from chat_ticket.v1.resources_pb2 import (
    CHAT_MESSAGE_ROLE_USER,
    TICKET_STATUS_OPEN,
    TICKET_STATUS_SOLVED,
)
from chat_ticket_svc.embedded import EmbeddedPostgres

TENANTS = ("acme", "globex", "initech")
CHATS = 300  # without --all
CONCURRENT_SESSIONS = 12
BATCH = 500  # the limit of BatchCreateChatMessages
LIVE_MESSAGES = 8  # the last messages of one chat, which are written while the session is watched
ANSWER = "Your parcel left the warehouse on Monday, and will be with you tomorrow before noon."
SERVER_SECONDS = 60  # to start, and to stop


async def load(checks: Checks, chats: list[Chat], watched: Chat) -> None:
    tenants = ", ".join(TENANTS)
    print(f"LOAD {len(chats):,} chats as sessions of {tenants}, {CONCURRENT_SESSIONS} at a time")
    total = sum(len(chat.utterances) for chat in chats) - LIVE_MESSAGES
    remaining = iter(chats)

    async def work() -> None:
        for chat in remaining:  # shared: each worker takes the next one
            await chat.tenant("CreateChatSession", session=chat.session())
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


async def list_chats(checks: Checks, chats: list[Chat]) -> None:
    """By the user with the most chats, and by labels."""
    tenant = chats[0].tenant
    mine = [chat for chat in chats if chat.tenant is tenant]
    [(user_id, _)] = Counter(chat.user_id for chat in mine if chat.user_id).most_common(1)
    print(f"\nLIST the sessions of {tenant.name} by their user and by their labels")

    async def listed(**filters: Any) -> set[str]:
        found, token = set(), ""
        while True:
            page = await tenant("ListChatSessions", page_token=token, **filters)
            found |= {session.id for session in page.sessions}
            if not (token := page.next_page_token):
                return found

    of_user = {chat.session_id for chat in mine if chat.user_id == user_id}
    checks.check(
        await listed(user_id=user_id) == of_user,
        f"user {user_id} has {len(of_user)} of the {len(mine):,} sessions",
    )
    labels = mine[0].session()["labels"]
    labelled = {chat.session_id for chat in mine if chat.session()["labels"] == labels}
    checks.check(
        await listed(labels=labels) == labelled,
        f"{len(labelled)} sessions have the labels {labels}",
    )


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
    await solve(checks, chat, link)
    return link


async def solve(checks: Checks, chat: Chat, link: Any) -> None:
    """Solve the ticket while somebody follows its session."""
    statuses = []
    async for response in chat.tenant("WatchChatSession", session_id=chat.session_id):
        if response.HasField("ticket"):
            statuses.append(response.ticket.ticket.status)
            if statuses[-1] == TICKET_STATUS_SOLVED:
                break
        elif response.HasField("caught_up"):
            ticket = {"id": link.ticket_id, "status": TICKET_STATUS_SOLVED}
            await chat.tenant("UpdateTicket", ticket=ticket, update_mask={"paths": ["status"]})
    checks.check(
        statuses == [TICKET_STATUS_OPEN, TICKET_STATUS_SOLVED],
        "a follower of the session saw the ticket open, and then solved",
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
        await list_chats(checks, chats)
        await watch(checks, watched_chat)
        await draft(checks, acme)
        await write_together(checks, acme)
        await search(checks, globex, "favorite movie")
        rated = (chat for chat in chats if chat.tenant is acme)
        link = await escalate(checks, min(rated, key=lambda chat: chat.rating))
        print("\nRULES and the errors of calls that break them")
        await rules_1_to_3(checks, channel, chats[0], chats[1], files)
        await rules_4_and_5(checks, link, acme, chats[1])
        await rules_6_and_8(checks, chats[2], files)
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
