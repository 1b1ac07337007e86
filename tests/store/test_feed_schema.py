"""Positions in the change feed and epochs, which triggers write, whoever changes the rows."""

import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest
from psycopg import sql
from psycopg.types.json import Jsonb
from support.cluster import Cluster
from support.database import execute, wait_until_blocked
from support.plain_rows import ID_COLUMNS, Connect, Rows

from chat_ticket_svc.commands import migrate


def position(rows: Rows, table: str, row_id: uuid.UUID) -> int | None:
    """The position of a row, whose bucket is the one that follows from it. None if it is absent."""
    found = rows.connection.execute(
        sql.SQL(
            "SELECT feed_position, feed_bucket FROM {} WHERE tenant_id = %s AND {} = %s"
        ).format(sql.Identifier(table), sql.Identifier(ID_COLUMNS.get(table, "id"))),
        [rows.tenant, row_id],
    ).fetchone()
    if found is None:
        return None
    assert found[1] == found[0] >> 16
    return int(found[0])


def current(rows: Rows) -> int:
    """The position of what this transaction changes."""
    [(found,)] = rows.connection.execute("SELECT current_feed_position()").fetchall()
    return int(found)


def epochs(rows: Rows) -> list[str]:
    """The ids of all epochs, in order."""
    found = rows.connection.execute("SELECT id FROM chat_epochs ORDER BY ordinal")
    return [id_ for (id_,) in found]


def filter_of(rows: Rows, session_id: uuid.UUID) -> Any:
    """(filter_position, filter_before) of a session."""
    return rows.connection.execute(
        "SELECT filter_position, filter_before FROM chat_sessions WHERE tenant_id = %s AND id = %s",
        [rows.tenant, session_id],
    ).fetchone()


def epoch_of(rows: Rows, session_id: uuid.UUID) -> str:
    [(found,)] = rows.connection.execute(
        "SELECT epoch FROM chat_sessions WHERE tenant_id = %s AND id = %s",
        [rows.tenant, session_id],
    ).fetchall()
    return str(found)


class TestPositions:
    def test_each_change_of_a_session_moves_it(self, us: Rows) -> None:
        """By the statements of any server, and no other session."""
        session, other = us.add("chat_sessions"), us.add("chat_sessions")
        ticket = us.add("tickets")
        last = before = position(us, "chat_sessions", other)
        of_ticket = position(us, "tickets", ticket)
        link = uuid.uuid4()
        for change in (
            lambda: us.set("chat_sessions", session, revision=1),
            lambda: us.set("chat_sessions", session, title="Invoice"),
            lambda: us.add("chat_tickets", id=link, session_id=session, ticket_id=ticket),
            lambda: us.delete("chat_tickets", link),
        ):
            with us.connection.transaction():
                change()
                assert position(us, "chat_sessions", session) == current(us)
            assert current(us) > (last or 0)
            last = position(us, "chat_sessions", session)
        assert position(us, "chat_sessions", other) == before
        assert position(us, "tickets", ticket) == of_ticket

    def test_change_of_a_ticket_moves_its_sessions_too(self, us: Rows) -> None:
        """As it is one of theirs. A deletion of a session leaves the ticket where it is."""
        ticket = us.add("tickets")
        sessions = [us.add("chat_sessions") for _ in range(2)]
        for session in sessions:
            us.add("chat_tickets", session_id=session, ticket_id=ticket)
        with us.connection.transaction():
            us.set("tickets", ticket, status="closed")
            moved = current(us)
        rows = [("tickets", ticket), *(("chat_sessions", session) for session in sessions)]
        assert [position(us, *row) for row in rows] == [moved] * 3
        us.delete("chat_sessions", sessions[0])
        assert [position(us, *row) for row in rows] == [moved, None, moved]

    @pytest.mark.parametrize(
        ("table", "tombstones"),
        [("chat_sessions", "chat_session_tombstones"), ("tickets", "ticket_tombstones")],
    )
    def test_deletion_has_a_position(
        self, us: Rows, them: Rows, table: str, tombstones: str
    ) -> None:
        """Of one row and of several. One that is rolled back leaves no tombstone."""
        ids = [us.add(table) for _ in range(3)]
        them.add(table, id=ids[0])
        with us.connection.transaction(force_rollback=True):
            us.delete(table, ids[0])
        assert position(us, tombstones, ids[0]) is None
        with us.connection.transaction():
            us.connection.execute(
                sql.SQL("DELETE FROM {} WHERE tenant_id = %s AND id = ANY (%s)").format(
                    sql.Identifier(table)
                ),
                [us.tenant, ids[:2]],
            )
            deleted = current(us)
        assert [position(us, tombstones, id_) for id_ in ids] == [deleted, deleted, None]
        assert position(them, tombstones, ids[0]) is None

    def test_ticket_id_that_is_used_again(self, us: Rows) -> None:
        """The second deletion is told too, and its tombstone stays as long as any other."""
        ticket = us.add("tickets")
        us.delete("tickets", ticket)
        first = position(us, "ticket_tombstones", ticket)
        us.connection.execute("UPDATE ticket_tombstones SET deleted_at = '2020-01-01Z'")
        assert us.add("tickets", id=ticket) == ticket
        with us.connection.transaction():
            us.delete("tickets", ticket)
            assert position(us, "ticket_tombstones", ticket) == current(us) > (first or 0)
        [(is_new,)] = us.connection.execute(
            "SELECT deleted_at > '2026-01-01Z' FROM ticket_tombstones WHERE tenant_id = %s",
            [us.tenant],
        )
        assert is_new

    def test_row_does_not_go_back_in_the_index(self, us: Rows) -> None:
        """When a long transaction changes it after a newer one. A reader would pass over it."""
        session = us.add("chat_sessions")
        newer = (position(us, "chat_sessions", session) or 0) + 2**16
        with us.connection.transaction():
            us.connection.execute("SET LOCAL session_replication_role = replica")
            us.set("chat_sessions", session, feed_position=newer, feed_bucket=newer >> 16)
        us.set("chat_sessions", session, revision=1)
        [(changed_at, bucket)] = us.connection.execute(
            "SELECT feed_position, feed_bucket FROM chat_sessions WHERE id = %s", [session]
        ).fetchall()
        assert changed_at < newer
        assert bucket == newer >> 16

    @pytest.mark.parametrize("table", ["chat_sessions", "tickets"])
    def test_position_is_not_chosen(self, us: Rows, table: str) -> None:
        """A row at another position would be told too late, or never."""
        row = us.add(table, feed_position=2**62, feed_bucket=7)
        assert (position(us, table, row) or 0) < current(us)
        with us.connection.transaction():
            us.set(table, row, feed_position=1, feed_bucket=1)
            assert position(us, table, row) == current(us)


