"""The tenants, the chats and the checks of the demonstration."""

import itertools
import json
import uuid
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from typing import Any

import chitchat_dataset
import grpc.aio
from google.rpc import error_details_pb2, status_pb2

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
from chat_ticket.v1.resources_pb2 import (
    CHAT_MESSAGE_AUTHOR_KIND_END_USER,
    CHAT_MESSAGE_AUTHOR_KIND_HUMAN_AGENT,
    CHAT_MESSAGE_ROLE_ASSISTANT,
    CHAT_MESSAGE_ROLE_USER,
)

CALL_SECONDS = 30


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

    @property
    def user_id(self) -> str:
        """The person that the dataset knows by this id: the first speaker."""
        return self.utterances[0]["sender"] if self.utterances else ""

    def session(self) -> dict[str, Any]:
        rated = "yes" if "ratings" in self.about else "no"
        return {
            "id": self.session_id,
            "user_id": self.user_id,
            "title": " ".join(self.about.get("prompt", "").split()),
            "labels": {"rated": rated, "month": self.about["start"][:7]},
        }

    def speakers(self, last: int = 0) -> int:
        return len({utterance["sender"] for utterance in self.utterances[-last:]})

    def messages(self) -> list[dict[str, Any]]:
        messages = []
        for number, utterance in enumerate(self.utterances):
            metadata: dict[str, Any] = {"sent_at": utterance["timestamp"]}
            if number == 0:
                metadata["chat"] = self.about  # with its ratings: sessions have no metadata
            is_user = utterance["sender"] == self.user_id
            author = {
                "kind": CHAT_MESSAGE_AUTHOR_KIND_END_USER
                if is_user
                else CHAT_MESSAGE_AUTHOR_KIND_HUMAN_AGENT,
                "id": utterance["sender"],
            }
            message = {
                "id": str(uuid.uuid5(uuid.NAMESPACE_OID, f"{self.about['id']} {number}")),
                "role": CHAT_MESSAGE_ROLE_USER if is_user else CHAT_MESSAGE_ROLE_ASSISTANT,
                "author": author,
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
