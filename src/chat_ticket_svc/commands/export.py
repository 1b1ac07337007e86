"""`chat-ticket-svc export`: a tenant, or one of its sessions, as JSON Lines.

Each line is an object with one field, which says what it is: `ticket`, `chatSession`, `chatMessage`
or `chatTicket`, the messages of chat_ticket.v1 in the JSON mapping of protobuf, so that every
protobuf library reads them back. Tickets come first, as others refer to them; then the sessions,
from the oldest on, each followed by its messages in their order, with their attachments, and by its
chat ticket. A session has the messages that it had when its turn came.
"""

import argparse
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Iterator
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
from chat_ticket_svc.store.sessions import Session

PAGE = 500


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tenant", type=arguments.tenant_id, required=True, metavar="ID")
    parser.add_argument(
        "--session", type=arguments.uuid, metavar="ID", help="export only this session"
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="appears under this name when it is complete (default: standard output)",
    )


def run(options: argparse.Namespace) -> int:
    return run_on_database(
        lambda db: _export_to(db, options.tenant, options.session, options.output)
    )


async def _export_to(
    db: Database, tenant_id: str, session_id: str | None, output: Path | None
) -> int:
    opened = contextlib.nullcontext(sys.stdout) if output is None else atomic_write(output)
    try:
        with opened as file:
            if not await export(db, tenant_id, session_id, file):
                raise ConfigurationError(f"the tenant {tenant_id} has nothing")
    except OSError as error:
        if output is None:  # or Python reports at exit that it cannot flush
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):  # the reader, such as head, has closed the pipe
            return 128 + signal.SIGPIPE
        place = output or "the standard output"
        print(f"chat-ticket-svc: cannot write {place}: {error.strerror}", file=sys.stderr)
        return 1
    return 0


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[TextIO]:
    """A file that takes its name when it is complete. A device or pipe is written directly."""
    if path.exists() and not path.is_file():
        with path.open("w", encoding="utf-8") as file:
            yield file
        return
    path = path.resolve()  # a link stays one
    part = path.with_name(f"{path.name}.part")
    try:
        with part.open("w", encoding="utf-8") as file:
            yield file
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


async def export(db: Database, tenant_id: str, session_id: str | None, output: TextIO) -> int:
    """Write the lines, and return how many there are; NotFoundError for a session not there."""
    lines = 0
    if session_id is None:
        counted = await tenants.count(db, tenant_id)
        total = counted.tickets + counted.sessions + counted.messages + counted.chat_tickets
        items = _tenant(db, tenant_id)
    else:
        session = await sessions.get(db, tenant_id, session_id)
        total = None  # a revision is no number of messages
        items = _session(db, session)
    with tqdm(total=total, unit=" lines", unit_scale=True, disable=None, leave=False) as bar:
        async for name, message in items:
            # As the mapping has it, and on one line, however long.
            line = {name: MessageToDict(message)}
            output.write(json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n")
            bar.update()
            lines += 1
    output.flush()
    return lines


async def _tenant(db: Database, tenant_id: str) -> AsyncIterator[tuple[str, Message]]:
    last_ticket = None
    while page := await tenants.oldest_tickets(db, tenant_id, last_ticket):
        for ticket in page:
            yield "ticket", convert.ticket(ticket)
        last_ticket = page[-1]
    last = None
    while found := await tenants.oldest_sessions(db, tenant_id, last):
        for session in found:
            with contextlib.suppress(NotFoundError):  # it was deleted since
                async for item in _session(db, session):
                    yield item
        last = found[-1]


async def _session(db: Database, session: Session) -> AsyncIterator[tuple[str, Message]]:
    yield "chatSession", convert.session(session)
    after, more = 0, True
    while more:
        page = await message_listing.page(
            db,
            session.tenant_id,
            session.id,
            first=False,
            after=after,
            before=session.revision + 1,
            descending=False,
            roles=None,
            limit=PAGE,
        )
        response = ListChatMessagesResponse.FromString(convert.messages(session.id, page.rows))
        for message in response.messages:
            yield "chatMessage", message
            after = message.sequence
        more = page.more
    link = await tickets.link_of_session(db, session.tenant_id, session.id)
    if link is not None:
        yield "chatTicket", convert.chat_ticket(link)
