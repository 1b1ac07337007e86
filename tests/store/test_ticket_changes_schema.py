"""A change of a ticket is a change of its sessions: by plain SQL, and in races."""

import contextlib
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import Any, LiteralString

import psycopg
import pytest
from psycopg.errors import CheckViolation, DeadlockDetected
from support.database import wait_until_blocked
from support.plain_rows import Connect, Rows, rejected_by

CHANGE = "UPDATE tickets SET status = 'solved' WHERE tenant_id = %(tenant)s AND id = %(ticket)s"
LINK = """
INSERT INTO chat_tickets (tenant_id, session_id, ticket_id)
VALUES (%(tenant)s, %(session)s, %(ticket)s)
"""
UNLINK = "DELETE FROM chat_tickets WHERE tenant_id = %(tenant)s AND session_id = %(session)s"
# As the service does before it changes a ticket.
LOCK_LINKED = """
SELECT FROM chat_sessions s
 WHERE tenant_id = %(tenant)s
   AND id IN (SELECT session_id FROM chat_tickets
               WHERE tenant_id = %(tenant)s AND ticket_id = %(ticket)s)
 ORDER BY id
   FOR UPDATE
"""
SET_STATUS = (
    "UPDATE tickets SET status = %(status)s WHERE tenant_id = %(tenant)s AND id = %(ticket)s"
)
READ = """
SELECT s.revision, t.status
  FROM chat_sessions s
  LEFT JOIN chat_tickets ct ON ct.tenant_id = s.tenant_id AND ct.session_id = s.id
  LEFT JOIN tickets t ON t.tenant_id = ct.tenant_id AND t.id = ct.ticket_id
 WHERE s.tenant_id = %(tenant)s AND s.id = %(session)s
"""


def revision(us: Rows, ticket: uuid.UUID) -> int:
    statement = "SELECT revision FROM tickets WHERE tenant_id = %s AND id = %s"
    [[found]] = us.connection.execute(statement, [us.tenant, ticket]).fetchall()
    return int(found)


class TestRevision:
    def test_each_change_is_one(self, us: Rows) -> None:
        """Whatever the statement sets, also to the revision. Equal values are no change."""
        ticket = us.add("tickets")
        for columns, expected in (
            ({"title": "b"}, 1),
            ({"title": "b"}, 1),
            ({"title": "c", "status": "pending", "external_ref": "ZD-1"}, 2),
            ({"external_ref": None}, 3),
            ({"external_ref": None, "title": "c"}, 3),
            ({"title": "d", "revision": 99}, 4),
            ({"updated_at": "2999-01-01Z"}, 4),
        ):
            us.set("tickets", ticket, **columns)
            assert revision(us, ticket) == expected
        with rejected_by(CheckViolation, "tickets_revision_check"):
            us.set("tickets", ticket, revision=-1)

    def test_link_is_no_change_of_the_ticket(self, us: Rows) -> None:
        ticket = us.add("tickets")
        us.delete("chat_tickets", us.add("chat_tickets", ticket_id=ticket))
        assert revision(us, ticket) == 0


class TestSessions:
    def test_each_linked_session_takes_one_revision(self, us: Rows, them: Rows) -> None:
        """Of whatever status, and no other session. The time of its last change moves too."""
        ticket = us.add("tickets")
        linked = [us.add("chat_sessions") for _ in range(3)]
        for session in linked:
            us.add("chat_tickets", session_id=session, ticket_id=ticket)
        us.set("chat_sessions", linked[1], status="resolved")
        us.set("chat_sessions", linked[2], status="archived")
        other, unlinked = us.add("chat_sessions"), us.add("chat_sessions")
        us.add("chat_tickets", session_id=other)
        us.delete("chat_tickets", us.add("chat_tickets", session_id=unlinked, ticket_id=ticket))
        theirs = them.add("chat_sessions", id=linked[0])
        them.add("chat_tickets", session_id=theirs, ticket_id=them.add("tickets", id=ticket))
        times = "SELECT updated_at FROM chat_sessions WHERE tenant_id = %s ORDER BY id"
        before = us.connection.execute(times, [us.tenant]).fetchall()
        us.set("tickets", ticket, title="b", status="pending")
        after = us.connection.execute(times, [us.tenant]).fetchall()
        assert [us.session(session)[2] for session in linked] == [2, 2, 2]
        assert (us.session(other)[2], us.session(unlinked)[2], them.session(theirs)[2]) == (1, 2, 1)
        assert sum(a > b for a, b in zip(after, before, strict=True)) == 3
        for columns in ({"title": "b"}, {"status": "pending"}, {"updated_at": "2999-01-01Z"}):
            us.set("tickets", ticket, **columns)
        assert [us.session(session)[2] for session in linked] == [2, 2, 2]

    def test_change_that_is_rolled_back(self, us: Rows) -> None:
        """Neither the ticket nor its session has changed."""
        ticket, session = us.add("tickets"), us.add("chat_sessions")
        us.add("chat_tickets", session_id=session, ticket_id=ticket)
        with us.connection.transaction(force_rollback=True):
            us.set("tickets", ticket, external_ref="ZD-1")
            assert (revision(us, ticket), us.session(session)[2]) == (1, 2)
        assert (revision(us, ticket), us.session(session)[2]) == (0, 1)

    def test_temporary_tables_hide_no_session(self, us: Rows) -> None:
        """The rule looks at the service's links and sessions, whatever the connection has."""
        ticket, session = us.add("tickets"), us.add("chat_sessions")
        us.add("chat_tickets", session_id=session, ticket_id=ticket)
        for hidden in ("chat_sessions", "chat_tickets"):
            us.connection.execute(f"CREATE TEMP TABLE {hidden} (LIKE public.{hidden})")  # type: ignore[arg-type]
        us.set("tickets", ticket, status="closed")
        us.connection.execute("DROP TABLE pg_temp.chat_sessions")
        assert us.session(session)[2] == 2


