"""The rows of tenants, read by plain SQL."""

import dataclasses
from typing import Any

import psycopg
from psycopg import sql

from chat_ticket.v1 import resources_pb2 as r
from support.client import Api, a_file, an_id
from support.drafts import leave_draft
from support.messages import delete_message
from support.tickets import unlink


@dataclasses.dataclass(frozen=True)
class TenantRows:
    """What the database has of some tenants, seen by plain SQL."""

    connection: psycopg.Connection[Any]
    tables: dict[str, list[str]]

    def of(self, *tenants: str) -> list[str]:
        each = [
            sql.SQL(
                "SELECT {} || to_jsonb(t)::text FROM {} t WHERE tenant_id = ANY (%(of)s)"
            ).format(sql.Literal(f"{table} "), sql.Identifier(table))
            for table in self.tables
        ]
        found = self.connection.execute(sql.SQL(" UNION ALL ").join(each), {"of": list(tenants)})
        return sorted(row for (row,) in found)

    def delete(self, *tenants: str) -> None:
        for statement in (
            "UPDATE tickets SET status = 'closed' WHERE tenant_id = ANY (%s)",
            "DELETE FROM chat_sessions WHERE tenant_id = ANY (%s)",
            "DELETE FROM chat_session_tombstones WHERE tenant_id = ANY (%s)",
            "DELETE FROM tickets WHERE tenant_id = ANY (%s)",
            "DELETE FROM ticket_tombstones WHERE tenant_id = ANY (%s)",
        ):
            self.connection.execute(statement, [list(tenants)])


@dataclasses.dataclass(frozen=True)
class TenantIds:
    """The ids of all that a tenant has."""

    tenant: str
    user: str = dataclasses.field(default_factory=an_id)
    session: str = dataclasses.field(default_factory=an_id)
    sharing: str = dataclasses.field(default_factory=an_id)  # another session with the ticket
    bare: str = dataclasses.field(default_factory=an_id)  # a session without one
    message: str = dataclasses.field(default_factory=an_id)
    deleted: str = dataclasses.field(default_factory=an_id)  # a message that was
    file: str = dataclasses.field(default_factory=an_id)
    second: str = dataclasses.field(default_factory=an_id)  # another file of the message
    ticket: str = dataclasses.field(default_factory=an_id)
    external_ref: str = dataclasses.field(default_factory=an_id)
    spare: str = dataclasses.field(default_factory=an_id)  # a ticket without a session
    link: str = dataclasses.field(default_factory=an_id)
    draft: str = dataclasses.field(default_factory=an_id)
    undrafted: str = dataclasses.field(default_factory=an_id)  # of nothing yet

    @property
    def content(self) -> str:
        return f"hello, {self.tenant}"

    def a_file(self, file_id: str = "") -> r.ChatAttachment:
        return a_file(id=file_id, message_id=self.message, file_name=self.tenant)

    async def make(self, api: Api) -> None:
        """All of it, with the tenant's name wherever there is text."""
        for session in (self.session, self.sharing, self.bare):
            await api.session(
                id=session, user_id=self.user, title=self.tenant, labels={"tenant": self.tenant}
            )
        files = [self.a_file(self.file), self.a_file(self.second)]
        await api.message(self.session, self.content, id=self.message, attachments=files)
        await api.message(self.session, self.content, id=self.deleted)
        await delete_message(api, self.deleted)
        await api.message(self.session, self.content)
        ticket = r.Ticket(
            id=self.ticket,
            title=self.tenant,
            status=r.TICKET_STATUS_SOLVED,
            external_ref=self.external_ref,
        )
        await api.escalate(self.session, chat_ticket_id=self.link, ticket=ticket)
        await api.escalate(self.sharing, ticket_id=self.ticket)
        spare = r.Ticket(id=self.spare, title=self.tenant)
        await unlink(api, (await api.escalate(self.bare, ticket=spare)).id)
        await leave_draft(api, self.session, self.content, self.draft)
