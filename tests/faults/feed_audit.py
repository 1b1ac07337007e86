"""The database's own audit of commits: each state of each session and ticket, and its transaction.

Triggers write it in the transaction of the change. So it has what was committed and nothing else.
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any, NamedTuple, Self

import psycopg

INSTALL = """
CREATE TABLE feed_audit (
    number         bigint GENERATED ALWAYS AS IDENTITY,
    tenant_id      text   NOT NULL,
    kind           text   NOT NULL,
    id             uuid   NOT NULL,
    revision       bigint NOT NULL,
    transaction_id xid8   NOT NULL DEFAULT pg_current_xact_id(),
    state          jsonb  -- NULL: it was deleted
);

CREATE FUNCTION audit_session() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'DELETE' THEN
        INSERT INTO feed_audit (tenant_id, kind, id, revision)
        VALUES (OLD.tenant_id, 'session', OLD.id, OLD.revision);
    ELSE
        INSERT INTO feed_audit (tenant_id, kind, id, revision, state)
        VALUES (NEW.tenant_id, 'session', NEW.id, NEW.revision, jsonb_build_array(
            NEW.status, NEW.has_ticket, NEW.user_id, NEW.title, coalesce(NEW.labels, '{}')));
    END IF;
    RETURN NULL;
END
$$;

CREATE FUNCTION audit_ticket() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'DELETE' THEN
        INSERT INTO feed_audit (tenant_id, kind, id, revision)
        VALUES (OLD.tenant_id, 'ticket', OLD.id, OLD.revision);
    ELSE
        INSERT INTO feed_audit (tenant_id, kind, id, revision, state)
        VALUES (NEW.tenant_id, 'ticket', NEW.id, NEW.revision, jsonb_build_array(
            NEW.status, NEW.title, NEW.external_ref));
    END IF;
    RETURN NULL;
END
$$;

CREATE TRIGGER audit AFTER INSERT OR UPDATE OR DELETE ON chat_sessions
    FOR EACH ROW EXECUTE FUNCTION audit_session();
CREATE TRIGGER audit AFTER INSERT OR UPDATE OR DELETE ON tickets
    FOR EACH ROW EXECUTE FUNCTION audit_ticket();
"""

CHANGES = """
SELECT kind, id::text, revision, transaction_id::text::bigint, state
  FROM feed_audit WHERE tenant_id = %s ORDER BY number
"""
STORED = """
SELECT 'session', id::text, revision,
       jsonb_build_array(status, has_ticket, user_id, title, coalesce(labels, '{}'))
  FROM chat_sessions WHERE tenant_id = %(tenant)s
 UNION ALL
SELECT 'ticket', id::text, revision, jsonb_build_array(status, title, external_ref)
  FROM tickets WHERE tenant_id = %(tenant)s
"""

# `session` or `ticket`, and the id.
Key = tuple[str, str]


class SessionState(NamedTuple):
    """What filters look at, and the title."""

    status: str
    has_ticket: bool
    user_id: str = ""
    title: str = ""
    labels: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(
        cls,
        status: str,
        has_ticket: bool,
        user_id: str | None,
        title: str | None,
        labels: dict[str, str],
    ) -> Self:
        return cls(status, has_ticket, user_id or "", title or "", tuple(sorted(labels.items())))


class TicketState(NamedTuple):
    status: str
    title: str
    external_ref: str = ""


State = SessionState | TicketState


class Change(NamedTuple):
    """A committed change of a session or ticket, and its state from then on."""

    key: Key
    revision: int
    transaction: int
    state: State | None  # None: deleted


class Snapshot(NamedTuple):
    """A pg_snapshot: which transactions had been committed when it was taken."""

    xmin: int  # all below have ended
    xmax: int  # this one and all above had not
    running: frozenset[int]

    @classmethod
    def parse(cls, text: str) -> Self:
        xmin, xmax, running = text.split(":")
        return cls(int(xmin), int(xmax), frozenset(map(int, filter(None, running.split(",")))))

    def sees(self, transaction: int) -> bool:
        return transaction < self.xmax and transaction not in self.running


class Stored(NamedTuple):
    """What the tables have of a session or ticket."""

    revision: int
    state: State


class Audit(NamedTuple):
    """The changes of each session and ticket of a tenant, in the order of their commits."""

    histories: dict[Key, list[Change]]
    stored: dict[Key, Stored]

    @classmethod
    def of(cls, changes: Iterable[Change], stored: dict[Key, Stored]) -> Self:
        histories: dict[Key, list[Change]] = defaultdict(list)
        for change in changes:
            histories[change.key].append(change)
        return cls(dict(histories), stored)


def read_audit(connection: psycopg.Connection[Any], tenant: str) -> Audit:
    changes = [
        Change((kind, each), revision, transaction, fields and _state(kind, fields))
        for kind, each, revision, transaction, fields in connection.execute(CHANGES, (tenant,))
    ]
    return Audit.of(changes, read_stored(connection, tenant))


def read_stored(connection: psycopg.Connection[Any], tenant: str) -> dict[Key, Stored]:
    return {
        (kind, each): Stored(revision, _state(kind, fields))
        for kind, each, revision, fields in connection.execute(STORED, {"tenant": tenant})
    }


def _state(kind: str, fields: list[Any]) -> State:
    if kind == "session":
        return SessionState.of(*fields)
    status, title, external_ref = fields
    return TicketState(status, title, external_ref or "")
