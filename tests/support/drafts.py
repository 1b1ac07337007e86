"""Streams that write drafts, and short calls on drafts."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
from grpc._cython import cygrpc  # type: ignore[attr-defined] # has no stubs

from chat_ticket.v1 import resources_pb2 as r
from chat_ticket.v1.chat_draft_pb2 import (
    GetChatDraftRequest,
    ListChatDraftsRequest,
    StopChatDraftRequest,
    WriteChatDraftRequest,
    WriteChatDraftResponse,
)
from support.client import Api, an_id
from support.messages import ASSISTANT

Start = WriteChatDraftRequest.Start
Append = WriteChatDraftRequest.Append
Finish = WriteChatDraftRequest.Finish

COMPLETE = r.CHAT_MESSAGE_STATE_COMPLETE
INCOMPLETE = r.CHAT_MESSAGE_STATE_INCOMPLETE
STOPPED = r.CHAT_MESSAGE_STATE_STOPPED


class DraftStream:
    """A stream of WriteChatDraft, how much it has sent, and what was acknowledged.

    What ends the stream is learnt by reading: a write to a stream that has ended does nothing.
    """

    def __init__(self, call: Any, draft_id: str = ""):
        self.call = call
        self.draft_id = draft_id
        # In bytes of UTF-8: where the next text begins, and what is durable.
        self.offset = 0
        self.written = 0
        # Of the session, when the stream began.
        self.revision = -1

    async def send(self, **request: Any) -> None:
        """Send a request: `start`, `append` or `finish`."""
        data = WriteChatDraftRequest(**request).SerializeToString()
        # Not `call.write`: on a stream that has just ended, it replaces the status by INTERNAL.
        await self.call._metadata_sent.wait()
        if not self.call.done():
            with contextlib.suppress(cygrpc.InternalError):
                await self.call._cython_call.send_serialized_message(data)

    async def append(self, text: str = "", offset: int | None = None) -> None:
        """Send text, by default after all that was sent. Does not wait for its acknowledgement."""
        if offset is None:
            offset = self.offset
        self.offset = max(self.offset, offset + len(text.encode()))
        await self.send(append=Append(offset=offset, text=text))

    async def write(self, text: str) -> None:
        """Append text, and wait until it is durable. Without text, until the lease is renewed."""
        await self.append(text)
        if not text:
            await self.until("written")
        await self.until_written(self.offset)

    async def next(self, timeout: float = 10) -> WriteChatDraftResponse:
        """The next response. Raises the error that the stream has ended with."""
        async with asyncio.timeout(timeout):
            response = await self.call.read()
        assert response is not grpc.aio.EOF, "the stream has ended"
        if response.HasField("started"):
            self.offset = self.written = response.started.length
            self.revision = response.started.revision
        elif response.HasField("written"):
            assert response.written.length >= self.written, "what is durable stays"
            self.written = response.written.length
        return response  # type: ignore[no-any-return]

    async def until(self, kind: str) -> WriteChatDraftResponse:
        """The first response of this kind. Before it comes nothing but acknowledgements."""
        while True:
            response = await self.next()
            if response.WhichOneof("response") == kind:
                return response
            assert response.HasField("written"), response

    async def until_written(self, length: int) -> None:
        while self.written < length:
            await self.until("written")

    async def finish(self, **fields: Any) -> r.ChatMessage:
        """Finish the draft. Returns the message, which is empty if the draft was."""
        await self.send(finish=Finish(**fields))
        message = (await self.until("finished")).finished.message
        await self.assert_ended()
        return message

    async def until_stopped(self) -> r.ChatMessage:
        """Wait until somebody else has ended the draft. Returns the message that it became."""
        message = (await self.until("stopped")).stopped.message
        await self.assert_ended()
        return message

    async def assert_ended(self) -> None:
        """The stream ends with OK, and without another response."""
        async with asyncio.timeout(10):
            assert await self.call.read() is grpc.aio.EOF
            assert await self.call.code() is grpc.StatusCode.OK

    async def until_error(self) -> None:
        """Read until the stream fails. Raises its error."""
        while True:
            await self.next()


@contextlib.asynccontextmanager
async def unstarted(api: Api, **call: Any) -> AsyncIterator[DraftStream]:
    """A stream that has sent nothing."""
    stream = DraftStream(api.drafts.WriteChatDraft(**call))
    try:
        yield stream
    finally:
        stream.call.cancel()


@contextlib.asynccontextmanager
async def writing(
    api: Api, session_id: str, draft_id: str = "", **fields: Any
) -> AsyncIterator[DraftStream]:
    """A stream that writes a draft, of an assistant by default: it has begun or taken over.

    `fields` are those of `start` and of its draft.
    """
    async with unstarted(api) as stream:
        stream.draft_id = draft_id or an_id()
        await stream.send(start=a_start(session_id, stream.draft_id, **fields))
        response = await stream.next()
        assert response.HasField("started"), response
        yield stream


def a_start(session_id: str, draft_id: str, **fields: Any) -> Start:
    options = {
        name: fields.pop(name) for name in ("exclusive", "expected_revision") & fields.keys()
    }
    draft = r.ChatDraft(**{"id": draft_id, "role": ASSISTANT, **fields})
    return Start(session_id=session_id, draft=draft, **options)


async def start_finished(api: Api, session_id: str, draft_id: str, **fields: Any) -> r.ChatMessage:
    """Start a draft that is a message already. Returns the message."""
    async with unstarted(api) as stream:
        await stream.send(start=a_start(session_id, draft_id, **fields))
        response = await stream.next()
        assert response.HasField("finished"), response
        await stream.assert_ended()
    return response.finished.message


async def write_message(
    api: Api, session_id: str, text: str = "hello", draft_id: str = "", **fields: Any
) -> r.ChatMessage:
    """A message that was written as a draft. `fields` are those of `start` and of its draft."""
    async with writing(api, session_id, draft_id, **fields) as stream:
        await stream.append(text)
        return await stream.finish()


async def leave_draft(
    api: Api, session_id: str, text: str = "", draft_id: str = "", **fields: Any
) -> str:
    """An open draft with this text, whose stream has been cancelled. Returns its id.

    `fields` are those of `start` and of its draft.
    """
    async with writing(api, session_id, draft_id, **fields) as stream:
        await stream.write(text)
    return stream.draft_id


async def stop_draft(api: Api, draft_id: str) -> r.ChatMessage:
    """Stop a draft. Returns the message, which is empty if the draft was."""
    return (await api.drafts.StopChatDraft(StopChatDraftRequest(draft_id=draft_id))).message


async def get_draft(api: Api, draft_id: str) -> r.ChatDraft:
    return (await api.drafts.GetChatDraft(GetChatDraftRequest(draft_id=draft_id))).draft


async def list_drafts(api: Api, session_id: str) -> list[r.ChatDraft]:
    response = await api.drafts.ListChatDrafts(ListChatDraftsRequest(session_id=session_id))
    return list(response.drafts)
