"""`make faults-quick`: the part of the fault runs that the suite makes, with a fixed seed.

`make faults` makes all of them, and shows the checker its mutants; see `matrix` and `mutants`.
"""

import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from support.scratch_directory import scratch_directory

from chat_ticket.v1 import resources_pb2 as r
from faults.checker import check
from faults.draft_record import DraftRecord, Writer
from faults.environment import Environment
from faults.matrix import FAULTS, Fault
from faults.record import Outcome
from faults.runs import run
from faults.workload import Workload

SEED = 1
AROUND_SECONDS = 0.2
# The others meet drafts in `make faults`: their leases take time to run out.
FAULTS_WITH_DRAFTS = ("answers to commits lost", "service SIGSTOP")


@pytest.fixture(scope="module")
def environment() -> Iterator[Environment]:
    with scratch_directory() as directory, Environment(directory) as environment:
        yield environment


@pytest.mark.parametrize(
    "fault", [each for each in FAULTS if each.quick_amount], ids=lambda fault: fault.name
)
def test_nothing_is_lost(environment: Environment, fault: Fault) -> None:
    """Whatever breaks: every acknowledged write is stored once, and every watch delivers it."""
    result = run(
        environment,
        fault,
        seed=SEED,
        amount=fault.quick_amount,
        around=AROUND_SECONDS,
        drafts=fault.name in FAULTS_WITH_DRAFTS,
    )
    assert result.valid, f"{result.acknowledged} writes before the fault: too few"
    assert result.violations == []


@pytest.fixture(scope="module")
def work(environment: Environment) -> Iterator[Workload]:
    """A run without violations, whose watches have delivered everything."""
    with environment.workload(SEED, "checked", drafts=True) as workload:
        while not (_has_tickets(workload) and _shown_drafts(workload)):
            time.sleep(0.1)
        environment.run(workload.settle(30))
        # The tests damage what is stored, and the watches would see that too.
        environment.run(workload.stop_watching())
        assert environment.check(workload) == []
        yield workload


def _has_tickets(workload: Workload) -> bool:
    """Whether each tenant has one that stays linked: its caller has gone on to another session."""
    writes = list(workload.record.writes)
    unlinked = {write.session_id for write in writes if write.kind == "DeleteChatTicket"}
    left, linked = set(), set()
    for write in reversed(writes):
        if write.kind == "CreateChatSession":
            left.add(write.tenant)
        if (
            write.kind == "CreateChatTicket"
            and write.outcome is Outcome.ACKNOWLEDGED
            and write.tenant in left
            and write.session_id not in unlinked
        ):
            linked.add(write.tenant)
    return linked == set(workload.tenants)


def _shown_drafts(workload: Workload) -> list[DraftRecord]:
    """Drafts of the first tenant that one writer has completed, and a watch has shown."""
    shown = {
        draft_id
        for watch in workload.record.watches
        if watch.drafts is not None
        for draft_id, content in list(watch.drafts.longest.items())
        if content
    }
    return [
        draft
        for draft in list(workload.record.drafts)
        if draft.tenant == workload.tenants[0] and draft.id in shown and len(draft.writers) == 1
        if not draft.has_stop and draft.writers[0].finish_state == r.CHAT_MESSAGE_STATE_COMPLETE
        if draft.messages
    ]


MESSAGE = """(SELECT m.id FROM chat_messages m
  WHERE m.tenant_id = '{tenant}' AND m.session_id = '{session}'
    AND m.content LIKE 'of {tenant}: %'  -- not of a draft
  ORDER BY m.sequence {which} LIMIT 1)
"""
COPY = """
INSERT INTO chat_messages
      (tenant_id, session_id, sequence, revision, role, content, metadata, created_at)
SELECT tenant_id, session_id, sequence + 100000, revision + 100000,
       role, content, metadata, created_at
  FROM chat_messages WHERE tenant_id = '{tenant}' AND id = {last}
"""


# What the checker must find, and the damage to the database, with triggers disabled.
DAMAGE = {
    "is lost": "DELETE FROM chat_messages WHERE tenant_id = '{tenant}' AND id = {first}",
    "is not as it was acknowledged": (
        "UPDATE chat_messages SET content = 'other' WHERE tenant_id = '{tenant}' AND id = {first}"
    ),
    "is there twice": COPY,
    "are out of order": (
        "UPDATE chat_messages SET created_at = created_at - interval '1 day'"
        " WHERE tenant_id = '{tenant}' AND id = {last}"
    ),
    "stopped at": "UPDATE chat_sessions SET revision = revision + 1 WHERE tenant_id = '{tenant}'",
    "holds another": (
        "UPDATE chat_messages SET metadata = '{{}}' WHERE tenant_id = '{tenant}' AND id = {last}"
    ),
    "has_ticket is": (
        "UPDATE chat_sessions SET has_ticket = NOT has_ticket WHERE tenant_id = '{tenant}'"
    ),
    "the ticket of session": "DELETE FROM chat_tickets WHERE tenant_id = '{tenant}'",
    "ticket ": "DELETE FROM tickets WHERE tenant_id = '{tenant}'",
}


@pytest.mark.parametrize("found", DAMAGE)
def test_checker_finds_damage(environment: Environment, work: Workload, found: str) -> None:
    """Each invariant of the stored data."""
    tenant = work.tenants[0]
    named = {"tenant": tenant, "session": work.sessions[tenant][0]}
    first, last = (MESSAGE.format(**named, which=which) for which in ("", "DESC"))
    with psycopg.connect(environment.database_url) as connection:
        connection.execute("SET session_replication_role = replica")
        connection.execute(DAMAGE[found].format(**named, first=first, last=last))  # type: ignore[arg-type]
        texts = [str(each) for each in check(work.record, connection, work.tenants)]
        connection.rollback()
    assert any(found in text for text in texts), texts


