"""`chat-ticket-svc export` and `erase`: a tenant's data, written out or deleted."""

import asyncio
import contextlib
import os
import signal
import sys
from pathlib import Path

import psycopg
import pytest
from support.client import Api, an_id
from support.database import session_locked, store_database, wait_for_lock_waiters
from support.plain_rows import Rows
from support.process import Finished, command
from support.tenant_data import counts, many_messages, parsed, terminal
from support.watching import watching

from chat_ticket.v1 import chat_message_pb2 as m
from chat_ticket.v1 import chat_ticket_pb2 as t
from chat_ticket.v1 import resources_pb2 as r
from chat_ticket_svc.commands.export import _session_messages
from chat_ticket_svc.store import erasure, tenant_settings


async def export(database: str, tenant: str, *arguments: str) -> Finished:
    return await command("export", "--tenant", tenant, *arguments, DATABASE_URL=database)


async def erase(database: str, tenant: str, *arguments: str) -> Finished:
    return await command("erase", "--tenant", tenant, *arguments, DATABASE_URL=database)


class Filled:
    """A tenant with something of everything."""

    def __init__(self, api: Api, database: str):
        self.api = api
        self.database = database

    async def fill(self) -> None:
        self.first, self.second = await self.api.session(), await self.api.session()
        content = "two\nlines,\v\u2028a\u0085b\u2029c\x1c “quotes” and 漢字"
        fields = {"language_code": "ja", "metadata_json": '{"a": [1, null]}'}
        await self.api.message(self.first.id, content, **fields)
        last = await self.api.message(self.first.id, "last")
        await self.api.attachment(last.id)
        gone = await self.api.message(self.second.id)
        await self.api.messages.DeleteChatMessage(m.DeleteChatMessageRequest(message_id=gone.id))
        self.link = await self.api.escalate(self.first.id)
        other = await self.api.escalate(self.second.id)
        await self.api.tickets.DeleteChatTicket(t.DeleteChatTicketRequest(chat_ticket_id=other.id))
        self.tickets = [self.link.ticket, other.ticket]
        async with store_database(self.database) as db:
            await tenant_settings.set_search_language(db, self.api.tenant, "german")
        with psycopg.connect(self.database) as connection:
            rows = Rows(connection, self.api.tenant)
            draft = rows.add("chat_drafts", session_id=self.first.id)
            rows.add("chat_draft_pieces", draft_id=draft, content="unfinished")

    async def close_tickets(self) -> None:
        for ticket in self.tickets:
            await self.api.tickets.UpdateTicket(
                t.UpdateTicketRequest(
                    ticket=r.Ticket(id=ticket.id, status=r.TICKET_STATUS_CLOSED),
                    update_mask={"paths": ["status"]},
                )
            )


@pytest.fixture
async def filled(api: Api, database: str) -> Filled:
    filled = Filled(api, database)
    await filled.fill()
    return filled


