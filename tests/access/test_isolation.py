"""Isolation: another tenant's data looks exactly like absent data, and never changes.

For every id in the request of every RPC, found in the descriptors, and for the feed of a tenant.
Beside this: for every statement, as PostgreSQL plans it; and for every key of the schema, against
plain SQL.
"""

import asyncio
import base64
import dataclasses
import json
import re
from collections.abc import Iterator
from typing import Any

import grpc.aio
import pytest
from google.protobuf import descriptor_pool
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.json_format import MessageToJson
from google.protobuf.message import Message
from grpc import StatusCode
from support.client import Api, an_id
from support.drafts import Finish, a_start
from support.feeds import caught_up_feed
from support.sessions import delete_session, set_status
from support.tenant_rows import TenantIds, TenantRows
from support.tickets import delete_ticket

from chat_ticket.v1 import chat_attachment_pb2 as files_pb
from chat_ticket.v1 import chat_draft_pb2 as drafts_pb
from chat_ticket.v1 import chat_message_pb2 as messages_pb
from chat_ticket.v1 import chat_session_pb2 as sessions_pb
from chat_ticket.v1 import chat_ticket_pb2 as tickets_pb
from chat_ticket.v1 import resources_pb2 as r
from chat_ticket_svc.server import SERVICES

Write = drafts_pb.WriteChatDraftRequest

RPCS = [
    method
    for service in SERVICES
    for method in descriptor_pool.Default().FindServiceByName(service).methods
]

# Strings in requests that are no ids. Every other string is an id or a place in a list.
TEXTS = {
    *("title", "content", "metadata_json", "file_url", "file_name", "file_type", "query", "etag"),
    *("language_code", "text", "metadata_merge_json", "epoch", "paths"),  # paths: of a FieldMask
}
# Places in a list or a stream: each with the field of a response that has the next one.
PLACES = {"page_token": "nextPageToken", "cursor": "cursor"}

# What requests carry and no call reads.
IGNORED = {
    *("ChatSession.tenant_id", "Ticket.tenant_id"),
    *("ChatMessage.session_id", "ChatDraft.session_id", "ChatAttachment.message_id"),
    "UpdateChatMessage message.attachments[0].id",
    "UpdateChatSession session.user_id",
}

# The cases of a deletion, which is OK for what is absent when that is allowed.
MISSING = {"": False, "allowing that it is missing": True}

ID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
# Numbers that begin with a time or count transactions.
CLOCKS = re.compile(r'("(?:fencing_token|feed_bucket|\w*position)": )\d+')
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[\d.]*(Z|[+-][\d:]+)")
PROBE = "00000000-0000-4000-8000-000000000000"  # stands for the id in question
NEXT_PLACE = re.compile(r'(?:(?<="nextPageToken": ")|(?<="cursor": "))[^"]+')


