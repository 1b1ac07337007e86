"""`chat-ticket-svc export`: writes a tenant, or one of its users or sessions, as JSON Lines.

Each line is an object with one field, which names the type of its value: `ticket`, `chatSession`,
`chatMessage` or `chatTicket`. The values are messages of chat_ticket.v1 in protobuf's JSON
mapping, which every protobuf library can parse.

Tickets come first, because chat tickets refer to them. Then come the sessions, oldest first. Each
is followed by its messages, in order and with their attachments, and by its chat ticket. A session
is one snapshot together with all that follows it. The export is not: each session is read
separately.

The only line break within the file is the one at the end of each line. Other characters that some
readers take for line breaks, such as U+2028, are escaped.
"""

import argparse
import contextlib
import io
import json
import sys
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import TextIO

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from tqdm import tqdm

from chat_ticket.v1.chat_message_pb2 import ListChatMessagesResponse
from chat_ticket_svc.commands import arguments
from chat_ticket_svc.commands.migrated_database import run_on_database
from chat_ticket_svc.config import ConfigurationError
from chat_ticket_svc.errors import NotFoundError
from chat_ticket_svc.services import convert
from chat_ticket_svc.store import message_listing, sessions, tenants, tickets
from chat_ticket_svc.store.database import Database

Items = AsyncGenerator[tuple[str, Message], None]

PAGE_SIZE = 500

# JSON escapes the line breaks below U+0020, and these are left to us: see str.splitlines.
LINE_BREAKS = {ord(char): f"\\u{ord(char):04x}" for char in "\x85\u2028\u2029"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_required_tenant(parser, "the tenant to export")
    part = parser.add_mutually_exclusive_group()
    arguments.add_user(part, "export only the sessions of this user, and their tickets")
    part.add_argument(
        "--session", type=arguments.uuid, metavar="ID", help="export only this session"
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="the output file, created only when the export is complete (default: standard output)",
    )


def run(options: argparse.Namespace) -> int:
    return run_on_database(
        lambda db: _export_to_file(
            db, options.tenant, options.user, options.session, options.output
        )
    )


async def _export_to_file(
    db: Database,
    tenant_id: str,
    user_id: str | None,
    session_id: str | None,
    output: Path | None,
) -> int:
    if isinstance(sys.stdout, io.TextIOWrapper):  # JSON is UTF-8, whatever the terminal's encoding
        sys.stdout.reconfigure(encoding="utf-8")
    target = contextlib.nullcontext(sys.stdout) if output is None else atomic_write(output)
    try:
        with target as file:
            if not await export(db, tenant_id, user_id, session_id, file):
                raise ConfigurationError(f"{arguments.describe(tenant_id, user_id)} has no data")
    except OSError as error:
        if output is None:  # the command line reports it, as for every command
            raise
        print(f"chat-ticket-svc: cannot write {output}: {error.strerror}", file=sys.stderr)
        return 1
    return 0


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[TextIO]:
    """A file that appears under `path` only when it is complete. Devices and pipes are written to
    directly.
    """
    if path.exists() and not path.is_file():
        with path.open("w", encoding="utf-8") as file:
            yield file
        return
    path = path.resolve()  # a symbolic link is kept
    part = path.with_name(f"{path.name}.part")
    try:
        with part.open("w", encoding="utf-8") as file:
            yield file
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


async def export(
    db: Database,
    tenant_id: str,
    user_id: str | None,
    session_id: str | None,
    output: TextIO,
) -> int:
    """Write the lines and return their number. Raises NotFoundError if the session is absent."""
    lines = 0
    if session_id is None:
        counts = await tenants.count(db, tenant_id, user_id)
        total = counts.tickets + counts.sessions + counts.messages + counts.chat_tickets
        items = _messages_of_all(db, tenant_id, user_id)
    else:
        total = None  # unknown: a revision does not count messages
        items = _session_messages(db, tenant_id, session_id)
    with tqdm(total=total, unit=" lines", unit_scale=True, disable=None, leave=False) as bar:
        async with contextlib.aclosing(items):
            async for name, message in items:
                line = {name: MessageToDict(message)}
                text = json.dumps(line, ensure_ascii=False, separators=(",", ":"))
                output.write(text.translate(LINE_BREAKS) + "\n")
                bar.update()
                lines += 1
    output.flush()
    return lines


async def _messages_of_all(db: Database, tenant_id: str, user_id: str | None) -> Items:
    last_ticket = None
    while page := await tenants.oldest_tickets(db, tenant_id, user_id, last_ticket):
        for ticket in page:
            yield "ticket", convert.ticket(ticket)
        last_ticket = page[-1]
    last_session = None
    while batch := await tenants.oldest_sessions(db, tenant_id, user_id, last_session):
        for session in batch:
            with contextlib.suppress(NotFoundError):  # deleted meanwhile
                items = _session_messages(db, tenant_id, session.id)
                async with contextlib.aclosing(items):
                    async for item in items:
                        yield item
        last_session = batch[-1]


async def _session_messages(db: Database, tenant_id: str, session_id: str) -> Items:
    async with db.snapshot() as snapshot:
        session = await sessions.get_in(snapshot, tenant_id, session_id)
        yield "chatSession", convert.session(session)
        after, has_more = 0, True
        while has_more:
            page = await message_listing.page(
                snapshot,
                tenant_id,
                session_id,
                first=False,
                after=after,
                before=session.revision + 1,
                descending=False,
                roles=None,
                limit=PAGE_SIZE,
            )
            response = ListChatMessagesResponse.FromString(convert.messages(session_id, page.rows))
            for message in response.messages:
                yield "chatMessage", message
                after = message.sequence
            has_more = page.more
        chat_ticket = await tickets.chat_ticket_of_session(snapshot, tenant_id, session_id)
        if chat_ticket is not None:
            yield "chatTicket", convert.chat_ticket(chat_ticket)