class TestRaces:
    @pytest.mark.parametrize("committed", [True, False], ids=["committed", "rolled back"])
    @pytest.mark.parametrize(
        ("first", "second"), [(CHANGE, LINK), (LINK, CHANGE)], ids=["change, link", "link, change"]
    )
    def test_link_and_change_at_once(
        self,
        us: Rows,
        connect: Connect,
        first: LiteralString,
        second: LiteralString,
        committed: bool,
    ) -> None:
        """The second waits. Its session ends at a revision which no reader saw before the change.

        So a follower that reads the session and the ticket at each revision learns of the change.
        """
        ticket, session = us.add("tickets"), us.add("chat_sessions")
        values = {"tenant": us.tenant, "session": session, "ticket": ticket}
        holder, waiter = connect(), connect()
        seen: list[Any] = []

        def look() -> None:
            seen.extend(us.connection.execute(READ, values).fetchall())

        with ThreadPoolExecutor(1) as pool:
            holder.execute("BEGIN")
            holder.execute(first, values)
            waiting = pool.submit(waiter.execute, second, values)
            wait_until_blocked(us.connection, waiter)
            look()
            holder.execute("COMMIT" if committed else "ROLLBACK")
            waiting.result()
        look()
        assert seen[0] == (0, None)
        if committed:
            assert seen[1] == (1 if first == CHANGE else 2, "solved")
        elif second == LINK:
            assert seen[1] == (1, "open")
        else:
            assert seen[1] == (0, None)

    def test_reader_never_sees_two_states_at_one_revision(self, us: Rows, connect: Connect) -> None:
        """While links, ends of links and changes of the ticket run at once, in any order."""
        rounds = 60
        session = us.add("chat_sessions")
        values = {"tenant": us.tenant, "session": session, "ticket": us.add("tickets")}

        def until_done(
            connection: psycopg.Connection[Any],
            *statements: LiteralString,
            values: dict[str, Any] = values,
        ) -> None:
            while True:
                with contextlib.suppress(DeadlockDetected), connection.transaction():
                    for statement in statements:
                        connection.execute(statement, values)
                    return

        def change() -> None:
            connection = connect()
            for n in range(rounds):
                to_this = values | {"status": ("open", "solved")[n % 2]}
                until_done(connection, LOCK_LINKED, SET_STATUS, values=to_this)

        def link() -> None:
            connection = connect()
            for _ in range(rounds):
                for statement in (LINK, UNLINK):
                    until_done(connection, statement)

        seen: dict[int, set[Any]] = {}
        with ThreadPoolExecutor(2) as pool:
            running = [pool.submit(change), pool.submit(link)]
            while not all(future.done() for future in running):
                [(number, status)] = us.connection.execute(READ, values).fetchall()
                seen.setdefault(number, set()).add(status)
            for future in running:
                future.result()
        assert len(seen) > 1
        assert {number: states for number, states in seen.items() if len(states) > 1} == {}

    def test_change_by_an_older_server_and_by_a_newer_one_at_once(
        self, us: Rows, connect: Connect
    ) -> None:
        """It locks the ticket first. A deadlock ends one of them, which finds nothing half-done."""
        sessions = [us.add("chat_sessions") for _ in range(2)]
        ticket = us.add("tickets")
        for session in sessions:
            us.add("chat_tickets", session_id=session, ticket_id=ticket)
        newer, older = connect(), connect()
        values = {"tenant": us.tenant, "ticket": ticket}
        lock = "SELECT FROM chat_sessions WHERE tenant_id = %(tenant)s ORDER BY id FOR UPDATE"
        with ThreadPoolExecutor(1) as pool:
            newer.execute("BEGIN")
            newer.execute(lock, values)
            waiting = pool.submit(older.execute, CHANGE, values)
            wait_until_blocked(us.connection, older)
            refused = 0
            try:
                newer.execute(CHANGE, values)
                newer.execute("COMMIT")
            except DeadlockDetected:
                newer.execute("ROLLBACK")
                refused += 1
            try:
                waiting.result()
            except DeadlockDetected:
                refused += 1
        assert refused == 1
        assert revision(us, ticket) == 1
        assert [us.session(session)[2] for session in sessions] == [2, 2]