def calls(w: TenantIds) -> dict[str, dict[str, Message]]:
    """For each RPC, calls of a tenant for its own data. Together they set every id field.

    Those called `taken` are rejected, because something new cannot have the id at that path; the
    others succeed. Those called `only` are about the id at that path alone. A page token or a
    cursor is that of the first response. The last request of a stream stands for all of them.
    """
    named = {"tenant_id": w.tenant, "title": w.tenant, "status": r.TICKET_STATUS_SOLVED}
    referring = {**named, "external_ref": w.external_ref}
    message = {"session_id": w.session, "role": r.CHAT_MESSAGE_ROLE_USER, "content": w.content}
    file, second = w.a_file(w.file), w.a_file(w.second)
    messages = {
        "new": r.ChatMessage(**message, attachments=[w.a_file()]),
        "repeat": r.ChatMessage(**message, id=w.message, attachments=[file, second]),
        "taken {}.id": r.ChatMessage(**message, id=w.deleted),
        "taken {}.attachments[0].id": r.ChatMessage(**message, attachments=[file]),
    }
    taking_over = a_start(w.session, w.draft)
    taking_over.draft.session_id = w.session
    token = "of the first response"
    return {
        "CreateChatSession": {
            "repeat": sessions_pb.CreateChatSessionRequest(
                session=r.ChatSession(id=w.session, tenant_id=w.tenant, user_id=w.user)
            ),
        },
        "GetChatSession": {"": sessions_pb.GetChatSessionRequest(session_id=w.session)},
        "ListChatSessions": {
            "": sessions_pb.ListChatSessionsRequest(page_size=1, page_token=token),
            "of a user": sessions_pb.ListChatSessionsRequest(user_id=w.user),
        },
        "UpdateChatSession": {
            "": sessions_pb.UpdateChatSessionRequest(
                session=r.ChatSession(
                    id=w.session,
                    tenant_id=w.tenant,
                    user_id=w.user,
                    status=r.CHAT_SESSION_STATUS_RESOLVED,
                ),
                update_mask=FieldMask(paths=["status"]),
            )
        },
        "DeleteChatSession": {
            case: sessions_pb.DeleteChatSessionRequest(session_id=w.session, allow_missing=allowed)
            for case, allowed in MISSING.items()
        },
        "WatchChatSession": {
            "": sessions_pb.WatchChatSessionRequest(session_id=w.session),
            "with drafts": sessions_pb.WatchChatSessionRequest(
                session_id=w.session, include_drafts=True
            ),
        },
        "WatchChatSessions": {
            "from the beginning": sessions_pb.WatchChatSessionsRequest(
                from_beginning=True, user_id=w.user
            ),
            "after a cursor": sessions_pb.WatchChatSessionsRequest(cursor=token),
        },
        "WriteChatDraft": {
            "taking over": Write(start=taking_over),
            "only start.session_id": Write(start=a_start(w.session, w.undrafted)),
            "finish": Write(finish=Finish(attachments=[w.a_file()])),
            "taken finish.attachments[0].id": Write(finish=Finish(attachments=[file])),
        },
        "StopChatDraft": {"": drafts_pb.StopChatDraftRequest(draft_id=w.draft)},
        "GetChatDraft": {"": drafts_pb.GetChatDraftRequest(draft_id=w.draft)},
        "ListChatDrafts": {"": drafts_pb.ListChatDraftsRequest(session_id=w.session)},
        "CreateChatMessage": {
            case.format("message"): messages_pb.CreateChatMessageRequest(
                session_id=w.session, message=new
            )
            for case, new in messages.items()
        },
        "BatchCreateChatMessages": {
            case.format("messages[0]"): messages_pb.BatchCreateChatMessagesRequest(
                session_id=w.session, messages=[new]
            )
            for case, new in messages.items()
        },
        "GetChatMessage": {"": messages_pb.GetChatMessageRequest(message_id=w.message)},
        "ListChatMessages": {"": messages_pb.ListChatMessagesRequest(session_id=w.session)},
        "UpdateChatMessage": {
            "": messages_pb.UpdateChatMessageRequest(
                message=r.ChatMessage(
                    id=w.message, session_id=w.session, metadata_json="{}", attachments=[file]
                ),
                update_mask=FieldMask(paths=["metadata_json"]),
            )
        },
        "DeleteChatMessage": {
            case: messages_pb.DeleteChatMessageRequest(message_id=w.message, allow_missing=allowed)
            for case, allowed in MISSING.items()
        },
        "RedactChatMessage": {"": messages_pb.RedactChatMessageRequest(message_id=w.message)},
        "SearchChatMessages": {
            "": messages_pb.SearchChatMessagesRequest(query="hello", page_size=1, page_token=token),
            "in a session": messages_pb.SearchChatMessagesRequest(
                query="hello", session_id=w.session
            ),
        },
        "CreateChatAttachment": {
            "repeat": files_pb.CreateChatAttachmentRequest(message_id=w.message, attachment=file),
        },
        "GetChatAttachment": {"": files_pb.GetChatAttachmentRequest(attachment_id=w.file)},
        "ListChatAttachments": {
            "of a message": files_pb.ListChatAttachmentsRequest(
                message_id=w.message, page_size=1, page_token=token
            ),
            "of a session": files_pb.ListChatAttachmentsRequest(
                session_id=w.session, page_size=1, page_token=token
            ),
        },
        "UpdateChatAttachment": {
            "": files_pb.UpdateChatAttachmentRequest(
                attachment=r.ChatAttachment(
                    id=w.file, message_id=w.message, file_url="https://files.example/new"
                ),
                update_mask=FieldMask(paths=["file_url"]),
            )
        },
        "DeleteChatAttachment": {
            case: files_pb.DeleteChatAttachmentRequest(attachment_id=w.file, allow_missing=allowed)
            for case, allowed in MISSING.items()
        },
        "CreateChatTicket": {
            "new": tickets_pb.CreateChatTicketRequest(session_id=w.bare, ticket=r.Ticket(**named)),
            "existing": tickets_pb.CreateChatTicketRequest(session_id=w.bare, ticket_id=w.ticket),
            "repeat": tickets_pb.CreateChatTicketRequest(
                session_id=w.session, chat_ticket_id=w.link, ticket_id=w.ticket
            ),
            "repeat new": tickets_pb.CreateChatTicketRequest(
                session_id=w.session, ticket=r.Ticket(**referring, id=w.ticket)
            ),
            "taken chat_ticket_id": tickets_pb.CreateChatTicketRequest(
                session_id=w.bare, chat_ticket_id=w.link, ticket_id=w.ticket
            ),
            "taken ticket.id": tickets_pb.CreateChatTicketRequest(
                session_id=w.bare, ticket=r.Ticket(**named, id=w.ticket)
            ),
            "taken ticket.external_ref": tickets_pb.CreateChatTicketRequest(
                session_id=w.bare, ticket=r.Ticket(**referring)
            ),
        },
        "GetChatTicket": {"": tickets_pb.GetChatTicketRequest(chat_ticket_id=w.link)},
        "ListChatTickets": {
            # There is no second page of a session's.
            "of a session": tickets_pb.ListChatTicketsRequest(session_id=w.session),
            "of a ticket": tickets_pb.ListChatTicketsRequest(
                ticket_id=w.ticket, page_size=1, page_token=token
            ),
        },
        "DeleteChatTicket": {
            case: tickets_pb.DeleteChatTicketRequest(chat_ticket_id=w.link, allow_missing=allowed)
            for case, allowed in MISSING.items()
        },
        "CreateTicket": {
            "repeat": tickets_pb.CreateTicketRequest(ticket=r.Ticket(**referring, id=w.ticket)),
            "taken ticket.id": tickets_pb.CreateTicketRequest(
                ticket=r.Ticket(**named, id=w.ticket)
            ),
            "taken ticket.external_ref": tickets_pb.CreateTicketRequest(
                ticket=r.Ticket(**referring)
            ),
        },
        "GetTicket": {"": tickets_pb.GetTicketRequest(ticket_id=w.ticket)},
        "ListTickets": {
            "": tickets_pb.ListTicketsRequest(page_size=1, page_token=token),
            "of a reference": tickets_pb.ListTicketsRequest(external_ref=w.external_ref),
        },
        "UpdateTicket": {
            "": tickets_pb.UpdateTicketRequest(
                ticket=r.Ticket(id=w.ticket, tenant_id=w.tenant, title="another"),
                update_mask=FieldMask(paths=["title"]),
            ),
            "of a reference": tickets_pb.UpdateTicketRequest(
                ticket=r.Ticket(id=w.ticket, external_ref=w.external_ref),
                update_mask=FieldMask(paths=["external_ref"]),
            ),
        },
        "DeleteTicket": {
            case: tickets_pb.DeleteTicketRequest(ticket_id=w.spare, allow_missing=allowed)
            for case, allowed in MISSING.items()
        },
    }


