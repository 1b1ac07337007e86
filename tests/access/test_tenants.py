"""Two tenants that use the same ids for everything stay isolated from each other."""

from typing import Any

import pytest
from support.client import Api, a_file, an_id
from test_attachments import delete as delete_file
from test_list_messages import batches
from test_messages import delete, get, set_metadata
from test_notifications import pair, shared  # noqa: F401 - fixtures
from test_sessions import RESOLVED, set_status
from test_tickets import delete as delete_ticket
from test_tickets import delete_session, session_of, unlink, update
from test_watch import watching

from chat_ticket.v1 import resources_pb2 as r
from chat_ticket.v1.chat_attachment_pb2 import (
    GetChatAttachmentRequest,
    ListChatAttachmentsRequest,
)
from chat_ticket.v1.chat_message_pb2 import (
    SearchChatMessagesRequest,
)
from chat_ticket.v1.chat_session_pb2 import ListChatSessionsRequest
from chat_ticket.v1.chat_ticket_pb2 import (
    ListChatTicketsRequest,
    ListTicketsRequest,
)

Ids = dict[str, str]


async def world(api: Api, ids: Ids) -> None:
    """Create a session, messages, a file and a ticket with these ids. Repeating it is a no-op."""
    await api.session(id=ids["session"])
    file = a_file(id=ids["file"], file_name=api.tenant)
    await api.message(ids["session"], api.tenant, id=ids["message"], attachments=[file])
    await api.message(ids["session"], api.tenant, id=ids["second"])
    ticket = r.Ticket(id=ids["ticket"], title=api.tenant)
    await api.escalate(ids["session"], chat_ticket_id=ids["link"], ticket=ticket)


async def everything(api: Api, ids: Ids) -> list[Any]:
    """The results of every read of these ids, and the events that watchers receive."""
    files, links = api.attachments.ListChatAttachments, api.tickets.ListChatTickets
    found: list[Any] = [
        await session_of(api, ids["session"]),
        await get(api, ids["message"]),
        await api.attachments.GetChatAttachment(
            GetChatAttachmentRequest(attachment_id=ids["file"])
        ),
        await files(ListChatAttachmentsRequest(message_id=ids["message"])),
        await files(ListChatAttachmentsRequest(session_id=ids["session"])),
        await links(ListChatTicketsRequest(session_id=ids["session"])),
        await links(ListChatTicketsRequest(ticket_id=ids["ticket"])),
        await api.tickets.ListTickets(ListTicketsRequest()),
        await api.sessions.ListChatSessions(ListChatSessionsRequest()),
        await api.messages.SearchChatMessages(
            SearchChatMessagesRequest(query="tenant or stranger")
        ),
        *[await batches(api, ids["session"], order=order) for order in (1, 2)],
    ]
    for after in (0, 3):
        async with watching(api, ids["session"], after) as watcher:
            while "caught_up" not in watcher.kinds:
                found.append(await watcher.next())
    return found


@pytest.mark.parametrize("but", ["none", "session"])
async def test_same_ids_in_two_tenants_stay_apart(api: Api, other: Api, but: str) -> None:
    """Whatever one tenant does to its rows, the other's rows with the same ids do not change."""
    names = ("session", "message", "second", "file", "ticket", "link")
    their_ids = {name: an_id() for name in names}
    ids = {**their_ids, but: an_id()}
    await world(other, their_ids)
    theirs = await everything(other, their_ids)
    await world(api, ids)
    assert other.tenant not in str(await everything(api, ids))
    ticket = r.Ticket(id=ids["ticket"], title=api.tenant)
    assert (await api.escalate(ids["session"], ticket=ticket)).ticket.tenant_id == api.tenant
    message = await set_metadata(api, ids["message"], "{}")
    assert await set_metadata(api, ids["message"], "{}") == message, "theirs has none"
    for _ in range(19):
        file_id = (await api.attachment(ids["message"])).id
    for change in (
        lambda: world(api, ids),
        lambda: set_status(api, ids["session"], RESOLVED),
        lambda: update(api, ids["ticket"], title="mine"),
        lambda: delete_file(api, file_id),
        lambda: delete_file(api, ids["file"]),
        lambda: delete(api, ids["message"]),
        lambda: unlink(api, ids["link"]),
        lambda: delete_ticket(api, ids["ticket"]),
        lambda: delete_session(api, ids["session"]),
    ):
        await change()
        await world(other, their_ids)
        assert await everything(other, their_ids) == theirs
