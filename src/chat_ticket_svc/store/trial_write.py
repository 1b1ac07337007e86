"""A write that is rolled back, which shows whether this role can write to this schema."""

import re
import uuid

import psycopg

from chat_ticket_svc.config import ConfigurationError
from chat_ticket_svc.store.connection import connect, connection_string
from chat_ticket_svc.store.connection_errors import unreachable
from chat_ticket_svc.store.driver_errors import describe

STATEMENT_TIMEOUT_MS = 2000
LOCK_TIMEOUT_MS = 1000

# Each right on each table that the service needs, and each trigger.
STATEMENTS = (
    "INSERT INTO chat_sessions (tenant_id, id) VALUES (%(tenant_id)s, %(session_id)s)",
    """
    UPDATE chat_sessions SET revision = 1, updated_at = next_change_time(updated_at)
     WHERE tenant_id = %(tenant_id)s AND id = %(session_id)s
    """,
    """
    INSERT INTO chat_messages (tenant_id, session_id, id, sequence, revision, role, content)
    VALUES (%(tenant_id)s, %(session_id)s, %(message_id)s, 1, 1, 'user', 'hello')
    """,
    """
    UPDATE chat_messages SET metadata = '{}'
     WHERE tenant_id = %(tenant_id)s AND id = %(message_id)s
    """,
    """
    INSERT INTO chat_drafts (tenant_id, session_id, id, role, expires_at)
    VALUES (%(tenant_id)s, %(session_id)s, %(draft_id)s, 'assistant', now())
    """,
    """
    UPDATE chat_drafts SET fencing_token = 2, length = 5
     WHERE tenant_id = %(tenant_id)s AND id = %(draft_id)s
    """,
    """
    INSERT INTO chat_draft_pieces (tenant_id, draft_id, start_offset, content)
    VALUES (%(tenant_id)s, %(draft_id)s, 0, 'hello')
    """,
    """
    SELECT FROM chat_draft_pieces
     WHERE tenant_id = %(tenant_id)s AND draft_id = %(draft_id)s
    """,
    # Its pieces are deleted with it.
    "DELETE FROM chat_drafts WHERE tenant_id = %(tenant_id)s AND id = %(draft_id)s",
    """
    INSERT INTO chat_attachments (tenant_id, message_id, file_url, file_name, file_type)
    VALUES (%(tenant_id)s, %(message_id)s, 'https://example.com/a', 'a', 'text/plain')
    """,
    "INSERT INTO tickets (tenant_id, id, title) VALUES (%(tenant_id)s, %(ticket_id)s, 'hello')",
    """
    INSERT INTO chat_tickets (tenant_id, session_id, ticket_id)
    VALUES (%(tenant_id)s, %(session_id)s, %(ticket_id)s)
    """,
    """
    UPDATE tickets SET status = 'closed'
     WHERE tenant_id = %(tenant_id)s AND id = %(ticket_id)s
    """,
    "DELETE FROM chat_tickets WHERE tenant_id = %(tenant_id)s AND session_id = %(session_id)s",
    "DELETE FROM tickets WHERE tenant_id = %(tenant_id)s AND id = %(ticket_id)s",
    "DELETE FROM chat_attachments WHERE tenant_id = %(tenant_id)s AND message_id = %(message_id)s",
    "DELETE FROM chat_messages WHERE tenant_id = %(tenant_id)s AND id = %(message_id)s",
    """
    INSERT INTO chat_message_tombstones (tenant_id, session_id, message_id, revision)
    VALUES (%(tenant_id)s, %(session_id)s, %(message_id)s, 1)
    """,
    # A message takes the search language that is set for its tenant.
    "SELECT FROM tenant_settings WHERE tenant_id = %(tenant_id)s",
    "DELETE FROM chat_sessions WHERE tenant_id = %(tenant_id)s AND id = %(session_id)s",
    # A trigger has left it. A sweep locks it first.
    """
    SELECT FROM chat_session_tombstones
     WHERE tenant_id = %(tenant_id)s AND session_id = %(session_id)s FOR UPDATE
    """,
    """
    DELETE FROM chat_session_tombstones
     WHERE tenant_id = %(tenant_id)s AND session_id = %(session_id)s
    """,
    """
    SELECT FROM ticket_tombstones
     WHERE tenant_id = %(tenant_id)s AND ticket_id = %(ticket_id)s FOR UPDATE
    """,
    """
    DELETE FROM ticket_tombstones
     WHERE tenant_id = %(tenant_id)s AND ticket_id = %(ticket_id)s
    """,
    # The sweep notes how far it has come. No row is locked here: that would hold up a sweep.
    "UPDATE chat_epochs SET swept_position = 0 WHERE ordinal = 0",
)


async def try_write(url: str, tenant_id: str) -> None:
    """Insert, change and delete a row of each table in a transaction, and roll it back.

    Nobody sees the rows, and nobody is notified. Raises ConfigurationError with PostgreSQL's reason
    if a statement is refused, and UnavailableError if the database cannot be reached.
    """
    ids = {name: uuid.uuid4() for name in ("session_id", "message_id", "draft_id", "ticket_id")}
    conninfo = connection_string(
        url, statement_timeout=STATEMENT_TIMEOUT_MS, lock_timeout=LOCK_TIMEOUT_MS
    )
    try:
        async with (
            await connect(conninfo) as connection,
            connection.transaction(force_rollback=True),
        ):
            for statement in STATEMENTS:
                await connection.execute(statement, {"tenant_id": tenant_id, **ids})
    except psycopg.Error as error:
        if error.sqlstate is None:
            raise unreachable(error) from error
        function = re.search(r"function (.+?\(\))", error.diag.context or "")
        where = f", in {function[1]}" if function else ""
        reason = describe(error.sqlstate, error.diag.message_primary or "")
        raise ConfigurationError(f"a write is refused: {reason}{where}") from error