def is_id(field: FieldDescriptor) -> bool:
    """Whether it is text that names something of the service, or a place in a list."""
    # The id of an author and the labels of a session are the caller's own.
    is_own = field.containing_type.name in ("ChatMessageAuthor", "LabelsEntry")
    is_text = field.type in (field.TYPE_STRING, field.TYPE_BYTES)
    return is_text and field.name not in TEXTS and not is_own


def id_fields(kind: Descriptor) -> Iterator[str]:
    """The paths of all ids that a message of this kind can carry."""
    for field in kind.fields:
        if field.message_type is not None:
            yield from (f"{field.name}.{path}" for path in id_fields(field.message_type))
        elif is_id(field):
            yield field.name


def ids_of(message: Message) -> dict[str, tuple[Message, str]]:
    """The ids that a message carries: path → the message that holds it, and the field there."""
    found: dict[str, tuple[Message, str]] = {}
    for field, value in message.ListFields():
        if field.type == FieldDescriptor.TYPE_MESSAGE and field.name != "labels":
            parts = {field.name: value}
            if field.is_repeated:
                parts = {f"{field.name}[{index}]": part for index, part in enumerate(value)}
            for name, part in parts.items():
                found |= {f"{name}.{path}": place for path, place in ids_of(part).items()}
        elif is_id(field):
            found[field.name] = (message, field.name)
    return found


