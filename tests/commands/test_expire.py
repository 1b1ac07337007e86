"""`chat-ticket-svc expire`: sessions whose last change is too long ago are deleted."""

import asyncio
import os
import re
import sys
from datetime import timedelta
from pathlib import Path

import psycopg
import pytest
from support.client import Api, an_id
from support.database import session_locked, store_database
from support.drafts import leave_draft
from support.plain_rows import Rows
from support.process import Finished, command
from support.tenant_data import counts, many_messages, session_of
from support.tickets import CLOSED, PENDING, SOLVED, get_ticket, update_ticket
from support.watching import watching

from chat_ticket_svc.store import erasure, retention
from chat_ticket_svc.store.retention import Rule

PERIOD = timedelta(days=400)


async def expire(database: str, *arguments: str) -> Finished:
    return await command("expire", *arguments, DATABASE_URL=database)


def age(database: str, *session_ids: str, days: int = 500) -> None:
    """Make it the last change of these sessions, whatever has happened since."""
    with psycopg.connect(database) as connection:
        connection.execute(
            "UPDATE chat_sessions SET created_at = now() - %(days)s * interval '1 day',"
            " updated_at = now() - %(days)s * interval '1 day' WHERE id = ANY (%(ids)s::uuid[])",
            {"days": days, "ids": list(session_ids)},
        )


def old_session(database: str, tenant: str, *, days: int = 500, messages: int = 0) -> str:
    session_id = session_of(database, tenant, None)
    many_messages(database, tenant, session_id, messages)
    age(database, session_id, days=days)
    return session_id


def sessions_of(database: str, tenant: str) -> set[str]:
    with psycopg.connect(database) as connection:
        rows = connection.execute(
            "SELECT id::text FROM chat_sessions WHERE tenant_id = %s", [tenant]
        ).fetchall()
    return {row[0] for row in rows}


async def test_only_sessions_without_a_change_for_so_long_are_deleted(
    api: Api, other: Api, database: str, tenant: str
) -> None:
    """With all that they hold, and none of another tenant."""
    for _ in range(3):
        old_session(database, tenant, messages=2)
    younger = old_session(database, tenant, days=399)
    changed = old_session(database, tenant)
    await api.message(changed)
    others = old_session(database, other.tenant)
    done = await expire(database, "--tenant", tenant, "--older-than", "400d")
    assert (done.status, done.errors) == (0, "")
    result = "deleted 3 sessions with 6 messages, kept 0 with an open or pending ticket\n"
    assert done.output == f"tenant {tenant}: {result}1 tenants: {result}"
    assert sessions_of(database, tenant) == {younger, changed}
    assert counts(database, tenant)["chat_messages"] == 1
    assert sessions_of(database, other.tenant) == {others}
    done = await expire(database, "--tenant", tenant, "--older-than", "9577h")
    assert done.output.startswith("0 tenants: deleted 0 sessions"), "399 days are not longer ago"
    await expire(database, "--tenant", tenant, "--older-than", "9576h")
    assert sessions_of(database, tenant) == {changed}


@pytest.mark.usefixtures("api")
async def test_only_sessions_of_the_statuses_are_deleted(database: str, tenant: str) -> None:
    """Without --status, of all."""
    by_status = {}
    for status in ("active", "resolved", "archived"):
        by_status[status] = old_session(database, tenant)
        with psycopg.connect(database) as connection:
            connection.execute(
                "UPDATE chat_sessions SET status = %s WHERE id = %s", [status, by_status[status]]
            )
    of_tenant = ("--tenant", tenant, "--older-than", "400d")
    done = await expire(database, *of_tenant, "--status", "archived,resolved")
    assert done.status == 0
    assert sessions_of(database, tenant) == {by_status["active"]}
    assert (await expire(database, *of_tenant)).status == 0
    assert not sessions_of(database, tenant)


