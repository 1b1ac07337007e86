"""The service on every supported version of PostgreSQL, and in every schema."""

import re
import uuid
from urllib.parse import urlsplit

from google.protobuf.field_mask_pb2 import FieldMask
from grpc import StatusCode
from support.client import Api, a_file, refused
from support.cluster import Cluster
from support.database import execute
from support.process import command
from support.server import serving

from chat_ticket.v1 import resources_pb2 as r
from chat_ticket.v1.chat_message_pb2 import ListChatMessagesRequest, SearchChatMessagesRequest
from chat_ticket.v1.chat_session_pb2 import DeleteChatSessionRequest, WatchChatSessionRequest
from chat_ticket.v1.chat_ticket_pb2 import UpdateTicketRequest
from chat_ticket_svc.commands import migrate


async def test_service_runs_on_every_supported_postgresql(url: str, tenant: str) -> None:
    """All steps of a conversation work on the oldest version and on the newest."""
    await converse(url, tenant)


async def test_service_runs_in_a_schema_of_its_own(cluster: Cluster, tenant: str) -> None:
    """A role that owns nothing but a schema migrates, checks, serves and erases."""
    name = f"own_{uuid.uuid4().hex}"
    cluster.execute(f"CREATE ROLE {name} LOGIN")
    cluster.execute(f"CREATE DATABASE {name}")
    url = cluster.url(name)
    execute(
        url,
        "CREATE EXTENSION btree_gin",
        f'CREATE SCHEMA "Its ""own" AUTHORIZATION {name}',
        f'ALTER ROLE {name} IN DATABASE {name} SET search_path = "Its ""own"',
    )
    own = urlsplit(url)._replace(netloc=f"{name}@").geturl()
    try:
        assert migrate.up(own, quiet=True) == 0
        await converse(own, tenant)
        checked = await command("check", DATABASE_URL=own, CHAT_TICKET_PORT="1")
        assert re.search(r"^ok +schema .*^ok +write ", checked.output, re.MULTILINE | re.DOTALL)
        erased = await command("erase", "--tenant", tenant, "--yes", DATABASE_URL=own)
        assert erased.status == 0, erased
    finally:
        cluster.drop(url)
        cluster.execute(f"DROP ROLE {name}")


async def converse(url: str, tenant: str) -> None:
    """Take all steps of a conversation on a server on this database."""
    async with serving(url) as server, Api(f"127.0.0.1:{server.port}", tenant) as api:
        session = await api.session()
        content = "my invoice is wrong"
        sent = await api.message(
            session.id, content, metadata_json='{"n":1}', attachments=[a_file()]
        )
        await api.attachment(sent.id, file_name="b.png")

        def names(message: r.ChatMessage) -> list[str]:
            return [attachment.file_name for attachment in message.attachments]

        listing = api.messages.ListChatMessages(ListChatMessagesRequest(session_id=session.id))
        listed = [message async for response in listing for message in response.messages]
        assert [(m.content, names(m)) for m in listed] == [(content, ["a.png", "b.png"])]

        watched = []
        watch = api.sessions.WatchChatSession(WatchChatSessionRequest(session_id=session.id))
        async for response in watch:
            watched += response.messages_created.messages
            if response.HasField("caught_up"):
                break
        watch.cancel()
        assert watched == listed

        found = await api.messages.SearchChatMessages(SearchChatMessagesRequest(query="invoices"))
        assert [hit.message_id for hit in found.hits] == [sent.id]

        ticket = (await api.escalate(session.id)).ticket
        delete = DeleteChatSessionRequest(session_id=session.id)
        with refused(StatusCode.FAILED_PRECONDITION, "SESSION_HAS_ACTIVE_TICKET"):
            await api.sessions.DeleteChatSession(delete)
        ticket.status = r.TICKET_STATUS_CLOSED
        mask = FieldMask(paths=["status"])
        await api.tickets.UpdateTicket(UpdateTicketRequest(ticket=ticket, update_mask=mask))
        await api.sessions.DeleteChatSession(delete)
        found = await api.messages.SearchChatMessages(SearchChatMessagesRequest(query="invoices"))
        assert not found.hits
