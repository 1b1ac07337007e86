"""This service, called with gRPC's Python client.

Every message has an id chosen by the client, so that creates could be retried.
"""

from collections.abc import Sequence
from typing import Any

import grpc.aio
import uuid_utils

from benchmarks.peers_worker import Utterance, run
from chat_ticket.v1.chat_message_pb2 import (
    BatchCreateChatMessagesRequest,
    CreateChatMessageRequest,
    ListChatMessagesRequest,
)
from chat_ticket.v1.chat_message_pb2_grpc import ChatMessageServiceStub
from chat_ticket.v1.chat_session_pb2 import CreateChatSessionRequest
from chat_ticket.v1.chat_session_pb2_grpc import ChatSessionServiceStub
from chat_ticket.v1.resources_pb2 import (
    CHAT_MESSAGE_ROLE_ASSISTANT,
    CHAT_MESSAGE_ROLE_USER,
    ChatMessage,
    ChatSession,
)

BATCH = 500  # the limit of BatchCreateChatMessages
ROLE = {"user": CHAT_MESSAGE_ROLE_USER, "assistant": CHAT_MESSAGE_ROLE_ASSISTANT}
SAID_BY = {role: name for name, role in ROLE.items()}


class Ours:
    async def open(self, address: str) -> None:
        channel = grpc.aio.insecure_channel(address)
        self._sessions = ChatSessionServiceStub(channel)
        self._messages = ChatMessageServiceStub(channel)
        self._tenant: Any = {"metadata": [("x-tenant-id", "acme")]}

    async def begin(self, conversation: str) -> None:
        request = CreateChatSessionRequest(session=ChatSession(id=conversation))
        await self._sessions.CreateChatSession(request, **self._tenant)

    async def add(self, conversation: str, utterances: Sequence[Utterance]) -> None:
        messages = [_message(role, text) for role, text in utterances]
        if len(messages) == 1:
            await self._create(conversation, messages[0])
            return
        for start in range(0, len(messages), BATCH):
            request = BatchCreateChatMessagesRequest(
                session_id=conversation, messages=messages[start : start + BATCH]
            )
            await self._messages.BatchCreateChatMessages(request, **self._tenant)

    async def _create(self, conversation: str, message: ChatMessage) -> None:
        request = CreateChatMessageRequest(session_id=conversation, message=message)
        await self._messages.CreateChatMessage(request, **self._tenant)

    async def add_twice(self, conversation: str, utterance: Utterance) -> None:
        message = _message(*utterance)
        for _ in range(2):
            await self._create(conversation, message)

    async def read(self, conversation: str) -> list[Utterance]:
        request = ListChatMessagesRequest(session_id=conversation)
        return [
            (SAID_BY[message.role], message.content)
            async for response in self._messages.ListChatMessages(request, **self._tenant)
            for message in response.messages
        ]


def _message(role: str, text: str) -> ChatMessage:
    return ChatMessage(id=str(uuid_utils.uuid7()), role=ROLE[role], content=text)


if __name__ == "__main__":
    run(Ours())