async def test_session_with_an_active_ticket_is_kept(api: Api, database: str, tenant: str) -> None:
    """And counted. The ticket of a session that has expired stays."""
    sessions = [session_of(database, tenant, None) for _ in range(4)]
    links = [await api.escalate(session_id) for session_id in sessions]
    for link, status in zip(links[1:], (PENDING, SOLVED, CLOSED), strict=True):
        await update_ticket(api, link.ticket_id, status=status)
    age(database, *sessions)
    done = await expire(database, "--tenant", tenant, "--older-than", "400d")
    assert done.status == 0
    assert "deleted 2 sessions with 0 messages, kept 2 with an open" in done.output
    assert sessions_of(database, tenant) == set(sessions[:2])
    for link in links:
        assert (await get_ticket(api, link.ticket_id)).id == link.ticket_id


async def test_a_dry_run_only_counts(api: Api, database: str, tenant: str) -> None:
    """What a run would delete: no session with an active ticket, and none with an open draft."""
    for _ in range(3):
        old_session(database, tenant, messages=1)
    escalated = session_of(database, tenant, None)
    await api.escalate(escalated)
    being_written = session_of(database, tenant, None)
    await leave_draft(api, being_written, "text")
    age(database, escalated, being_written)
    before = counts(database, tenant)
    done = await expire(database, "--tenant", tenant, "--older-than", "400d", "--dry-run")
    assert done.status == 0
    assert f"tenant {tenant}: 3 sessions would be deleted, kept 1 with" in done.output
    assert done.output.endswith("nothing was deleted: dry run\n")
    assert counts(database, tenant) == before
    done = await expire(database, "--tenant", tenant, "--older-than", "400d")
    assert "deleted 3 sessions with 3 messages, kept 1 with" in done.output


@pytest.mark.parametrize("change", ["message", "ticket", "draft", "status"])
async def test_session_that_changes_during_the_run_is_kept(
    api: Api, database: str, tenant: str, change: str
) -> None:
    """After it was found, and before it is its turn."""
    first, changed = old_session(database, tenant), old_session(database, tenant)
    rule = Rule(older_than=PERIOD, statuses=["active"])
    async with store_database(database) as db:
        expiring = retention.expire(db, tenant, rule)
        await anext(expiring)  # the sessions are found
        if change == "message":
            await api.message(changed)
        elif change == "ticket":
            await api.escalate(changed)
            age(database, changed)
        else:
            with psycopg.connect(database) as connection:
                if change == "draft":
                    Rows(connection, tenant).add("chat_drafts", session_id=changed)
                else:
                    connection.execute(
                        "UPDATE chat_sessions SET status = 'resolved' WHERE id = %s", [changed]
                    )
        deleted = [batch async for batch in expiring]
    assert sum(batch.sessions for batch in deleted) == 1
    assert sum(batch.kept for batch in deleted) == (change == "ticket")
    assert sessions_of(database, tenant) == {changed}
    assert first != changed


@pytest.mark.usefixtures("api")
async def test_session_that_is_locked_is_kept_and_not_waited_for(
    database: str, tenant: str
) -> None:
    """It is changing just now. The next run deletes it if it has not."""
    sessions = [old_session(database, tenant) for _ in range(3)]
    of_tenant = ("--tenant", tenant, "--older-than", "400d")
    with session_locked(database, sessions[1]):
        assert "deleted 2 sessions" in (await expire(database, *of_tenant)).output
    assert sessions_of(database, tenant) == {sessions[1]}
    assert "deleted 1 sessions" in (await expire(database, *of_tenant)).output


