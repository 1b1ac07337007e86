"""The id of a deleted session is not used again: by plain SQL, and in races."""

import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest
from psycopg.errors import CheckViolation, RestrictViolation, UniqueViolation
from support.database import wait_until_blocked
from support.plain_rows import Connect, Rows, rejected_by

DELETED = (UniqueViolation, "chat_session_tombstones_pkey")
DELETE = "DELETE FROM chat_sessions WHERE tenant_id = %(tenant)s AND id = %(id)s"
CREATE = """
INSERT INTO chat_sessions (tenant_id, id) VALUES (%(tenant)s, %(id)s)
ON CONFLICT (tenant_id, id) DO NOTHING RETURNING id
"""


def tombstones(us: Rows) -> list[uuid.UUID]:
    statement = "SELECT session_id FROM chat_session_tombstones WHERE tenant_id = %s"
    return sorted(row for (row,) in us.connection.execute(statement, [us.tenant]))


class TestTombstones:
    def test_each_deletion_leaves_one(self, us: Rows, them: Rows) -> None:
        """Of one session, of many, and within a WITH; of no other session."""
        sessions = sorted(us.add("chat_sessions") for _ in range(6))
        theirs = them.add("chat_sessions", id=sessions[0])
        us.delete("chat_sessions", sessions[0])
        us.connection.execute(
            "DELETE FROM chat_sessions WHERE tenant_id = %s AND id = ANY (%s)",
            [us.tenant, sessions[1:4]],
        )
        us.connection.execute(
            f"WITH gone AS ({DELETE} RETURNING id) SELECT FROM gone",
            {"tenant": us.tenant, "id": sessions[4]},
        )
        assert tombstones(us) == sessions[:5]
        assert tombstones(them) == []
        assert them.session(theirs) is not None
        assert us.session(sessions[5]) is not None

    def test_deletion_that_fails_or_is_rolled_back_leaves_none(self, us: Rows) -> None:
        session = us.add("chat_sessions")
        with us.connection.transaction(force_rollback=True):
            us.delete("chat_sessions", session)
            assert tombstones(us) == [session]
        us.add("chat_tickets", session_id=session)
        with rejected_by(RestrictViolation, "chat_sessions_ticket_status_check"):
            us.delete("chat_sessions", session)
        assert tombstones(us) == []

    def test_deletion_beside_an_older_tombstone(self, us: Rows) -> None:
        """A session may be there from a restore. Its tombstone stays as it is."""
        session = us.add("chat_sessions")
        us.add("chat_session_tombstones", session_id=session, deleted_at="2020-01-01Z")
        us.delete("chat_sessions", session)
        assert tombstones(us) == [session]

    def test_id_is_refused_while_the_tombstone_is_there(self, us: Rows, them: Rows) -> None:
        """Also among others, also where a conflict is ignored. Another tenant can have it."""
        session = us.add("chat_sessions")
        us.delete("chat_sessions", session)
        with rejected_by(*DELETED):
            us.add("chat_sessions", id=session)
        with rejected_by(*DELETED):
            us.connection.execute(CREATE, {"tenant": us.tenant, "id": session})
        with rejected_by(*DELETED):
            us.connection.execute(
                "INSERT INTO chat_sessions (tenant_id, id) SELECT %s, unnest(%s::uuid[])",
                [us.tenant, [uuid.uuid4(), session]],
            )
        assert us.count("chat_sessions") == 0
        them.add("chat_sessions", id=session)
        us.connection.execute(
            "DELETE FROM chat_session_tombstones WHERE tenant_id = %s", [us.tenant]
        )
        us.add("chat_sessions", id=session)

    def test_no_session_changes_its_id(self, us: Rows) -> None:
        """So none takes that of a deleted one, nor leaves its own without a tombstone."""
        session = us.add("chat_sessions")
        dead = us.add("chat_session_tombstones")
        with rejected_by(CheckViolation, "chat_sessions_keys_check"):
            us.set("chat_sessions", session, id=dead)
        us.set("chat_sessions", session, id=session)

    def test_temporary_table_hides_no_tombstone(self, us: Rows) -> None:
        """Both rules use the service's table, whatever the connection has."""
        session = us.add("chat_sessions")
        us.connection.execute(
            "CREATE TEMP TABLE chat_session_tombstones (LIKE public.chat_session_tombstones)"
        )
        us.delete("chat_sessions", session)
        with rejected_by(*DELETED):
            us.add("chat_sessions", id=session)


class TestRaces:
    @pytest.mark.parametrize("committed", [True, False])
    def test_create_that_waited_for_the_deletion(
        self, us: Rows, connect: Connect, committed: bool
    ) -> None:
        """It is refused. When the deletion is rolled back, it finds the session."""
        session = us.add("chat_sessions")
        values = {"tenant": us.tenant, "id": session}
        deleting, creating = connect(), connect()
        with ThreadPoolExecutor(1) as pool:
            deleting.execute("BEGIN")
            deleting.execute(DELETE, values)
            waiting = pool.submit(creating.execute, CREATE, values)
            wait_until_blocked(us.connection, creating)
            deleting.execute("COMMIT" if committed else "ROLLBACK")
            if committed:
                with rejected_by(*DELETED):
                    waiting.result()
            else:
                assert waiting.result().fetchall() == []
        assert us.count("chat_sessions") == (0 if committed else 1)

    def test_create_of_what_is_created_and_deleted_in_one_transaction(
        self, us: Rows, connect: Connect
    ) -> None:
        """Nobody has seen the session, and its id is not free all the same."""
        values = {"tenant": us.tenant, "id": uuid.uuid4()}
        holder, creating = connect(), connect()
        with ThreadPoolExecutor(1) as pool:
            holder.execute("BEGIN")
            holder.execute(CREATE, values)
            holder.execute(DELETE, values)
            waiting = pool.submit(creating.execute, CREATE, values)
            wait_until_blocked(us.connection, creating)
            holder.execute("COMMIT")
            with rejected_by(*DELETED):
                waiting.result()
