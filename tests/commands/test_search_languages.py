"""`chat-ticket-svc tenant` and `reindex`: the search language of a tenant and of its messages."""

import asyncio
import shlex
import uuid
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest
from support.client import Api
from support.database import execute, store_database, terminate_at_commit
from support.process import Finished, command, run_command
from support.search import search
from support.watching import watching

from chat_ticket_svc.search_language import SEARCH_LANGUAGES
from chat_ticket_svc.store import reindexing, tenant_settings

SETTING = "CHAT_TICKET_SEARCH_LANGUAGE"


async def tenant_command(database: str, *arguments: str, **environment: str) -> Finished:
    return await command("tenant", *arguments, DATABASE_URL=database, **environment)


async def set_language(database: str, tenant: str, language: str | None) -> None:
    async with store_database(database) as db:
        await tenant_settings.set_search_language(db, tenant, language)


async def reindex(database: str, tenant: str | None, default: str = "english") -> list[Any]:
    """Reindex a tenant, and return what each batch did."""
    async with store_database(database) as db:
        return [
            tuple(batch) async for batch in reindexing.reindex(db, tenant, default_language=default)
        ]


def add_messages(database: str, tenant: str, session_id: str, count: int, **columns: str) -> None:
    """As a server of the version before adds them: without the columns of languages."""
    names = "".join(f", {name}" for name in columns)
    values = ", %s" * len(columns)
    with psycopg.connect(database) as connection:
        connection.execute(
            "INSERT INTO chat_messages (tenant_id, id, session_id, sequence, revision, role,"  # type: ignore[arg-type]
            f" content{names}) SELECT %s, gen_random_uuid(), s.id, s.revision + n, s.revision + n,"
            f" 'user', 'Bestellungen ' || n{values}"
            " FROM chat_sessions s, generate_series(1, %s) n WHERE s.tenant_id = %s AND s.id = %s",
            [tenant, *columns.values(), count, tenant, session_id],
        )
        connection.execute(
            "UPDATE chat_sessions SET revision = revision + %s WHERE tenant_id = %s AND id = %s",
            [count, tenant, session_id],
        )


def languages(database: str, tenant: str) -> dict[str, int]:
    """How many messages of a tenant have each search language."""
    statement = """
        SELECT search_language, count(*)::integer FROM chat_messages
         WHERE tenant_id = %s GROUP BY 1
    """
    with psycopg.connect(database) as connection:
        return dict(connection.execute(statement, [tenant]).fetchall())


def all_else(database: str, tenant: str) -> list[Any]:
    """The tenant's sessions and messages, without the search languages."""
    statement = """
        SELECT to_jsonb(s) FROM chat_sessions s WHERE tenant_id = %(tenant)s
         UNION ALL
        SELECT to_jsonb(m) - 'search_language' FROM chat_messages m WHERE tenant_id = %(tenant)s
         ORDER BY 1
    """
    with psycopg.connect(database) as connection:
        return connection.execute(statement, {"tenant": tenant}).fetchall()


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reindexing, "MESSAGES_PER_BATCH", 10)
    monkeypatch.setattr(reindexing, "LOCKED_SECONDS", 0.02)


class TestTenant:
    async def test_language_is_set_and_shown(self, database: str) -> None:
        """With where it comes from, and what is to be done for the messages that are there."""
        tenant = f"it's {uuid.uuid4()}"
        to = ("--tenant", tenant)
        shown = await tenant_command(database, "show", *to, **{SETTING: "french"})
        assert shown == (0, f"search language: french, from {SETTING}\n", "")
        done = await tenant_command(database, "set", *to, "--search-language", "german")
        expected = (
            "search language: german, of the tenant\nmessages that are already there keep their"
            f" language until chat-ticket-svc reindex --tenant {shlex.quote(tenant)}\n"
        )
        assert done == (0, expected, "")
        shown = await tenant_command(database, "show", *to)
        assert shown == (0, "search language: german, of the tenant\n", "")
        done = await tenant_command(database, "set", *to, "--search-language", "default")
        assert done.output.startswith(f"search language: english, from {SETTING}\n")

    async def test_unknown_language_is_one_line_with_the_known_ones(
        self, database: str, tenant: str
    ) -> None:
        language = ("--search-language", "klingon")
        done = await tenant_command(database, "set", "--tenant", tenant, *language)
        assert (done.status, done.output) == (1, "")
        known = ", ".join([*SEARCH_LANGUAGES, "default"])
        assert done.errors == f"chat-ticket-svc: --search-language: must be one of {known}\n"
        assert languages(database, tenant) == {}

    async def test_an_action_is_required(self) -> None:
        done = await command("tenant")
        assert done.status == 2
        assert "the following arguments are required: ACTION" in done.errors

    async def test_missing_right_is_named(self, database: str, tenant: str) -> None:
        """In one line, as `check` does."""
        role = f"role_{uuid.uuid4().hex}"
        execute(
            database, f"CREATE ROLE {role} LOGIN", f"GRANT SELECT ON schema_migrations TO {role}"
        )
        try:
            own = urlsplit(database)._replace(netloc=f"{role}@").geturl()
            refused = "chat-ticket-svc: the database refuses: permission denied for table {} ({})\n"
            for arguments, table in (
                (("tenant", "show"), "tenant_settings"),
                (("tenant", "set", "--search-language", "german"), "tenant_settings"),
                (("reindex",), "chat_messages"),
                (("erase", "--yes"), "chat_sessions"),
                (("expire", "--older-than", "1d"), "chat_sessions"),
            ):
                done = await command(*arguments, "--tenant", tenant, DATABASE_URL=own)
                assert done == (1, "", refused.format(table, "SQLSTATE 42501"))
        finally:
            execute(database, f"DROP OWNED BY {role}", f"DROP ROLE {role}")


