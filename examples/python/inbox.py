"""An agent's inbox: a live table of chats, the one that changed last on top.

Start the service by `make run`, and then, in another terminal:

    .venv/bin/python examples/python/inbox.py --label team=billing --with-ticket

It shows the chats that exist, and then follows what happens to them, until Ctrl-C. `--once` prints
the table and ends. A program of your own needs the packages chat-ticket-client and rich.
"""

import argparse
import asyncio
import contextlib
import heapq
from collections.abc import Callable
from datetime import UTC

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from chat_ticket.client import AsyncChatTicketClient
from chat_ticket.errors import OutOfRangeError
from chat_ticket.v1.chat_session_pb2 import WatchChatSessionsResponse
from chat_ticket.v1.resources_pb2 import ChatSession, ChatSessionStatus


class Inbox:
    """The sessions that match, as they were told last."""

    def __init__(self) -> None:
        self.sessions: dict[str, ChatSession] = {}
        self.is_caught_up = False

    def handle(self, event: WatchChatSessionsResponse.Event) -> None:
        match event.WhichOneof("event"):
            case "session":
                # Also when its revision is lower than before: then the database has lost changes.
                self.sessions[event.session.id] = event.session
            case "session_deleted":
                self.sessions.pop(event.session_deleted.session_id, None)
            case "left":
                self.sessions.pop(event.left.session_id, None)
            case "caught_up":
                self.is_caught_up = True

    def table(self, rows: int) -> Table:
        """The sessions that changed last."""
        title = f"{len(self.sessions)} chats" if self.is_caught_up else "reading …"
        table = Table("Changed", "Chat", "User", "Status", "Ticket", "Labels", title=title)
        for session in heapq.nlargest(rows, self.sessions.values(), key=changed):
            table.add_row(*map(Text, cells(session)))
        return table


def changed(session: ChatSession) -> int:
    return session.update_time.ToNanoseconds()


def cells(session: ChatSession) -> list[str]:
    names = ChatSessionStatus.DESCRIPTOR.values_by_number
    status = names[session.status].name if session.status in names else str(session.status)
    return [
        f"{session.update_time.ToDatetime(UTC).astimezone():%d %b %H:%M:%S}",
        session.title or session.id,
        session.user_id,
        status.removeprefix("CHAT_SESSION_STATUS_").lower(),
        "yes" if session.has_ticket else "",
        ", ".join(f"{key}={value}" for key, value in sorted(session.labels.items())),
    ]


async def follow(arguments: argparse.Namespace, show: Callable[[Inbox], None]) -> Inbox:
    """Show the inbox after each change. With `--once`, return when it is complete."""
    # For a remote server add token=... and credentials=grpc.ssl_channel_credentials().
    async with AsyncChatTicketClient(arguments.address, tenant="acme") as client:
        while True:
            inbox = Inbox()
            try:
                async for response in client.follow_sessions(
                    from_beginning=True,
                    has_ticket=True if arguments.with_ticket else None,
                    labels=dict(arguments.label),
                ):
                    for event in response.events:
                        inbox.handle(event)
                    show(inbox)
                    if arguments.once and inbox.is_caught_up:
                        return inbox
            except OutOfRangeError:
                # The database was restored, and more may be lost than the client can tell.
                continue


def label(text: str) -> tuple[str, str]:
    key, _, value = text.partition("=")
    return key, value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--address", default="localhost:50051")
    parser.add_argument("--label", action="append", type=label, default=[], metavar="KEY=VALUE")
    parser.add_argument("--with-ticket", action="store_true")
    parser.add_argument("--once", action="store_true")
    arguments = parser.parse_args()
    console = Console()
    if arguments.once:
        inbox = asyncio.run(follow(arguments, lambda _: None))
        console.print(inbox.table(len(inbox.sessions)))
        return
    live = Live(console=console, screen=True, auto_refresh=False)
    with contextlib.suppress(KeyboardInterrupt), live:

        def show(inbox: Inbox) -> None:
            live.update(inbox.table(console.height - 5), refresh=True)

        asyncio.run(follow(arguments, show))


if __name__ == "__main__":
    main()
