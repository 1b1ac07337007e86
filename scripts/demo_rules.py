"""The part of the demonstration that breaks the rules of the data model."""

import itertools
import uuid
from typing import Any

import grpc.aio
from demo_chats import Chat, Checks, Tenant

from chat_ticket.v1.resources_pb2 import CHAT_MESSAGE_ROLE_USER


async def rules_1_to_3(
    checks: Checks, channel: grpc.aio.Channel, chat: Chat, other_chat: Chat, files: str
) -> None:
    """The rules of sessions, messages and attachments. `other_chat` belongs to another tenant."""
    for what, tenant, session, expected in (
        ("no tenant", Tenant(channel, None), {}, "UNAUTHENTICATED TENANT_REQUIRED"),
        ("an empty tenant", Tenant(channel, ""), {}, "INVALID_ARGUMENT x-tenant-id"),
        ("an unknown status", chat.tenant, {"status": 99}, "INVALID_ARGUMENT session.status"),
    ):
        call = tenant("CreateChatSession", session=session)
        await checks.check_rejected(f"rule 1: a session of {what}", expected, call)

    absent, here, there = str(uuid.uuid4()), chat.session_id, other_chat.session_id
    hello = {"content": "hello", "role": CHAT_MESSAGE_ROLE_USER}
    not_there, bad = "NOT_FOUND CHAT_SESSION_NOT_FOUND", "INVALID_ARGUMENT message."
    errors = {}
    for what, session_id, wrong, expected in (
        ("to an absent session", absent, {}, not_there),
        (f"to a session of {other_chat.tenant.name}", there, {}, not_there),
        ("without content", here, {"content": ""}, bad + "content"),
        ("without a role", here, {"role": 0}, bad + "role"),
        ("with a list as metadata", here, {"metadata_json": "[1]"}, bad + "metadata_json"),
    ):
        call = chat.tenant("CreateChatMessage", session_id=session_id, message=hello | wrong)
        text = await checks.check_rejected(f"rule 2: a message {what}", expected, call)
        errors[session_id] = text.replace(session_id, "")
    checks.check(
        errors[absent] == errors[there], "rule 2: same error for absent and foreign sessions"
    )

    message_id, gone = chat.messages()[0]["id"], "FAILED_PRECONDITION ATTACHMENT_URL_NOT_ACCESSIBLE"
    for what, on, url, expected in (
        ("of no message", absent, f"{files}/photo.png", "NOT_FOUND CHAT_MESSAGE_NOT_FOUND"),
        ("without a valid URL", message_id, "photo.png", "INVALID_ARGUMENT attachment.file_url"),
        ("that is missing", message_id, f"{files}/gone.png", gone),
        ("on an unknown host", message_id, "https://files.invalid/photo.png", gone),
        ("in a private network", message_id, "https://127.0.0.1/photo.png", gone),
    ):
        call = chat.tenant("CreateChatAttachment", message_id=on, attachment=photo(url))
        await checks.check_rejected(f"rule 3: a file {what}", expected, call)


def photo(url: str) -> dict[str, str]:
    return {"file_url": url, "file_name": "photo.png", "file_type": "image/png"}


async def rules_4_and_5(checks: Checks, link: Any, tenant: Tenant, to_delete: Chat) -> None:
    """The rules of tickets. `link` is of `tenant`; `to_delete`, of another tenant, is deleted."""
    other, session_id, ticket = to_delete.tenant, to_delete.session_id, str(uuid.uuid4())
    request = {"session": {"status": "CHAT_SESSION_STATUS_ARCHIVED"}}
    archived = (await tenant("CreateChatSession", **request)).session.id
    linked = link.session_id
    for what, who, session, expected in (
        ("a ticket of another tenant", other, session_id, "NOT_FOUND TICKET_NOT_FOUND"),
        ("a second ticket of a session", tenant, linked, "ALREADY_EXISTS SESSION_HAS_TICKET"),
        (
            "a ticket of an archived one",
            tenant,
            archived,
            "FAILED_PRECONDITION SESSION_ARCHIVED",
        ),
    ):
        call = who("CreateChatTicket", session_id=session, ticket_id=link.ticket_id)
        await checks.check_rejected(f"rule 4: {what}", expected, call)

    opened = {"id": ticket, "title": "to be solved"}
    await other("CreateChatTicket", session_id=session_id, ticket=opened)
    await checks.check_rejected(
        "rule 5: deleting a session with an open ticket",
        "FAILED_PRECONDITION SESSION_HAS_ACTIVE_TICKET",
        other("DeleteChatSession", session_id=session_id),
    )
    await checks.check_rejected(
        "rule 5: deleting a ticket linked to a session",
        "FAILED_PRECONDITION TICKET_LINKED",
        other("DeleteTicket", ticket_id=ticket),
    )
    solved = {"id": ticket, "status": "TICKET_STATUS_SOLVED"}
    await other("UpdateTicket", ticket=solved, update_mask={"paths": ["status"]})
    await other("DeleteChatSession", session_id=session_id)
    del other.acknowledged[session_id]
    await checks.check_rejected(
        "rule 5: a message of a deleted session",
        "NOT_FOUND CHAT_MESSAGE_NOT_FOUND",
        other("GetChatMessage", message_id=to_delete.messages()[0]["id"]),
    )


async def rules_6_and_8(checks: Checks, chat: Chat, files: str) -> None:
    """The rules that the service maintains by itself."""
    session = {"session_id": chat.session_id}
    message, link = {"message_id": chat.messages()[0]["id"]}, {"chat_ticket_id": str(uuid.uuid4())}
    sessions = []
    for rpc, fields in (
        ("GetChatSession", session),
        ("CreateChatAttachment", message | {"attachment": photo(f"{files}/photo.png")}),
        ("CreateChatTicket", session | link | {"ticket": {"title": "please call"}}),
        ("DeleteChatTicket", link),
    ):
        await chat.tenant(rpc, **fields)
        sessions.append((await chat.tenant("GetChatSession", **session)).session)
    checks.check(
        [session.has_ticket for session in sessions] == [False, False, True, False],
        "rule 6: has_ticket is true while a ticket is linked, and false otherwise",
    )
    times = [session.update_time.ToNanoseconds() for session in sessions]
    checks.check(
        all(earlier < later for earlier, later in itertools.pairwise(times)),
        "rule 8: update_time increases with an attachment, a linked and an unlinked ticket",
    )