@pytest.mark.usefixtures("api")
async def test_each_session_is_found_once_over_many_pages(
    database: str, tenant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when some stay, and when all had their last change in one hour."""
    monkeypatch.setattr(retention, "SESSIONS_PER_PAGE", 3)
    monkeypatch.setattr(retention, "PAUSE_SECONDS", 0)
    sessions = [old_session(database, tenant) for _ in range(20)]
    sessions += [old_session(database, tenant, days=401 + number) for number in range(10)]
    kept = set(sessions[::2])
    rule = Rule(older_than=PERIOD, statuses=None)
    async with store_database(database) as db:
        with session_locked(database, *kept):
            batches = [batch async for batch in retention.expire(db, tenant, rule)]
    assert sum(batch.sessions for batch in batches) == 15
    assert sessions_of(database, tenant) == kept


@pytest.mark.usefixtures("api")
async def test_a_transaction_deletes_a_bounded_number_of_rows(database: str, tenant: str) -> None:
    """So that nobody waits long for it. A large session has a transaction of its own."""
    for days in range(500, 545):
        old_session(database, tenant, days=days)
    for days in (450, 440, 430):
        old_session(database, tenant, days=days, messages=erasure.ROWS_PER_BATCH // 2 + 1)
    old_session(database, tenant, days=420, messages=3 * erasure.ROWS_PER_BATCH)
    rule = Rule(older_than=PERIOD, statuses=None)
    async with store_database(database) as db:
        batches = [batch async for batch in retention.expire(db, tenant, rule)]
    assert [batch.sessions for batch in batches] == [0, 20, 20, 6, 1, 1, 1]


@pytest.mark.usefixtures("api")
async def test_expire_resumes_after_it_was_killed(database: str, tenant: str) -> None:
    """A session is deleted whole: what is left has all of its messages."""
    for _ in range(3):
        old_session(database, tenant, messages=1_000)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "chat_ticket_svc", "expire", "--tenant", tenant),
        *("--older-than", "400d"),
        env={**os.environ, "DATABASE_URL": database},
    )
    while counts(database, tenant)["chat_messages"] == 3_000:
        await asyncio.sleep(0.01)
    process.kill()
    await process.wait()
    left = counts(database, tenant)
    assert left["chat_messages"] == 1_000 * left["chat_sessions"] < 3_000
    assert (await expire(database, "--tenant", tenant, "--older-than", "400d")).status == 0
    assert not any(counts(database, tenant).values())


@pytest.mark.usefixtures("api")
async def test_two_runs_at_once_share_the_work(database: str, tenant: str) -> None:
    """Each session is deleted, and counted, once."""
    for _ in range(60):
        old_session(database, tenant, messages=1)
    runs = await asyncio.gather(
        *(expire(database, "--tenant", tenant, "--older-than", "400d") for _ in range(2))
    )
    assert [run.status for run in runs] == [0, 0], runs
    deleted = [re.findall(r"tenants: deleted (\d+) sessions", run.output)[0] for run in runs]
    assert sum(map(int, deleted)) == 60
    assert not any(counts(database, tenant).values())


async def test_watchers_receive_the_deletion(api: Api, database: str, tenant: str) -> None:
    session_id = old_session(database, tenant)
    async with watching(api, session_id) as watcher:
        await watcher.until("caught_up")
        assert (await expire(database, "--tenant", tenant, "--older-than", "400d")).status == 0
        assert (await watcher.next()).HasField("session_deleted")
        await watcher.end()


class TestTenants:
    TENANTS = ("acme", "bank", "c", "d")

    def fill(self, database: str) -> dict[str, str]:
        return {tenant: old_session(database, tenant, days=200) for tenant in self.TENANTS}

    def left(self, database: str) -> set[str]:
        return {tenant for tenant in self.TENANTS if sessions_of(database, tenant)}

    async def test_all_tenants(self, fresh_database: str) -> None:
        self.fill(fresh_database)
        done = await expire(fresh_database, "--all-tenants", "--older-than", "100d")
        assert (done.status, done.errors) == (0, "")
        assert re.findall(r"^tenant (\w+): deleted 1 ", done.output, re.MULTILINE) == [
            *self.TENANTS,
        ]
        assert "4 tenants: deleted 4 sessions" in done.output
        assert not self.left(fresh_database)

    async def test_policy_with_periods_of_tenants(
        self, fresh_database: str, tmp_path: Path
    ) -> None:
        """Tenants that are not named have the default. A table of a tenant stands for itself."""
        self.fill(fresh_database)
        policy = tmp_path / "policy.toml"
        policy.write_text(
            '[default]\nolder_than = "100d"\nstatus = ["archived"]\n'
            '[tenants.acme]\nolder_than = "4799h"\n'
            '[tenants.bank]\nolder_than = "201d"\nstatus = ["active"]\n'
            '[tenants."not there"]\nolder_than = "1d"\n'
        )
        dry = await expire(fresh_database, "--policy", str(policy), "--dry-run")
        assert "tenant acme: 1 sessions would be deleted" in dry.output
        assert self.left(fresh_database) == set(self.TENANTS)
        done = await expire(fresh_database, "--policy", str(policy))
        assert (done.status, done.errors) == (0, "")
        assert self.left(fresh_database) == {"bank", "c", "d"}
        policy.write_text(policy.read_text().replace('status = ["archived"]\n', ""))
        await expire(fresh_database, "--policy", str(policy))
        assert self.left(fresh_database) == {"bank"}

    async def test_policy_without_a_default_leaves_other_tenants(
        self, fresh_database: str, tmp_path: Path
    ) -> None:
        self.fill(fresh_database)
        policy = tmp_path / "policy.toml"
        policy.write_text('[tenants.c]\nolder_than = "100d"\nstatus = ["active", "resolved"]\n')
        assert (await expire(fresh_database, "--policy", str(policy))).status == 0
        assert self.left(fresh_database) == {"acme", "bank", "d"}


BAD_POLICIES = {
    "": ["must have a [default] or a [tenants.ID]"],
    "[default\n": ["Expected"],
    "[default]\n": ["default.older_than: Field required"],
    '[default]\nolder_than = "0d"\nstatus = []\n[tenants.a]\nolder_than = 4\nyears = 1\n': [
        "default.older_than: must be longer than 0",
        "default.status: List should have at least 1 item",
        "tenants.a.older_than: must be a number of days or hours",
        "tenants.a.years: Extra inputs are not permitted",
    ],
    '[default]\nolder_than = "1d"\nstatus = ["active", "done"]\n[tenant.a]\nolder_than = "1d"\n': [
        "default.status.1: Input should be 'active', 'resolved' or 'archived'",
        "tenant: Extra inputs are not permitted",
    ],
    'default = "400d"\n': ["default: must be a table"],
    f"a = {'[' * 5000}\n": ["too deeply nested"],
    '[tenants."ä"]\nolder_than = "1d"\n': ["must be a tenant id"],
}


@pytest.mark.usefixtures("api")
@pytest.mark.parametrize(("policy", "problems"), BAD_POLICIES.items())
async def test_bad_policy_deletes_nothing(
    database: str, tmp_path: Path, policy: str, problems: list[str]
) -> None:
    """And all that is wrong in it is named, with its place."""
    tenant = an_id()
    old_session(database, tenant)
    file = tmp_path / "policy.toml"
    file.write_text(f'{policy}[tenants.{tenant}]\nolder_than = "1d"\n' if policy else "")
    done = await expire(database, "--policy", str(file))
    assert (done.status, done.output) == (1, "")
    assert done.errors.count("\n") == len(problems)
    for problem in problems:
        assert problem in done.errors
    assert done.errors.count(str(file)) == len(problems)
    assert len(sessions_of(database, tenant)) == 1


@pytest.mark.parametrize(
    ("arguments", "status", "problem"),
    [
        (("--older-than", "1d"), 2, "one of the arguments --tenant --all-tenants --policy"),
        (("--tenant", "t"), 1, "--older-than: required without --policy"),
        (("--tenant", "t", "--all-tenants"), 2, "not allowed with argument --tenant"),
        (("--policy", "x", "--older-than", "1d"), 1, "not with --policy"),
        (("--policy", "x", "--status", "active"), 1, "not with --policy"),
        (("--policy", "/no/file"), 1, "/no/file: No such file or directory"),
        (("--tenant", "t", "--older-than", "0d"), 2, "longer than 0, and at most 36500d"),
        (("--tenant", "t", "--older-than", "36501d"), 2, "longer than 0, and at most 36500d"),
        *(
            (("--tenant", "t", "--older-than", text), 2, "a number of days or hours, such as 400d")
            for text in ("", "400", "1w", "1.5d", "1d2h", "400D", " 1d", "٣d", "9" * 30 + "d")
        ),
        (("--tenant", "t", "--older-than", "1d", "--status", "done,"), 2, "'' is not one of"),
    ],
)
async def test_wrong_arguments_are_named(
    arguments: tuple[str, ...], status: int, problem: str
) -> None:
    done = await command("expire", *arguments, DATABASE_URL="")
    assert (done.status, done.output) == (status, "")
    assert problem in done.errors
