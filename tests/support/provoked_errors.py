"""Errors that callers provoke, with a secret in every text, and what the server answers."""

import asyncio
import base64
import json
import time
from collections.abc import Awaitable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc.aio
import jwt
import pytest
from google.protobuf.field_mask_pb2 import FieldMask

from chat_ticket.v1 import chat_attachment_pb2 as a
from chat_ticket.v1 import chat_message_pb2 as m
from chat_ticket.v1 import chat_message_pb2_grpc
from chat_ticket.v1 import chat_session_pb2 as s
from chat_ticket.v1 import chat_ticket_pb2 as t
from chat_ticket.v1 import resources_pb2 as r
from chat_ticket_svc.commands import token as token_command
from support.attachments import update_attachment
from support.client import Api, Refusal, a_file, an_id
from support.database import session_locked
from support.process import ServerProcess
from support.secrets import leaks, secret
from support.tickets import link_sessions


@dataclass
class ServerOutput:
    """The output of a server process during every fault, and the errors of its callers."""

    process: ServerProcess
    debug: bool = False
    errors: list[tuple[str, bytes]] = field(default_factory=list)
    correlation_ids: dict[str, str] = field(default_factory=dict)
    commands: list[bytes] = field(default_factory=list)
    activity: str = ""

    async def expect_error(self, reason: str, call: Awaitable[Any]) -> Refusal:
        """Expects a call to fail with one of these reasons, and records the error."""
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        error = caught.value
        refusal = Refusal()
        refusal.read(error)
        assert refusal.info.reason in reason.split(), refusal.text
        parts = [(error.details() or "").encode(), (error.debug_error_string() or "").encode()]
        for key, value in (*(error.initial_metadata() or ()), *(error.trailing_metadata() or ())):
            parts += [key.encode(), value.encode() if isinstance(value, str) else value]
        self.errors.append((refusal.info.reason, b"\n".join(parts)))
        return refusal

    async def wait_for_output(self, event: str) -> None:
        async with asyncio.timeout(20):
            while event not in self.process.output:
                await asyncio.sleep(0.05)

    async def expect_internal_error(self, what: str, call: Awaitable[Any]) -> None:
        refusal = await self.expect_error("INTERNAL", call)
        self.correlation_ids[what] = refusal.info.metadata["correlation_id"]


async def read_all(call: Any) -> list[Any]:
    responses = []
    while (response := await call.read()) is not grpc.aio.EOF:
        responses.append(response)
    return responses


def bearer(directory: Path, **claims: Any) -> list[tuple[str, str]]:
    """The metadata of a caller whose token the server believes."""
    return [("authorization", f"Bearer {token(directory, **claims)}")]


def token(directory: Path, **claims: Any) -> str:
    key = (directory / "development-key.pem").read_text()
    return jwt.encode(
        {
            "iss": token_command.ISSUER,
            "aud": token_command.AUDIENCE,
            "sub": "somebody",  # who calls is logged
            "exp": int(time.time()) + 600,
            "tenants": "*",
            "scope": f"read write delete ticket {secret('scope')}",
            **claims,
        },
        key,
        algorithm=token_command.ALGORITHM,
        headers={"kid": token_command.KEY_ID},
    )


def a_secret_file(**fields: Any) -> r.ChatAttachment:
    return a_file(**{"file_name": f"{secret('name')}.png", **fields})