SECOND_MESSAGE = """
INSERT INTO chat_messages (tenant_id, session_id, sequence, revision, role, content, created_at)
SELECT tenant_id, session_id, sequence + 100000, revision + 100000, role, content || 'x', created_at
  FROM chat_messages WHERE tenant_id = '{tenant}' AND id = '{draft}'
"""
OPEN_DRAFT = """
INSERT INTO chat_drafts (id, tenant_id, session_id, expires_at, role)
SELECT id, tenant_id, session_id, now() - interval '1 hour', role
  FROM chat_messages WHERE tenant_id = '{tenant}' AND id = '{draft}'
"""
CHANGED = "UPDATE chat_messages SET {change} WHERE tenant_id = '{{tenant}}' AND id = '{{draft}}'"
SHORTER = "content = left(content, -1)"
OTHER = "content = overlay(content PLACING '#' FROM 3)"
TWICE = "content = content || content"
MOVED = "sequence = sequence + 100000, revision = revision + 100000"

DAMAGE_TO_DRAFTS = {
    "acknowledged text is lost, with the draft": (
        "DELETE FROM chat_messages WHERE tenant_id = '{tenant}' AND id = '{draft}'"
    ),
    "acknowledged text is lost, ": CHANGED.format(change=SHORTER),
    "acknowledged text is lost or changed": CHANGED.format(change=OTHER),
    "other text": CHANGED.format(change=TWICE),
    "that it has not in the end": CHANGED.format(change=OTHER),
    "and its writer had not finished": CHANGED.format(change=SHORTER),
    "and nobody had stopped it": CHANGED.format(change="state = 'stopped'"),
    "and its writer was there": CHANGED.format(change="state = 'incomplete'"),
    "told of another message": CHANGED.format(change=MOVED),
    "has a second message": SECOND_MESSAGE,
    "has outlived its lease": OPEN_DRAFT,
}


@pytest.mark.parametrize("found", DAMAGE_TO_DRAFTS)
def test_checker_finds_damage_to_drafts(
    environment: Environment, work: Workload, found: str
) -> None:
    """What is stored of a draft is what its writer wrote, and its state fits."""
    draft = _shown_drafts(work)[0]
    with psycopg.connect(environment.database_url) as connection:
        connection.execute("SET session_replication_role = replica")
        damage = DAMAGE_TO_DRAFTS[found].format(tenant=draft.tenant, draft=draft.id)
        connection.execute(damage)  # type: ignore[arg-type]
        texts = [str(each) for each in check(work.record, connection, work.tenants)]
        connection.rollback()
    assert any(found in text for text in texts), texts


def test_sampler_finds_damage_to_drafts(environment: Environment, work: Workload) -> None:
    """What must hold at every moment: one of draft and message, and none beyond its lease."""
    draft = _shown_drafts(work)[0]
    lost = DraftRecord(tenant=draft.tenant, session_id=draft.session_id, id=str(uuid.uuid4()))
    lost.writers.append(Writer(name="lost", acknowledged=1))
    expected = {
        f"draft {draft.id} is a message and still a draft",
        f"draft {draft.id} has outlived its lease",
        f"draft {lost.id} was acknowledged, and is neither a draft nor a message",
    }
    with (
        psycopg.connect(environment.database_url, autocommit=True) as connection,
        psycopg.connect(environment.database_url) as locking,
    ):
        # The servers wait for this lock to finish the draft.
        lock = "SELECT FROM chat_sessions WHERE tenant_id = %s AND id = %s FOR UPDATE"
        locking.execute(lock, (draft.tenant, draft.session_id))
        connection.execute("SET session_replication_role = replica")
        damage = OPEN_DRAFT.format(tenant=draft.tenant, draft=draft.id)
        connection.execute(damage)  # type: ignore[arg-type]
        work.record.drafts.append(lost)
        with environment.sampled_drafts(work, overdue_seconds=0.3) as sampler:
            deadline = time.monotonic() + 10
            while sampler.violations.keys() != expected and time.monotonic() < deadline:
                time.sleep(0.05)
        work.record.drafts.remove(lost)
        ids = (draft.tenant, draft.id)
        connection.execute("DELETE FROM chat_drafts WHERE tenant_id = %s AND id = %s", ids)
    assert sampler.violations.keys() == expected


def test_checker_finds_missing_deliveries(environment: Environment, work: Workload) -> None:
    """Or delivered twice, or out of order."""

    def texts() -> str:
        return str(environment.check(work))

    watch = next(each for each in work.record.watches if each.tenant == work.tenants[1])
    delivered = watch.created
    for created, found in (
        (delivered[1:], "never delivered"),
        ([*delivered, delivered[-1]], "2 times"),
        (delivered[::-1], "out of order"),
    ):
        watch.created = created
        assert found in texts()
    watch.created = delivered
    assert texts() == "[]"


def test_mutants_fit_the_service() -> None:
    """What they change is there to be changed; whether they are found is for `make faults`."""
    switch_on = "from faults.mutants import MUTANTS\nfor each in MUTANTS.values(): each.switch_on()"
    path = os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "DATABASE_URL": "postgresql://"}
    subprocess.run([sys.executable, "-c", switch_on], check=True, env=environment)
