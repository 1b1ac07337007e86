"""Finishing the expired drafts of many sessions and tenants in one transaction.

When a server dies, all of its writers may be lost at once. One commit for many drafts, and one
append for those of a session, finish them several times as fast as a transaction for each.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

from chat_ticket_svc.store import append
from chat_ticket_svc.store.append import array_literal
from chat_ticket_svc.store.database import Database
from chat_ticket_svc.store.drafts import CONTENT
from chat_ticket_svc.store.messages import NewMessage
from chat_ticket_svc.store.transaction import Transaction


class ExpiredDraft(NamedTuple):
    """A draft whose writer counts as lost. `length` is in bytes of UTF-8."""

    tenant_id: str
    session_id: str
    id: str
    length: int


# A session that is locked is skipped: the others that are locked do not wait for it.
LOCK_SESSIONS = """
SELECT s.tenant_id COLLATE "C", s.id::text
  FROM unnest((SELECT %(tenant_ids)s::text[]), (SELECT %(session_ids)s::uuid[]))
           AS expired (tenant_id, session_id)
  JOIN chat_sessions s ON s.tenant_id = expired.tenant_id AND s.id = expired.session_id
   FOR UPDATE OF s SKIP LOCKED
"""

# After the sessions, as everywhere.
LOCK_DRAFTS = """
SELECT d.tenant_id COLLATE "C", d.id::text
  FROM unnest((SELECT %(tenant_ids)s::text[]), (SELECT %(ids)s::uuid[])) AS expired (tenant_id, id)
  JOIN chat_drafts d ON d.tenant_id = expired.tenant_id AND d.id = expired.id
 WHERE d.expires_at < clock_timestamp()
   FOR UPDATE OF d
"""

# A statement of its own, after LOCK_DRAFTS: the pieces that the locks waited for are in its
# snapshot.
DELETE = f"""
DELETE FROM chat_drafts d
 USING unnest((SELECT %(tenant_ids)s::text[]), (SELECT %(ids)s::uuid[])) AS locked (tenant_id, id)
 WHERE d.tenant_id = locked.tenant_id AND d.id = locked.id
RETURNING d.tenant_id COLLATE "C", d.session_id::text, d.id::text, d.length, d.created_at,
          d.role, {CONTENT}, d.language_code, d.metadata::text, d.author_kind, d.author_id
"""


async def finish(
    db: Database, expired: Sequence[ExpiredDraft], *, default_search_language: str
) -> tuple[list[ExpiredDraft], list[ExpiredDraft]]:
    """Make INCOMPLETE messages of expired drafts, all or none, and drop the empty ones.

    Returns those that it has finished, and those whose sessions are locked. Of the others the
    writers are back, or they are gone.
    """

    async def body(transaction: Transaction) -> tuple[list[ExpiredDraft], list[ExpiredDraft]]:
        sessions = {
            "tenant_ids": array_literal(draft.tenant_id for draft in expired),
            "session_ids": array_literal(draft.session_id for draft in expired),
        }
        locked = set(await transaction.fetch_all(LOCK_SESSIONS, sessions, lambda *row: row))
        of_locked = [draft for draft in expired if (draft.tenant_id, draft.session_id) in locked]
        skipped = [draft for draft in expired if (draft.tenant_id, draft.session_id) not in locked]
        keys = await transaction.fetch_all(
            LOCK_DRAFTS, _keys([(draft.tenant_id, draft.id) for draft in of_locked]), _row
        )
        # The oldest first, as its message comes first.
        rows = sorted(
            await transaction.fetch_all(DELETE, _keys(keys), _row), key=lambda row: row[4]
        )
        new: defaultdict[tuple[str, str], list[NewMessage]] = defaultdict(list)
        for tenant_id, session_id, draft_id, _, _, role, content, *rest in rows:
            if content:
                language_code, metadata, author_kind, author_id = rest
                new[tenant_id, session_id].append(
                    NewMessage(
                        draft_id, role, content, language_code, metadata, (), author_kind,
                        author_id, "incomplete",
                    )
                )  # fmt: skip
        for (tenant_id, session_id), messages in new.items():
            params = append.append_params(tenant_id, session_id, messages, default_search_language)
            stored = await transaction.fetch_all(append.APPEND, params, _row)
            append.stored_messages(session_id, messages, stored)  # raises unless each is stored
        return [ExpiredDraft(*row[:4]) for row in rows], skipped

    return await db.transaction(body, idempotent=True)


def _row(*row: Any) -> tuple[Any, ...]:
    return row


def _keys(keys: Sequence[Sequence[str]]) -> dict[str, str]:
    return {
        "tenant_ids": array_literal(tenant_id for tenant_id, _ in keys),
        "ids": array_literal(draft_id for _, draft_id in keys),
    }