class TestFilters:
    @pytest.mark.parametrize(
        ("name", "first", "second"),
        [
            ("status", "active", "resolved"),
            ("labels", {}, {"team": "a"}),
            ("labels", {"team": "a"}, {"team": "b"}),
        ],
    )
    def test_last_change_says_what_was_before(
        self, us: Rows, name: str, first: Any, second: Any
    ) -> None:
        """NULL until the first change. Other changes leave it as it is."""

        def value(of: Any) -> Any:
            return Jsonb(of) if isinstance(of, dict) and of else of or None

        session = us.add("chat_sessions", **{name: value(first)})
        created = position(us, "chat_sessions", session)
        us.set("chat_sessions", session, revision=1)
        assert filter_of(us, session) == (created, None)
        us.set("chat_sessions", session, **{name: value(second)})
        changed = position(us, "chat_sessions", session)
        expected = (changed, {name: first, "position": created})
        assert filter_of(us, session) == expected
        us.set("chat_sessions", session, title="Invoice", **{name: value(second)})
        assert filter_of(us, session) == expected
        us.set("chat_sessions", session, **{name: value(first)})
        again = position(us, "chat_sessions", session)
        assert filter_of(us, session) == (again, {name: second, "position": changed})

    def test_link_is_a_change(self, us: Rows) -> None:
        session = us.add("chat_sessions")
        created = position(us, "chat_sessions", session)
        link = us.add("chat_tickets", session_id=session)
        linked = position(us, "chat_sessions", session)
        assert filter_of(us, session) == (linked, {"has_ticket": False, "position": created})
        us.delete("chat_tickets", link)
        unlinked = position(us, "chat_sessions", session)
        assert filter_of(us, session) == (unlinked, {"has_ticket": True, "position": linked})

    def test_changes_of_one_transaction_are_one(self, us: Rows) -> None:
        """Nobody has seen what was between them."""
        session = us.add("chat_sessions")
        us.set("chat_sessions", session, status="resolved")
        resolved = position(us, "chat_sessions", session)
        with us.connection.transaction():
            us.set("chat_sessions", session, status="archived", labels=Jsonb({"a": "1"}))
            us.set("chat_sessions", session, status="active")
            us.add("chat_tickets", session_id=session)
            us.set("chat_sessions", session, labels=Jsonb({"b": "1"}))
            changed = current(us)
        before = {"status": "resolved", "labels": {}, "has_ticket": False, "position": resolved}
        assert filter_of(us, session) == (changed, before)

    def test_session_that_is_created_and_changed_in_one_transaction(self, us: Rows) -> None:
        """It was nothing before."""
        with us.connection.transaction():
            session = us.add("chat_sessions")
            us.set("chat_sessions", session, status="resolved")
            us.add("chat_tickets", session_id=session)
        assert filter_of(us, session) == (position(us, "chat_sessions", session), None)