async def provoke_request_errors(output: ServerOutput, api: Api) -> None:
    """Send malformed requests with a secret in every text."""
    invalid = "INVALID_ARGUMENT"
    bad = secret("value")
    message = r.ChatMessage(
        id=bad,
        content=f"{bad}\0",
        role=99,  # type: ignore[arg-type]
        metadata_json=f'{{"{bad}": {bad}}}',
        attachments=[
            a_file(file_url=f"https://{bad}:{bad}@h/{bad}", file_name=f"{bad}\n", file_type=bad),
            a_file(id=bad, file_url=f"{bad}://{bad}?{bad}"),
        ],
    )
    request = m.CreateChatMessageRequest(session_id=bad, message=message)
    refusal = await output.expect_error(invalid, api.messages.CreateChatMessage(request))
    assert len(refusal.fields) >= 5
    calls = [api.sessions.GetChatSession(s.GetChatSessionRequest(session_id=bad))]
    calls.append(api.sessions.DeleteChatSession(s.DeleteChatSessionRequest(etag=bad)))
    calls.append(update_attachment(api, bad, f"https://{bad}:{bad}@h/{bad}"))
    calls.append(api.sessions.ListChatSessions(s.ListChatSessionsRequest(page_token=bad)))
    calls.append(api.messages.SearchChatMessages(m.SearchChatMessagesRequest(query=bad * 99)))
    calls.append(read_all(api.messages.ListChatMessages(m.ListChatMessagesRequest(session_id=bad))))
    calls.append(
        api.tickets.CreateChatTicket(
            t.CreateChatTicketRequest(
                session_id=bad, ticket=r.Ticket(id=bad, title=f"{bad * 99}\0")
            )
        )
    )
    for metadata_json in (bad, f'{{"{bad}": NaN}}', f'["{bad}"]', f'{{"a": "\\{bad}"}}'):
        update = m.UpdateChatMessageRequest(
            message=r.ChatMessage(id=an_id(), metadata_json=metadata_json),
            update_mask=FieldMask(paths=["metadata_json"]),
        )
        calls.append(api.messages.UpdateChatMessage(update))
        merge = m.UpdateChatMessageRequest(
            message=r.ChatMessage(id=an_id()), metadata_merge_json=metadata_json
        )
        calls.append(api.messages.UpdateChatMessage(merge))
    labeled = r.ChatSession(
        user_id=f"{bad}\n", title=f"{bad} ", labels={"NO-KEY": bad, "lines": f"{bad}\n"}
    )
    calls.append(api.sessions.CreateChatSession(s.CreateChatSessionRequest(session=labeled)))
    for call in calls:
        await output.expect_error(invalid, call)
    for method, stub in (
        ("GetChatSession", "unary_unary"),
        ("WatchChatSession", "unary_stream"),
        ("WatchChatSessions", "unary_stream"),
    ):
        raw = getattr(api.channel, stub)(f"/chat_ticket.v1.ChatSessionService/{method}")
        call = raw(b"\xff" + bad.encode(), metadata=api.sessions._metadata)
        await output.expect_error(invalid, call if stub == "unary_unary" else read_all(call))


async def provoke_authentication_errors(output: ServerOutput, api: Api, keys: Path) -> None:
    """Send invalid credentials and tenants.

    Each is a secret, but for what the log says of a token: its key id and a claim that is wrong.
    """
    get = s.GetChatSessionRequest(session_id=an_id())
    valid = bearer(keys)
    forged = (
        f"{token(keys).rpartition('.')[0]}.{base64.b64encode(secret('sign').encode()).decode()}"
    )
    unknown_key = jwt.encode({"sub": secret("sub")}, "0" * 32, headers={"kid": "unknown"})
    cases: list[tuple[str, list[tuple[str, str]]]] = [
        ("CREDENTIAL_REQUIRED", []),
        ("CREDENTIAL_INVALID", [("authorization", f"Basic {secret('basic')}")]),
        ("CREDENTIAL_INVALID", [("authorization", secret("bare"))]),
        ("CREDENTIAL_INVALID", [("authorization", f"Bearer {secret('malformed')}.x.y")]),
        ("CREDENTIAL_INVALID", [("authorization", f"Bearer {forged}")]),
        ("CREDENTIAL_INVALID", [("authorization", f"Bearer {unknown_key}")]),
        ("CREDENTIAL_INVALID", bearer(keys, iss="https://another-issuer.example")),
        ("CREDENTIAL_INVALID", bearer(keys, tenants=[f" {secret('claim')} "])),
        ("CREDENTIAL_INVALID", [*valid, *valid]),
        ("CREDENTIAL_EXPIRED", bearer(keys, exp=1)),
        ("PERMISSION_REQUIRED", bearer(keys, scope=secret("scope"))),
        ("TENANT_REQUIRED", valid),
        ("TENANT_NOT_ALLOWED", [*bearer(keys, tenants=["a", "b"]), ("x-tenant-id", "c")]),
        ("INVALID_ARGUMENT", [*valid, ("x-tenant-id", secret("tenant") * 20)]),
        ("INVALID_ARGUMENT", [*valid, *[("x-tenant-id", secret("tenant"))] * 2]),
    ]
    stub = api.sessions._stub
    for reason, metadata in cases:
        await output.expect_error(reason, stub.GetChatSession(get, metadata=metadata, timeout=10))