class TestReindex:
    async def test_stemmer_that_indexed_a_message_is_asked_until_then(
        self, api: Api, database: str, tenant: str
    ) -> None:
        """A setting changes no result. A reindexed message is found by its new language."""
        session = await api.session()
        english = await api.message(session.id, "the parcels were refunded")
        german = await api.message(session.id, "Die Häuser wurden gestern geliefert")

        async def found(query: str) -> set[str]:
            return {hit.message_id for hit in await search(api, query)}

        assert await found("refunding parcel") == {english.id}
        assert await found("Haus") == set()
        await command(
            "tenant",
            "set",
            "--tenant",
            tenant,
            "--search-language",
            "german",
            DATABASE_URL=database,
        )
        assert await found("refunding parcel") == {english.id}
        assert await found("Haus") == set()
        await command("reindex", "--tenant", tenant, DATABASE_URL=database)
        assert await found("Haus") == {german.id}
        assert await found("refunding parcel") == set()
        assert await found("parcels refunded") == {english.id}

    async def test_messages_take_the_language_of_their_tenant(
        self, api: Api, other: Api, database: str, tenant: str
    ) -> None:
        """Unless they name their own. Nothing else changes, and a second time nothing at all."""
        session = await api.session()
        add_messages(database, tenant, session.id, 1203)
        of_their_own = {"language_code": "fr-CA", "search_language": "french"}
        add_messages(database, tenant, session.id, 7, **of_their_own)
        strange = await other.session()
        add_messages(database, other.tenant, strange.id, 1)
        before = all_else(database, tenant)
        await set_language(database, tenant, "german")
        done = await command("reindex", "--tenant", tenant, DATABASE_URL=database)
        expected = "changed the search language of 1,203 of 1,210 messages\n"
        assert done == (0, expected, "")
        assert languages(database, tenant) == {"german": 1203, "french": 7}
        assert languages(database, other.tenant) == {"english": 1}
        assert all_else(database, tenant) == before
        assert await reindex(database, tenant) == [(1000, 0), (210, 0)]
        await set_language(database, tenant, None)
        await reindex(database, tenant, "simple")
        assert languages(database, tenant) == {"simple": 1203, "french": 7}

    async def test_watchers_receive_nothing(self, api: Api, database: str, tenant: str) -> None:
        """Nor is a session newer than before: the next message has the next revision."""
        session = await api.session()
        first = await api.message(session.id)
        async with watching(api, session.id) as watcher:
            await watcher.until("caught_up")
            assert await reindex(database, tenant, "german") == [(1, 1)]
            second = await api.message(session.id)
            created = (await watcher.next()).messages_created.messages
            assert [message.id for message in created] == [second.id]
        assert second.sequence == first.sequence + 1

    @pytest.mark.usefixtures("small_batches")
    async def test_interrupted_run_is_resumed(self, api: Api, database: str, tenant: str) -> None:
        """Each batch is a transaction, and what is right is only read."""
        session = await api.session()
        add_messages(database, tenant, session.id, 35)
        async with store_database(database) as db:
            batches = reindexing.reindex(db, tenant, default_language="german")
            assert [await anext(batches), await anext(batches)] == [(10, 10), (10, 10)]
            await batches.aclose()
        assert languages(database, tenant) == {"english": 15, "german": 20}
        expected = [(10, 0), (10, 0), (10, 10), (5, 5)]
        assert await reindex(database, tenant, "german") == expected
        assert languages(database, tenant) == {"german": 35}

    @pytest.mark.usefixtures("small_batches")
    async def test_locked_messages_are_done_when_they_are_free(
        self, api: Api, database: str, tenant: str
    ) -> None:
        """Those beside them are done at once, and no lock is held meanwhile."""
        session = await api.session()
        add_messages(database, tenant, session.id, 5)
        with psycopg.connect(database) as writer:
            writer.execute(
                "UPDATE chat_messages SET metadata = '{}' WHERE tenant_id = %s AND sequence = 3",
                [tenant],
            )
            running = asyncio.create_task(reindex(database, tenant, "german"))
            async with asyncio.timeout(10):
                while languages(database, tenant) != {"german": 4, "english": 1}:
                    await asyncio.sleep(0.02)
            await api.message(session.id)
            writer.commit()
        done = await running
        assert done[0] == (0, 4)
        assert done[-1][0] == 6
        assert set(languages(database, tenant)) == {"german"}
        metadata = "SELECT FROM chat_messages WHERE tenant_id = %s AND metadata = '{}'"
        with psycopg.connect(database) as connection:
            assert connection.execute(metadata, [tenant]).rowcount == 1

    async def test_calls_go_on_during_a_batch(self, api: Api, database: str, tenant: str) -> None:
        """A batch locks no session, which is what an append waits for."""
        session = await api.session()
        await api.message(session.id)
        params = {"tenant_id": tenant, "default_language": "german", "first": uuid.UUID(int=0)}
        limits = {"messages": 10, "bytes": 1000}
        with psycopg.connect(database) as batch:
            batch.execute(reindexing.REINDEX, params | limits)
            async with asyncio.timeout(2):
                await api.message(session.id)
        assert languages(database, tenant) == {"german": 1, "english": 1}

    async def test_a_transaction_has_a_bounded_amount_of_text(
        self, api: Api, database: str, tenant: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        session = await api.session()
        add_messages(database, tenant, session.id, 5)
        monkeypatch.setattr(reindexing, "BYTES_PER_BATCH", 30)  # of two messages of 14
        assert await reindex(database, tenant, "german") == [(0, 3), (5, 2)]

    async def test_ids_at_both_ends(self, api: Api, database: str, tenant: str) -> None:
        """The lowest and the highest UUID are ids like any other."""
        session = await api.session()
        for id_ in (uuid.UUID(int=0), uuid.UUID(int=2**128 - 1)):
            await api.message(session.id, id=str(id_))
        assert await reindex(database, tenant, "german") == [(2, 2)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(reindexing, "MESSAGES_PER_BATCH", 2)
            assert await reindex(database, tenant, "simple") == [(2, 2)]

    def test_stale_schema_is_refused(self, fresh_database: str) -> None:
        """Also one without any table."""
        execute(fresh_database, "DROP SCHEMA public CASCADE", "CREATE SCHEMA public")
        done = run_command("reindex", DATABASE_URL=fresh_database)
        assert (done.returncode, done.stdout) == (1, "")
        assert "the database lacks 20261121000100_chat_sessions.sql" in done.stderr

    async def test_without_a_tenant_all_are_done(self, fresh_database: str) -> None:
        """And the index of servers of the version before is dropped.

        A connection that is lost meanwhile is replaced in silence.
        """
        execute(
            fresh_database,
            "CREATE INDEX idx_chat_messages_content_old ON chat_messages (tenant_id)",
        )
        tenants = ["a", "b b", "c"]
        for tenant in tenants:
            execute(
                fresh_database,
                f"INSERT INTO chat_sessions (tenant_id, id) VALUES ('{tenant}', '{uuid.uuid4()}')",
            )
            with psycopg.connect(fresh_database) as connection:
                [(session,)] = connection.execute(
                    "SELECT id FROM chat_sessions WHERE tenant_id = %s", [tenant]
                ).fetchall()
            add_messages(fresh_database, tenant, session, 2)
        await set_language(fresh_database, "b b", "simple")
        terminate_at_commit(fresh_database, "chat_messages", "UPDATE", only_first=True)
        environment = {"DATABASE_URL": fresh_database, SETTING: "german"}
        done = await command("reindex", **environment)
        dropped = "Dropped: idx_chat_messages_content_old\n"
        expected = "changed the search language of 6 of 6 messages\n"
        assert done == (0, f"{expected}{dropped}", "")
        found = [languages(fresh_database, tenant) for tenant in tenants]
        assert found == [{"german": 2}, {"simple": 2}, {"german": 2}]