def hot_updates(rows: Rows) -> list[int]:
    """How many updates of sessions there were, and how many of them wrote to no index."""
    rows.connection.execute("SELECT pg_stat_force_next_flush()")
    [found] = rows.connection.execute(
        "SELECT n_tup_upd, n_tup_hot_upd FROM pg_stat_user_tables WHERE relname = 'chat_sessions'"
    ).fetchall()
    return list(found)


def test_appends_write_to_no_index(alone: Rows) -> None:
    """Within a bucket, whose number the index has instead of the position."""
    session = alone.add("chat_sessions")
    for revision in range(1, 21):
        alone.set("chat_sessions", session, revision=revision)
    assert hot_updates(alone) == [20, 20]
    alone.connection.execute("SELECT begin_chat_epoch()")
    for revision in range(21, 24):
        alone.set("chat_sessions", session, revision=revision)
    assert hot_updates(alone) == [23, 22], "the first one was of another bucket"


class TestEpochs:
    def test_another_database_begins_one_with_its_first_write(self, alone: Rows) -> None:
        """It is a clone. All that write in it, and read, have the same epoch from then on."""
        [template] = epochs(alone)
        session = alone.add("chat_sessions")
        assert epochs(alone)[:1] == [template]
        [_, last] = epochs(alone)
        assert epoch_of(alone, session) == f"0.{last}"
        with psycopg.connect(alone.connection.info.dsn, autocommit=True) as connection:
            other = Rows(connection, alone.tenant)
            other.set("chat_sessions", session, revision=1)
            connection.execute("DISCARD ALL")  # as a pooler may
            other.set("chat_sessions", session, revision=2)
            other.add("tickets")
            connection.execute("SELECT current_chat_epoch()")
            assert epochs(other) == [template, last]
            assert epoch_of(other, session) == f"0.{last}"
            assert (position(other, "chat_sessions", session) or 0) >> 48 == 2
            [(branch,)] = connection.execute("SELECT branch_lsn FROM chat_epochs WHERE ordinal = 2")
            assert branch is None

    def test_session_names_the_epochs_in_which_it_has_changed(self, alone: Rows) -> None:
        """With the first revision of each. It has none of an epoch in which it did not change."""
        changed, other = alone.add("chat_sessions"), alone.add("chat_sessions")
        first = epoch_of(alone, other)
        alone.set("chat_sessions", changed, revision=7)
        alone.connection.execute("SELECT begin_chat_epoch()")
        alone.connection.execute("SELECT begin_chat_epoch()")
        alone.set("chat_sessions", changed, revision=8)
        alone.set("chat_sessions", changed, revision=9)
        alone.connection.execute("SELECT begin_chat_epoch()")
        alone.add("chat_tickets", session_id=changed)
        *_, second, third = epochs(alone)
        assert epoch_of(alone, changed) == f"{first}-8.{second}-10.{third}"
        assert epoch_of(alone, other) == first
        assert len(set(epochs(alone))) == 5

    @pytest.mark.parametrize("committed", [True, False])
    def test_two_that_find_one_at_once(self, alone: Rows, committed: bool) -> None:
        """One begins it, and the other has the same; or begins it, if the first is rolled back."""
        dsn = alone.connection.info.dsn
        with (
            psycopg.connect(dsn) as first,
            psycopg.connect(dsn, autocommit=True) as second,
            ThreadPoolExecutor(1) as pool,
        ):
            Rows(first, "alone").add("chat_sessions")
            waiting = pool.submit(Rows(second, "alone").add, "chat_sessions")
            wait_until_blocked(alone.connection, second)
            if committed:
                first.commit()
            else:
                first.rollback()
            session = waiting.result()
            [_, last] = epochs(alone)
            assert epoch_of(alone, session) == f"0.{last}"
            later = Rows(first, "alone").add("chat_sessions")
            first.commit()
            assert epoch_of(alone, later) == f"0.{last}"
            assert len(epochs(alone)) == 2

    def test_one_that_is_rolled_back_to_a_savepoint(self, alone: Rows) -> None:
        """The next change of the transaction begins it again."""
        with alone.connection.transaction():
            with alone.connection.transaction(force_rollback=True):
                alone.add("chat_sessions")
                [first, _] = epochs(alone)
            assert epochs(alone) == [first]
            session = alone.add("chat_sessions")
        [_, last] = epochs(alone)
        assert epoch_of(alone, session) == f"0.{last}"

    def test_one_by_hand_waits_for_writers_and_they_for_it(
        self, us: Rows, connect: Connect
    ) -> None:
        """So no change has a position of the epoch before when there is one of this epoch."""
        session, ticket = us.add("chat_sessions"), us.add("tickets")
        writer, operator, late = connect(), connect(), connect()
        with ThreadPoolExecutor(2) as pool:
            writer.execute("BEGIN")
            Rows(writer, us.tenant).set("tickets", ticket, title="Invoice")
            operator.execute("BEGIN")
            beginning = pool.submit(operator.execute, "SELECT begin_chat_epoch()")
            wait_until_blocked(us.connection, operator)
            waiting = pool.submit(
                Rows(late, us.tenant).set, "chat_sessions", session, status="resolved"
            )
            wait_until_blocked(us.connection, late)
            writer.execute("COMMIT")
            beginning.result()
            operator.execute("COMMIT")
            waiting.result()
        before, after = position(us, "tickets", ticket), position(us, "chat_sessions", session)
        assert ((before or 0) >> 48) + 1 == (after or 0) >> 48 == len(epochs(us))
        assert epoch_of(us, session).endswith(f"-1.{epochs(us)[-1]}")

    def test_one_by_hand_is_above_all_positions(self, alone: Rows) -> None:
        """Rows that were restored as data may have those of epochs that are not here."""
        session = alone.add("chat_sessions")
        alone.connection.execute("SET session_replication_role = replica")
        alone.set("chat_sessions", session, feed_position=(40 << 48) + 7)
        alone.connection.execute("SET session_replication_role = origin")
        alone.connection.execute("SELECT begin_chat_epoch()")
        alone.set("chat_sessions", session, revision=1)
        assert (position(alone, "chat_sessions", session) or 0) >> 48 == 41

    def test_database_that_lost_its_epochs_begins_one(self, alone: Rows) -> None:
        """Every row has a position, whatever an operator has deleted."""
        alone.connection.execute("DELETE FROM chat_epochs")
        session, ticket = alone.add("chat_sessions"), alone.add("tickets")
        assert (position(alone, "chat_sessions", session) or 0) >> 48 == 1
        assert (position(alone, "tickets", ticket) or 0) >> 48 == 1


