"""Concurrent transactions that the rules of the schema have to serialize."""

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any, LiteralString

import psycopg
import pytest
from psycopg.errors import (
    CheckViolation,
    ForeignKeyViolation,
    RestrictViolation,
    UniqueViolation,
)
from support.database import wait_until_blocked
from support.plain_rows import Connect, Rows, rejected_by

INSERT_LINK = """
INSERT INTO chat_tickets (tenant_id, session_id, ticket_id)
VALUES (%(tenant)s, %(session)s, %(ticket)s)
"""


DELETE_LINK = "DELETE FROM chat_tickets WHERE tenant_id = %(tenant)s AND session_id = %(session)s"
ARCHIVE_SESSION = """
UPDATE chat_sessions SET status = 'archived', revision = revision + 1
 WHERE tenant_id = %(tenant)s AND id = %(session)s
RETURNING has_ticket
"""


DELETE_SESSION = "DELETE FROM chat_sessions WHERE tenant_id = %(tenant)s AND id = %(session)s"
INSERT_MESSAGE = """
INSERT INTO chat_messages (tenant_id, session_id, sequence, revision, role, content)
VALUES (%(tenant)s, %(session)s, 1, 1, 'user', 'hello')
"""


REOPEN_TICKET = (
    "UPDATE tickets SET status = 'open' WHERE tenant_id = %(tenant)s AND id = %(ticket)s"
)
DELETE_TICKET = "DELETE FROM tickets WHERE tenant_id = %(tenant)s AND id = %(ticket)s"
ARCHIVED = (CheckViolation, "chat_tickets_session_status_check")
ACTIVE = (RestrictViolation, "chat_sessions_ticket_status_check")
LINKED = (UniqueViolation, "idx_chat_tickets_session")
NO_SESSION = (ForeignKeyViolation, "fk_chat_tickets_session")
NO_TICKET = (ForeignKeyViolation, "fk_chat_tickets_ticket")
NO_SESSION_OF_MESSAGE = (ForeignKeyViolation, "fk_chat_messages_session")


class TestRaces:
    @pytest.mark.parametrize("committed", [True, False], ids=["committed", "rolled back"])
    @pytest.mark.parametrize(
        ("linked", "first", "second", "refusal"),
        [
            # An open ticket, not linked yet.
            pytest.param(False, INSERT_LINK, ARCHIVE_SESSION, None, id="link, archive"),
            pytest.param(False, ARCHIVE_SESSION, INSERT_LINK, ARCHIVED, id="archive, link"),
            pytest.param(False, INSERT_LINK, DELETE_SESSION, ACTIVE, id="link, delete"),
            pytest.param(False, DELETE_SESSION, INSERT_LINK, NO_SESSION, id="delete, link"),
            pytest.param(False, INSERT_LINK, INSERT_LINK, LINKED, id="link, link"),
            pytest.param(False, INSERT_LINK, DELETE_TICKET, NO_TICKET, id="link, drop ticket"),
            pytest.param(False, DELETE_TICKET, INSERT_LINK, NO_TICKET, id="drop ticket, link"),
            pytest.param(
                False, DELETE_SESSION, INSERT_MESSAGE, NO_SESSION_OF_MESSAGE, id="delete, say"
            ),
            pytest.param(False, INSERT_MESSAGE, DELETE_SESSION, None, id="say, delete"),
            # A closed ticket, linked already.
            pytest.param(True, REOPEN_TICKET, DELETE_SESSION, ACTIVE, id="reopen, delete"),
            pytest.param(True, DELETE_SESSION, REOPEN_TICKET, None, id="delete, reopen"),
            pytest.param(True, DELETE_LINK, ARCHIVE_SESSION, None, id="unlink, archive"),
            pytest.param(True, DELETE_LINK, DELETE_SESSION, None, id="unlink, delete"),
            pytest.param(True, DELETE_SESSION, DELETE_LINK, None, id="delete, unlink"),
        ],
    )
    def test_second_transaction_waits_and_sees_the_first(
        self,
        us: Rows,
        connect: Connect,
        linked: bool,
        first: LiteralString,
        second: LiteralString,
        refusal: tuple[type[psycopg.Error], str] | None,
        committed: bool,
    ) -> None:
        """It is rejected as if it had come later; a rollback of the first leaves it free."""
        session = us.add("chat_sessions")
        ticket = us.add("tickets", status="closed" if linked else "open")
        if linked:
            us.add("chat_tickets", session_id=session, ticket_id=ticket)
        values = {"tenant": us.tenant, "session": session, "ticket": ticket}
        holder, waiter = connect(), connect()
        with ThreadPoolExecutor(1) as pool:
            holder.execute("BEGIN")
            holder.execute(first, values)
            waiting = pool.submit(waiter.execute, second, values)
            wait_until_blocked(us.connection, waiter)
            holder.execute("COMMIT" if committed else "ROLLBACK")
            with rejected_by(*refusal) if committed and refusal else contextlib.nullcontext():
                waiting.result()
        assert us.wrong_flags() == []

    def test_link_archive_and_delete_started_together(self, us: Rows, connect: Connect) -> None:
        """In any order, no link is lost, and none is created after archiving."""
        rounds = 50
        sessions = [us.add("chat_sessions") for _ in range(rounds)]
        tickets = [us.add("tickets") for _ in range(rounds)]
        start = threading.Barrier(3, timeout=20)

        def run(statement: LiteralString) -> list[Any]:
            """What each round of the statement returned, or the constraint that rejected it."""
            connection = connect()
            outcomes: list[Any] = []
            for session, ticket in zip(sessions, tickets, strict=True):
                values = {"tenant": us.tenant, "session": session, "ticket": ticket}
                start.wait()
                try:
                    cursor = connection.execute(statement, values)
                    outcomes.append(
                        cursor.fetchone() if cursor.description else cursor.rowcount == 1
                    )
                except psycopg.errors.IntegrityError as error:
                    outcomes.append(error.diag.constraint_name)
            return outcomes

        with ThreadPoolExecutor(3) as pool:
            links, archives, deletes = pool.map(run, (INSERT_LINK, ARCHIVE_SESSION, DELETE_SESSION))
        for session, link, archive, delete in zip(sessions, links, archives, deletes, strict=True):
            now = us.session(session)
            if link is True:
                assert delete == "chat_sessions_ticket_status_check"
                assert archive == (True,), "linked after it was archived"
                assert now == ("archived", True, 2)
            else:
                assert link in ("chat_tickets_session_status_check", "fk_chat_tickets_session")
                assert (delete, now) == (True, None)
                assert archive in ((False,), None)
        assert us.count("chat_tickets") == links.count(True)
        assert us.count("tickets") == rounds
