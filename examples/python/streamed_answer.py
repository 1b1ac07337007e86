"""An answer that others read while a model writes it, and that somebody stops.

Start the service by `make run`, and then, in another terminal:

    .venv/bin/python examples/python/streamed_answer.py [ADDRESS]

ADDRESS is localhost:50051 by default. The model is a fake, which never comes to an end. A reader is
cut off, comes back, and has missed nothing. At last another process stops the answer: this program
again, as `streamed_answer.py ADDRESS stop DRAFT_ID`.
"""

import asyncio
import itertools
import sys
import uuid
from collections.abc import AsyncIterator

from chat_ticket.client import AsyncChatTicketClient
from chat_ticket.v1.chat_draft_pb2 import StopChatDraftRequest
from chat_ticket.v1.chat_session_pb2 import CreateChatSessionRequest
from chat_ticket.v1.resources_pb2 import (
    CHAT_MESSAGE_ROLE_ASSISTANT,
    ChatMessage,
    ChatMessageState,
    ChatSession,
)


def connect(address: str) -> AsyncChatTicketClient:
    # For a remote server add token=... and credentials=grpc.ssl_channel_credentials().
    return AsyncChatTicketClient(address, tenant="acme")


async def generate() -> AsyncIterator[str]:
    """A model that streams words, and does not know when to stop."""
    try:
        for number in itertools.count(1):
            await asyncio.sleep(0.03)
            yield f"{number} sheep, "
    finally:
        # Here the stream of a real model is closed, so that it costs nothing more.
        print("model: closed")


async def answer(client: AsyncChatTicketClient, session_id: str) -> ChatMessage | None:
    """Write what the model says, until it ends or somebody stops it."""
    async with client.write(session_id, role=CHAT_MESSAGE_ROLE_ASSISTANT, exclusive=True) as draft:
        async for words in draft.until_stopped(generate()):
            await draft.append(words)
    return draft.message


class Reader:
    """What somebody sees on a screen: the text of the draft, and at last the message."""

    def __init__(self) -> None:
        self.revision = 0
        self.draft_id = ""
        self.text = b""
        self.message: ChatMessage | None = None

    async def read(self, address: str, session_id: str, *, more: int) -> None:
        """Read so many more bytes, or up to the message."""
        async with connect(address) as client:
            enough = len(self.text) + more
            async for event in client.watch(session_id, self.revision, include_drafts=True):
                match event.WhichOneof("event"):
                    case "draft":  # as a whole: when it begins, and when we come back
                        self.draft_id = event.draft.id
                        self.text = event.draft.content.encode()
                    case "draft_appended":
                        appended = event.draft_appended
                        self.text = self.text[: appended.offset] + appended.text.encode()
                    case "messages_created":
                        self.message = event.messages_created.messages[0]
                self.revision = event.revision
                if self.message or len(self.text) >= enough:
                    return


async def stop(address: str, draft_id: str) -> None:
    async with connect(address) as client:
        request = StopChatDraftRequest(draft_id=draft_id)
        await client.retry(client.drafts.StopChatDraft, request)


async def main(address: str) -> None:
    async with connect(address) as client:
        session = ChatSession(id=str(uuid.uuid4()))
        request = CreateChatSessionRequest(session=session)
        await client.retry(client.sessions.CreateChatSession, request)

        answering = asyncio.create_task(answer(client, session.id))
        reader = Reader()
        await reader.read(address, session.id, more=100)
        print(f"reader: {reader.text[:24].decode()}…")
        print("reader: cut off")
        before = reader.text
        await asyncio.sleep(0.2)
        await reader.read(address, session.id, more=100)
        print(f"reader: back, with all that came before: {reader.text.startswith(before)}")

        command = [sys.executable, __file__, address, "stop", reader.draft_id]
        stopping = await asyncio.create_subprocess_exec(*command)
        message = await answering
        await stopping.wait()
        if message is not None:
            print(f"writer: {ChatMessageState.Name(message.state)}")
        await reader.read(address, session.id, more=sys.maxsize)
        print(f"reader: the message is that of the writer: {reader.message == message}")


if __name__ == "__main__":
    match sys.argv[1:]:
        case [address, "stop", draft_id]:
            asyncio.run(stop(address, draft_id))
        case [address]:
            asyncio.run(main(address))
        case _:
            asyncio.run(main("localhost:50051"))