class TestExport:
    async def test_everything_is_exported_as_in_the_api(
        self, filled: Filled, database: str, tenant: str
    ) -> None:
        """Tickets, then each session with its messages in order, and its chat ticket."""
        done = await export(database, tenant)
        assert (done.status, done.errors) == (0, "")
        messages = [
            message
            async for each in filled.api.messages.ListChatMessages(
                m.ListChatMessagesRequest(session_id=filled.first.id)
            )
            for message in each.messages
        ]
        tickets = await filled.api.tickets.ListTickets(t.ListTicketsRequest())
        lines = parsed(done)
        assert lines[:2] == list(reversed(tickets.tickets))
        assert [type(line) for line in lines[2:]] == [
            *(r.ChatSession, r.ChatMessage, r.ChatMessage, r.ChatTicket),
            r.ChatSession,
        ]
        assert [line.id for line in lines[2:]] == [
            *(filled.first.id, *(message.id for message in messages), filled.link.id),
            filled.second.id,
        ]
        assert lines[3:5] == messages
        assert lines[3].language_code == "ja"
        assert lines[4].attachments
        assert lines[5] == filled.link

    @pytest.mark.usefixtures("filled")
    async def test_nothing_of_another_tenant_is_there(self, other: Api, database: str) -> None:
        session = await other.session()
        lines = parsed(await export(database, other.tenant))
        assert [line.id for line in lines] == [session.id]

    async def test_a_long_session_is_there_once_in_order(
        self, api: Api, database: str, tenant: str
    ) -> None:
        """Of several pages."""
        session = await api.session()
        many_messages(database, tenant, session.id, 1203)
        lines = parsed(await export(database, tenant))
        assert [line.sequence for line in lines[1:]] == list(range(1, 1204))

    async def test_a_session_alone(self, filled: Filled, database: str, tenant: str) -> None:
        lines = parsed(await export(database, tenant, "--session", filled.second.id))
        assert [line.id for line in lines] == [filled.second.id]

    @pytest.mark.usefixtures("filled")
    async def test_a_file_appears_when_it_is_complete(
        self, database: str, tenant: str, tmp_path: Path
    ) -> None:
        """And not when there was an error."""
        file = tmp_path / "export.jsonl"
        missing = ("--session", an_id(), "--output", str(file))
        done = await export(database, tenant, *missing)
        assert done.status == 1
        assert "does not exist" in done.errors
        assert not file.exists()
        assert (await export(database, tenant, "--output", str(file))).status == 0
        assert file.read_text() == (await export(database, tenant)).output
        link = tmp_path / "link.jsonl"
        link.symlink_to(file)
        assert (await export(database, tenant, "--output", str(link))).status == 0
        assert link.is_symlink()
        assert sorted(tmp_path.iterdir()) == [file, link]  # noqa: ASYNC240

    @pytest.mark.usefixtures("filled")
    async def test_a_pipe_is_written_as_it_is(
        self, database: str, tenant: str, tmp_path: Path
    ) -> None:
        """The pipe is not replaced: as root, that would replace /dev/null."""
        pipe = tmp_path / "pipe"
        os.mkfifo(pipe)
        reading = asyncio.create_task(asyncio.to_thread(pipe.read_text))
        assert (await export(database, tenant, "--output", str(pipe))).status == 0
        assert await reading == (await export(database, tenant)).output
        assert pipe.is_fifo()

    @pytest.mark.usefixtures("filled")
    async def test_a_write_error_is_one_line(
        self, database: str, tenant: str, tmp_path: Path
    ) -> None:
        """With the reason of the system."""
        of = {"DATABASE_URL": database, "T": tenant, "P": sys.executable, "D": str(tmp_path)}
        for where, reason in {
            "> /dev/full": "standard output: No space left on device",
            '--output "$D"': f"{tmp_path}: Is a directory",
            '--output "$D/no/file"': f"{tmp_path}/no/file: No such file or directory",
        }.items():
            process = await asyncio.create_subprocess_shell(
                f'"$P" -m chat_ticket_svc export --tenant "$T" {where}',
                env={**os.environ, **of},
                stderr=asyncio.subprocess.PIPE,
            )
            _, errors = await process.communicate()
            assert errors.decode() == f"chat-ticket-svc: cannot write {reason}\n"
            assert process.returncode == 1
        assert not list(tmp_path.iterdir())  # noqa: ASYNC240

    async def test_a_tenant_with_nothing_is_an_error(
        self, database: str, tenant: str, tmp_path: Path
    ) -> None:
        """It may be misspelt."""
        done = await export(database, tenant)
        assert (done.status, done.output) == (1, "")
        assert f"tenant {tenant} has no data" in done.errors
        before = tmp_path / "export.jsonl"
        before.write_text("good")
        assert (await export(database, tenant, "--output", str(before))).status == 1
        assert before.read_text() == "good", "what was exported before stays"

    async def test_progress_is_shown_on_a_terminal_alone(
        self, api: Api, database: str, tenant: str
    ) -> None:
        """Progress goes to stderr, and never into the export."""
        session = await api.session()
        many_messages(database, tenant, session.id, 2000)
        with terminal() as (ours, theirs):
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "chat_ticket_svc", "export", "--tenant", tenant),
                env={**os.environ, "DATABASE_URL": database},
                stdout=asyncio.subprocess.PIPE,
                stderr=theirs,
            )
            output, _ = await process.communicate()
            assert b"2.00k" in os.read(ours, 10_000)
        assert output.count(b"\n") == 2001
        assert output == (await export(database, tenant)).output.encode()

    async def test_session_is_one_snapshot_with_what_follows_it(
        self, api: Api, filled: Filled, database: str, tenant: str
    ) -> None:
        """What changes after the session was read is not in the export, wherever it is."""
        session = filled.first
        last = await api.message(session.id, "unchanged")
        async with store_database(database) as db:
            items = _session_messages(db, tenant, session.id)
            _, before = await anext(items)
            await api.attachment(last.id)
            await api.message(session.id, "new")
            await api.tickets.DeleteChatTicket(
                t.DeleteChatTicketRequest(chat_ticket_id=filled.link.id)
            )
            rest = [item async for item in items]
        assert [kind for kind, _ in rest] == ["chatMessage"] * 3 + ["chatTicket"]
        assert rest[2][1] == last
        assert before.has_ticket
        assert before.revision == last.revision

    async def test_closed_pipe_ends_the_export_without_an_error(
        self, api: Api, database: str, tenant: str
    ) -> None:
        session = await api.session()
        many_messages(database, tenant, session.id, 2000)
        process = await asyncio.create_subprocess_exec(
            "sh",
            "-c",
            f"'{sys.executable}' -m chat_ticket_svc export --tenant '{tenant}' | head -n 1",
            env={**os.environ, "DATABASE_URL": database},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        output, errors = await process.communicate()
        assert errors == b""
        assert output.count(b"\n") == 1


class TestErase:
    async def test_everything_of_the_tenant_is_erased_and_nothing_of_others(
        self, filled: Filled, other: Api, database: str, tenant: str
    ) -> None:
        """Of every table."""
        neighbour = Filled(other, database)
        await neighbour.fill()
        before = counts(database, other.tenant)
        assert all(counts(database, tenant).values())
        await filled.close_tickets()
        done = await erase(database, tenant, "--yes")
        assert done.status == 0, done
        assert "2 sessions, 2 messages, 1 attachments" in done.output
        assert "1 drafts" in done.output
        assert not any(counts(database, tenant).values())
        assert counts(database, other.tenant) == before
        assert (await erase(database, tenant, "--yes")).output.endswith("has no data\n")

    @pytest.mark.usefixtures("filled")
    async def test_a_dry_run_only_counts(self, database: str, tenant: str) -> None:
        before = counts(database, tenant)
        done = await erase(database, tenant, "--dry-run", "--active-tickets")
        assert done.status == 0
        assert "2 sessions, 2 messages" in done.output
        assert counts(database, tenant) == before

    async def test_active_tickets_prevent_the_erase(
        self, filled: Filled, database: str, tenant: str
    ) -> None:
        """Also tickets without a session, unless --active-tickets is given."""
        before = counts(database, tenant)
        done = await erase(database, tenant, "--yes")
        assert done.status == 1
        for ticket in filled.tickets:
            assert f"{ticket.id} (open)" in done.errors
        assert "--active-tickets" in done.errors
        assert counts(database, tenant) == before
        assert (await erase(database, tenant, "--yes", "--active-tickets")).status == 0
        assert not any(counts(database, tenant).values())

    @pytest.mark.usefixtures("filled")
    async def test_nothing_is_erased_unless_confirmed(self, database: str, tenant: str) -> None:
        before = counts(database, tenant)
        done = await erase(database, tenant, "--active-tickets")
        assert done.status == 1
        assert "not confirmed" in done.errors
        assert counts(database, tenant) == before

    @pytest.mark.usefixtures("filled")
    @pytest.mark.parametrize(("typed", "is_erased"), [("{tenant}\n", True), ("yes\n", False)])
    async def test_on_a_terminal_the_tenant_is_to_be_typed(
        self, database: str, tenant: str, typed: str, is_erased: bool
    ) -> None:
        with terminal() as (ours, theirs):
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "chat_ticket_svc", "erase", "--active-tickets"),
                *("--tenant", tenant),
                env={**os.environ, "DATABASE_URL": database},
                stdin=theirs,
                stdout=theirs,
                stderr=theirs,
            )
            os.write(ours, typed.format(tenant=tenant).encode())
            assert await process.wait() == (0 if is_erased else 1)
        assert any(counts(database, tenant).values()) != is_erased

    @pytest.mark.usefixtures("filled")
    async def test_ctrl_c_at_the_prompt_ends_the_command(self, database: str, tenant: str) -> None:
        """The first one, and nothing is deleted."""
        before = counts(database, tenant)
        with terminal() as (ours, theirs):
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "chat_ticket_svc", "erase", "--active-tickets"),
                *("--tenant", tenant),
                env={**os.environ, "DATABASE_URL": database},
                stdin=theirs,
                stdout=theirs,
                stderr=theirs,
            )
            output = b""
            async with asyncio.timeout(20):
                while b"type the tenant's id" not in output:
                    await asyncio.sleep(0.05)
                    with contextlib.suppress(BlockingIOError):
                        output += os.read(ours, 1000)
                process.send_signal(signal.SIGINT)
                assert await process.wait() == 128 + signal.SIGINT
            with contextlib.suppress(BlockingIOError):
                assert b"Traceback" not in os.read(ours, 1000)
        assert counts(database, tenant) == before

    async def test_erase_resumes_after_it_was_killed(
        self, api: Api, database: str, tenant: str
    ) -> None:
        """A session is erased whole: what is left has all of its messages."""
        sessions = [await api.session() for _ in range(3)]
        for session in sessions:
            many_messages(database, tenant, session.id, 10_000)
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "chat_ticket_svc", "erase", "--yes", "--tenant", tenant),
            env={**os.environ, "DATABASE_URL": database},
        )
        while counts(database, tenant)["chat_messages"] == 30_000:
            await asyncio.sleep(0.01)
        process.kill()
        await process.wait()
        with psycopg.connect(database) as connection:
            whole = connection.execute(
                "SELECT count(*) FILTER (WHERE m.tenant_id IS NOT NULL) FROM chat_sessions s"
                " LEFT JOIN chat_messages m ON m.tenant_id = s.tenant_id AND m.session_id = s.id"
                " WHERE s.tenant_id = %s GROUP BY s.id",
                [tenant],
            ).fetchall()
        assert set(whole) == {(10_000,)}, "each session has all of its messages, or is gone"
        assert len(whole) < 3
        assert (await erase(database, tenant, "--yes")).status == 0
        assert not any(counts(database, tenant).values())

    async def test_erase_waits_for_locked_rows(
        self, filled: Filled, database: str, tenant: str
    ) -> None:
        """For longer than a call: what erased before, and was killed, may not have ended."""
        erasing = ("--tenant", tenant, "--yes", "--active-tickets")
        settings = {"DATABASE_URL": database, "CHAT_TICKET_LOCK_TIMEOUT_MS": "50"}
        with session_locked(database, filled.first.id):
            done = asyncio.create_task(command("erase", *erasing, **settings))
            await wait_for_lock_waiters(database, 1)
            await asyncio.sleep(0.5)
        assert (await done).status == 0, await done

    async def test_a_transaction_deletes_a_bounded_number_of_rows(
        self, api: Api, database: str, tenant: str
    ) -> None:
        """With many sessions. A large session has a transaction of its own."""
        for _ in range(erasure.SESSIONS_PER_BATCH + 5):
            await api.session()
        session = await api.session()
        many_messages(database, tenant, session.id, 3 * erasure.ROWS_PER_BATCH + 7)
        async with store_database(database) as db:
            deleted = [n async for n in erasure.erase(db, tenant, active_tickets=False)]
        assert sum(deleted) == erasure.SESSIONS_PER_BATCH + 6 + 3 * erasure.ROWS_PER_BATCH + 7
        assert deleted == [erasure.SESSIONS_PER_BATCH, 5, 3 * erasure.ROWS_PER_BATCH + 8]

    async def test_ticket_created_during_the_erase_stays(
        self, filled: Filled, database: str, tenant: str
    ) -> None:
        """With its session, and all that it holds: it was not asked for."""
        await filled.close_tickets()
        session = await filled.api.session()
        await filled.api.message(session.id)
        await filled.api.escalate(session.id)
        async with store_database(database) as db:
            async for _ in erasure.erase(db, tenant, active_tickets=False):
                pass
        left = counts(database, tenant)
        assert left["chat_sessions"] == left["chat_messages"] == 1
        assert left["tickets"] == left["chat_tickets"] == 1

    async def test_watchers_receive_the_deletion(
        self, api: Api, database: str, tenant: str
    ) -> None:
        """As of any other deletion of a session."""
        session = await api.session()
        async with watching(api, session.id) as watcher:
            await watcher.until("caught_up")
            assert (await erase(database, tenant, "--yes")).status == 0
            assert (await watcher.next()).HasField("session_deleted")
            await watcher.end()