async def use_everything(api: Api, store: str) -> tuple[str, str]:
    """Store and read every kind of secret. Returns a session and its message."""
    session = await api.session(
        user_id=secret("user"), title=secret("title"), labels={"secret": secret("label")}
    )
    by_user = s.ListChatSessionsRequest(user_id=session.user_id, labels=session.labels)
    assert len((await api.sessions.ListChatSessions(by_user)).sessions) == 1
    message = await api.message(
        session.id,
        secret("content"),
        author=r.ChatMessageAuthor(id=secret("author")),
        metadata_json=json.dumps({secret("key"): [secret("value")]}),
        attachments=[a_secret_file(file_url=f"{store}/{secret('path')}?sig={secret('query')}")],
    )
    batch = m.BatchCreateChatMessagesRequest(
        session_id=session.id,
        messages=[r.ChatMessage(content=secret("batch"), role=r.CHAT_MESSAGE_ROLE_ASSISTANT)] * 2,
    )
    await api.messages.BatchCreateChatMessages(batch)
    await api.messages.SearchChatMessages(m.SearchChatMessagesRequest(query=secret("query")))
    listed = await read_all(
        api.messages.ListChatMessages(m.ListChatMessagesRequest(session_id=session.id))
    )
    assert leaks(str(listed)), "the caller gets what is theirs"
    merge = m.UpdateChatMessageRequest(
        message=r.ChatMessage(id=message.id),
        metadata_merge_json=json.dumps({secret("key"): None, secret("merged"): secret("value")}),
    )
    await api.messages.UpdateChatMessage(merge)
    await api.escalate(session.id, ticket=r.Ticket(title=secret("title")))
    return session.id, message.id