CASES = [
    (rpc, case, path)
    for rpc, cases in calls(TenantIds("a tenant")).items()
    for case, request in cases.items()
    for path in ids_of(request)
    if not case.startswith(("taken", "only")) or case.endswith(f" {path}")
]


def test_every_rpc_is_in_the_matrix() -> None:
    """A new RPC needs a call for the tenant's own data in `calls`."""
    assert sorted(calls(TenantIds("a tenant"))) == sorted(rpc.name for rpc in RPCS)


@pytest.mark.parametrize("rpc", RPCS, ids=lambda rpc: rpc.name)
def test_every_id_is_in_the_matrix(rpc: Any) -> None:
    """A new id field needs a value of the tenant's own data in `calls`."""
    tried = {re.sub(r"\[\d+\]", "", path) for name, _, path in CASES if name == rpc.name}
    assert tried == set(id_fields(rpc.input_type))


async def answer(
    api: Api, world: TenantIds, rpc: str, request: Message
) -> tuple[StatusCode, list[str]]:
    """All responses of a call, to its end, or until a watch has caught up or a draft is open."""
    services = (api.sessions, api.messages, api.attachments, api.tickets, api.drafts)
    method = next(getattr(service, rpc) for service in services if hasattr(service, rpc))
    requests = [request]
    if isinstance(request, Write) and not request.HasField("start"):
        requests.insert(0, Write(start=a_start(world.session, world.draft)))
    call = method(iter(requests) if isinstance(request, Write) else request)
    responses = []
    try:
        if isinstance(call, grpc.aio.UnaryStreamCall | grpc.aio.StreamStreamCall):
            async for response in call:
                responses.append(MessageToJson(response, indent=None))
                is_open = '"started"' in responses[-1] and request.HasField("start")
                if is_open or '"caughtUp"' in responses[-1]:
                    call.cancel()
                    return StatusCode.OK, responses
        else:
            responses.append(MessageToJson(await call, indent=None))
    except grpc.aio.AioRpcError as error:
        responses.append(error.details() or "")
    return await call.code(), [*responses, *map(str, await call.trailing_metadata())]


async def request_of(api: Api, world: TenantIds, rpc: str, case: str, path: str) -> Any:
    """The request; with its page token or cursor, which binds its other fields, only for that."""
    request: Any = calls(world)[rpc][case]
    for place in PLACES.keys() & ids_of(request).keys():
        request.ClearField(place)
        if path == place:
            _, [first, *_] = await answer(api, world, rpc, request)
            setattr(request, place, json.loads(first)[PLACES[place]])
    return request


def of_nobody(path: str, value: str) -> str:
    """A valid id, page token or cursor that nobody owns."""
    if path not in PLACES:
        return ID.sub(lambda _: an_id(), value)
    _, *position = json.loads(base64.urlsafe_b64decode(value + "=="))
    return base64.urlsafe_b64encode(json.dumps(["0" * 16, *position]).encode()).decode().rstrip("=")


def plain(lines: list[str], world: TenantIds | None = None) -> list[str]:
    """Without times and tokens, and with no ids but those of a world and the one asked for."""
    kept_ids = (*dataclasses.astuple(world), PROBE) if world else ()
    text = NEXT_PLACE.sub("token", TIME.sub("time", "\n".join(lines)))
    text = CLOCKS.sub(r"\1number", text)
    return sorted(
        ID.sub(lambda found: found[0] if found[0] in kept_ids else "id", text).splitlines()
    )


