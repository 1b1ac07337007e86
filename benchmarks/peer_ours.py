"""This service, called with its Python client as the documentation uses it.

Every message has an id chosen by the client, so that `retry` can repeat its create.
"""

from collections.abc import Sequence

import uuid_utils

from benchmarks.peers_worker import Utterance, run
from chat_ticket.client import AsyncChatTicketClient
from chat_ticket.v1.chat_message_pb2 import (
    BatchCreateChatMessagesRequest,
    CreateChatMessageRequest,
)
from chat_ticket.v1.chat_session_pb2 import CreateChatSessionRequest
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
        self._client = AsyncChatTicketClient(address, tenant="acme")

    async def begin(self, conversation: str) -> None:
        request = CreateChatSessionRequest(session=ChatSession(id=conversation))
        await self._client.retry(self._client.sessions.CreateChatSession, request)

    async def add(self, conversation: str, utterances: Sequence[Utterance]) -> None:
        messages = [_message(role, text) for role, text in utterances]
        if len(messages) == 1:
            await self._create(conversation, messages[0])
            return
        for start in range(0, len(messages), BATCH):
            request = BatchCreateChatMessagesRequest(
                session_id=conversation, messages=messages[start : start + BATCH]
            )
            await self._client.retry(self._client.messages.BatchCreateChatMessages, request)

    async def _create(self, conversation: str, message: ChatMessage) -> None:
        request = CreateChatMessageRequest(session_id=conversation, message=message)
        await self._client.retry(self._client.messages.CreateChatMessage, request)

    async def add_twice(self, conversation: str, utterance: Utterance) -> None:
        message = _message(*utterance)
        for _ in range(2):
            await self._create(conversation, message)

    async def read(self, conversation: str) -> list[Utterance]:
        return [
            (SAID_BY[message.role], message.content)
            async for message in self._client.messages_of(conversation)
        ]


def _message(role: str, text: str) -> ChatMessage:
    return ChatMessage(id=str(uuid_utils.uuid7()), role=ROLE[role], content=text)


if __name__ == "__main__":
    run(Ours())