async def provoke_rule_violations(
    output: ServerOutput, api: Api, database: str, store: str
) -> None:
    """Provoke errors by absent entities, existing ids and broken rules."""
    session_id, message_id = await use_everything(api, store)
    none = an_id()
    sessions, messages, attachments, tickets = (
        api.sessions,
        api.messages,
        api.attachments,
        api.tickets,
    )
    get = s.GetChatSessionRequest(session_id=none)
    await output.expect_error("CHAT_SESSION_NOT_FOUND", sessions.GetChatSession(get))
    await output.expect_error("CHAT_SESSION_NOT_FOUND", api.message(none, secret("content")))
    await output.expect_error(
        "CHAT_SESSION_ALREADY_EXISTS", api.session(id=session_id, user_id=secret("user"))
    )
    full = await api.session(labels={f"key-{n}": secret("label") for n in range(32)})
    one_more = s.UpdateChatSessionRequest(
        session=r.ChatSession(id=full.id, labels={"one-more": secret("label")}),
        update_mask=FieldMask(paths=["labels.one-more"]),
    )
    await output.expect_error("TOO_MANY_LABELS", sessions.UpdateChatSession(one_more))
    deleted = await api.session()
    await sessions.DeleteChatSession(s.DeleteChatSessionRequest(session_id=deleted.id))
    await output.expect_error(
        "CHAT_SESSION_DELETED", api.session(id=deleted.id, title=secret("title"))
    )
    await output.expect_error(
        "CHAT_MESSAGE_NOT_FOUND",
        messages.GetChatMessage(m.GetChatMessageRequest(message_id=none)),
    )
    await output.expect_error(
        "CHAT_ATTACHMENT_NOT_FOUND",
        attachments.GetChatAttachment(a.GetChatAttachmentRequest(attachment_id=none)),
    )
    await output.expect_error(
        "CHAT_TICKET_NOT_FOUND",
        tickets.GetChatTicket(t.GetChatTicketRequest(chat_ticket_id=none)),
    )
    await output.expect_error(
        "TICKET_NOT_FOUND", tickets.GetTicket(t.GetTicketRequest(ticket_id=none))
    )

    await output.expect_error(
        "CHAT_MESSAGE_ALREADY_EXISTS", api.message(session_id, secret("content"), id=message_id)
    )
    file_id = an_id()
    with_file = {"file_url": f"{store}/{secret('path')}", "id": file_id}
    second = await api.message(session_id, secret("content"))
    await api.attachment(second.id, **with_file)
    third = await api.message(session_id, secret("content"))
    file = await api.attachment(third.id, file_url=f"{store}/{secret('path')}")
    await update_attachment(api, file.id, f"{store}/{secret('path')}?sig={secret('query')}")
    await output.expect_error(
        "CHAT_ATTACHMENT_ALREADY_EXISTS",
        api.attachment(third.id, **with_file, file_name=secret("name")),
    )
    await output.expect_error(
        "TOO_MANY_ATTACHMENTS", api.attachment(second.id, file_url=f"{store}/{secret('path')}")
    )
    await messages.RedactChatMessage(m.RedactChatMessageRequest(message_id=second.id))
    await output.expect_error(
        "CHAT_MESSAGE_REDACTED", api.attachment(second.id, file_url=f"{store}/{secret('path')}")
    )
    for url in (
        f"https://127.0.0.1/{secret('path')}?{secret('query')}",
        f"{store}/gone/{secret('path')}?{secret('query')}",
        f"{store}/moved/{secret('path')}?{secret('query')}",
        f"http://127.0.0.1:1/{secret('path')}?{secret('query')}",
    ):
        await output.expect_error(
            "ATTACHMENT_URL_NOT_ACCESSIBLE", api.attachment(third.id, file_url=url)
        )
        await output.expect_error(
            "ATTACHMENT_URL_NOT_ACCESSIBLE", update_attachment(api, file.id, url)
        )
    await output.expect_error(
        "SESSION_HAS_TICKET", api.escalate(session_id, ticket=r.Ticket(title=secret("title")))
    )
    await output.expect_error(
        "SESSION_HAS_ACTIVE_TICKET",
        sessions.DeleteChatSession(s.DeleteChatSessionRequest(session_id=session_id)),
    )
    await output.expect_error(
        "ETAG_MISMATCH",
        sessions.DeleteChatSession(s.DeleteChatSessionRequest(session_id=session_id, etag="99")),
    )
    link = (
        await tickets.ListChatTickets(t.ListChatTicketsRequest(session_id=session_id))
    ).chat_tickets[0]
    await output.expect_error(
        "TICKET_LINKED", tickets.DeleteTicket(t.DeleteTicketRequest(ticket_id=link.ticket.id))
    )
    other = await api.session()
    await output.expect_error(
        "CHAT_TICKET_ALREADY_EXISTS",
        api.escalate(other.id, chat_ticket_id=link.id, ticket=r.Ticket(title=secret("title"))),
    )
    taking = r.Ticket(title=secret("title"), external_ref=secret("reference"))
    await tickets.CreateTicket(t.CreateTicketRequest(ticket=taking))
    await output.expect_error("EXTERNAL_REF_TAKEN", api.escalate(other.id, ticket=taking))
    link_sessions(database, api.tenant, link.ticket.id, 499)
    await output.expect_error(
        "TICKET_HAS_TOO_MANY_SESSIONS", api.escalate(other.id, ticket_id=link.ticket.id)
    )
    existing = r.Ticket(id=link.ticket.id, title=secret("title"))
    await output.expect_error("TICKET_ALREADY_EXISTS", api.escalate(other.id, ticket=existing))
    archived = await api.session(status=r.CHAT_SESSION_STATUS_ARCHIVED)
    await output.expect_error(
        "SESSION_ARCHIVED", api.escalate(archived.id, ticket=r.Ticket(title=secret("title")))
    )
    beyond = s.WatchChatSessionRequest(session_id=session_id, after_revision=99)
    await output.expect_error("REVISION_OUT_OF_RANGE", read_all(sessions.WatchChatSession(beyond)))
    lost = s.WatchChatSessionRequest(session_id=session_id, after_revision=1, epoch=f"0.{'0' * 16}")
    await output.expect_error("HISTORY_CHANGED", read_all(sessions.WatchChatSession(lost)))
    watch = s.WatchChatSessionRequest(session_id=session_id)
    watching = [sessions.WatchChatSession(watch) for _ in range(2)]
    for call in watching:
        await call.read()
    await output.expect_error("QUOTA_EXCEEDED", read_all(sessions.WatchChatSession(watch)))
    await output.wait_for_output("could not poll")
    for call in watching:
        call.cancel()
    locked = [(await api.session()).id for _ in range(12)]
    with session_locked(database, *locked):
        calls = [asyncio.ensure_future(api.message(id_, secret("content"))) for id_ in locked]
        await asyncio.wait(calls)
    for call in calls:
        if call.exception() is not None:
            await output.expect_error("POOL_QUEUE_FULL POOL_TIMEOUT CONTENTION", call)
    long = await api.session()
    many = [r.ChatMessage(content=secret("x") * 300, role=r.CHAT_MESSAGE_ROLE_USER)] * 400
    batch = m.BatchCreateChatMessagesRequest(session_id=long.id, messages=many)
    await api.messages.BatchCreateChatMessages(batch)
    # Without the probe the window stays small, and a reader that stops is soon waited for.
    options = [("grpc.http2.bdp_probe", 0)]
    async with grpc.aio.insecure_channel(api.address, options=options) as channel:
        slow = chat_message_pb2_grpc.ChatMessageServiceStub(channel).ListChatMessages(
            m.ListChatMessagesRequest(session_id=long.id), metadata=api.sessions._metadata
        )
        await slow.read()
        await asyncio.sleep(1.5)
        await output.expect_error("SLOW_READER", read_all(slow))