@pytest.mark.parametrize(
    ("rpc", "case", "path"), CASES, ids=["-".join(filter(None, case)) for case in CASES]
)
async def test_foreign_id_gets_the_answer_of_an_absent_id(
    api: Api, other: Api, rows: TenantRows, rpc: str, case: str, path: str
) -> None:
    """Another tenant's id gets the same answer as an absent id, and has the same effect.

    Status, text, details, responses and our own rows are the same. Only with our own id the call
    is another one, unless it does not read that id. Their rows stay as they were, also when they
    have the very same ids.
    """
    ours, theirs = TenantIds(api.tenant), TenantIds(other.tenant)
    made: list[str] = []
    code: dict[str, StatusCode] = {}
    outcome: dict[str, list[str]] = {}
    for whose in ("absent", "foreign", "own"):
        # A token of theirs is one for the very same request; our own call has a twin to spare.
        if whose == "own" or path in PLACES:
            theirs = dataclasses.replace(ours, tenant=other.tenant)
        if not made or whose == "own" or rows.of(ours.tenant, theirs.tenant) != made:
            rows.delete(ours.tenant, theirs.tenant)
            await asyncio.gather(ours.make(api), theirs.make(other))
            made = rows.of(ours.tenant, theirs.tenant)
        request = await request_of(api, ours, rpc, case, path)
        value = ""
        if whose != "own":
            value = getattr(*ids_of(await request_of(other, theirs, rpc, case, path))[path])
            value = value if whose == "foreign" else of_nobody(path, value)
            setattr(*ids_of(request)[path], value)
        before = rows.of(theirs.tenant)
        code[whose], lines = await answer(api, ours, rpc, request)
        assert rows.of(theirs.tenant) == before
        lines += rows.of(ours.tenant)
        if value:
            lines = [line.replace(value, PROBE) for line in lines]
        secret = {*dataclasses.astuple(theirs)} - {*dataclasses.astuple(ours)}
        assert not [line for line in lines if any(each in line for each in secret)]
        outcome[whose] = lines

    assert code["foreign"] == code["absent"]
    assert plain(outcome["foreign"], ours) == plain(outcome["absent"], ours)
    expected = StatusCode.ALREADY_EXISTS if case.startswith("taken") else StatusCode.OK
    assert code["own"] == expected, outcome["own"]
    assert path not in PLACES or code["foreign"] == StatusCode.INVALID_ARGUMENT
    holder, name = ids_of(request)[path]
    is_ignored = not IGNORED.isdisjoint([f"{holder.DESCRIPTOR.name}.{name}", f"{rpc} {path}"])
    assert (plain(outcome["own"]) == plain(outcome["absent"])) == is_ignored


async def test_label_of_another_tenant_finds_nothing(api: Api, other: Api) -> None:
    """Neither a label of its own, nor the very same one, alone or beside others."""
    same, own = {"team": "billing"}, {"team": "billing", "of": other.tenant}
    session = await api.session(labels=same)
    await other.session(labels=own)
    for labels, expected in ((same, [session.id]), (own, []), ({"of": other.tenant}, [])):
        request = sessions_pb.ListChatSessionsRequest(labels=labels)
        listed = await api.sessions.ListChatSessions(request)
        assert [each.id for each in listed.sessions] == expected


async def test_feed_tells_nothing_of_another_tenant(api: Api, other: Api) -> None:
    """Neither its sessions and tickets, nor their deletions, from the beginning and later."""
    ours, theirs = TenantIds(api.tenant), TenantIds(other.tenant)
    await asyncio.gather(ours.make(api), theirs.make(other))
    async with caught_up_feed(api, from_beginning=True) as feed:
        for each, ids in ((other, theirs), (api, ours)):
            await set_status(each, ids.session, r.CHAT_SESSION_STATUS_RESOLVED)
            await delete_session(each, ids.bare)
            await delete_ticket(each, ids.spare)
        told = await feed.settle(api)
    assert {*told} == {
        *(("session", each) for each in (ours.session, ours.sharing, ours.bare)),
        *(("ticket", each) for each in (ours.ticket, ours.spare)),
        ("caught_up", ""),
        ("session_deleted", ours.bare),
        ("ticket_deleted", ours.spare),
    }