@pytest.fixture
def owned(of: Callable[[str], Cluster]) -> Iterator[str]:
    """The URL of a database whose schema belongs to a role that may not ask what database it is."""
    cluster = of("cluster")
    name = f"own_{uuid.uuid4().hex}"
    cluster.execute(f"CREATE ROLE {name} LOGIN")
    cluster.execute(f"CREATE DATABASE {name}")
    url = cluster.url(name)
    execute(
        url,
        "CREATE EXTENSION btree_gin",
        f"GRANT ALL ON SCHEMA public TO {name}",
        "REVOKE EXECUTE ON FUNCTION pg_control_system() FROM PUBLIC",
        "REVOKE EXECUTE ON FUNCTION pg_walfile_name(pg_lsn) FROM PUBLIC",
    )
    own = urlsplit(url)._replace(netloc=f"{name}@").geturl()
    assert migrate.up(own, quiet=True) == 0
    yield own
    cluster.drop(url)
    cluster.execute(f"DROP ROLE {name}")


def test_identity_is_what_the_owner_of_the_schema_may_read(owned: str) -> None:
    """So a superuser, who may read more, begins no epoch; nor does the owner after that."""
    superuser = urlsplit(owned)._replace(netloc="postgres@").geturl()
    with (
        psycopg.connect(owned, autocommit=True) as first,
        psycopg.connect(superuser, autocommit=True) as second,
    ):
        for connection in (first, second, first):
            Rows(connection, "us").add("chat_sessions")
        [(identity,)] = first.execute("SELECT identity FROM chat_epochs").fetchall()
        assert identity.startswith("?/?/")
        assert second.execute("SELECT chat_database_identity()").fetchone() != (identity,)
        second.execute("GRANT EXECUTE ON FUNCTION pg_control_system() TO PUBLIC")
        with psycopg.connect(owned, autocommit=True) as later:
            Rows(later, "us").add("chat_sessions")
            assert len(epochs(Rows(later, "us"))) == 2, "it has learned what database it is"


def test_role_that_may_not_ask_where_recovery_ended_goes_on(owned: str) -> None:
    """Otherwise nobody could write after a promotion."""
    revoke = "REVOKE EXECUTE ON FUNCTION pg_last_xact_replay_timestamp() FROM PUBLIC"
    execute(urlsplit(owned)._replace(netloc="postgres@").geturl(), revoke)
    with psycopg.connect(owned) as connection:
        assert connection.execute("SELECT chat_recovery_end()").fetchone() == (None,)
