"""Brings the messages of tenants to the search languages that they have now."""

import asyncio
from collections.abc import AsyncIterator
from typing import NamedTuple
from uuid import UUID

from chat_ticket_svc.store.database import Database

# Limits of a transaction that reindexes. A word of a message takes some microseconds.
MESSAGES_PER_BATCH = 1000
BYTES_PER_BATCH = 1024 * 1024
# How long to wait for messages that another transaction has locked.
LOCKED_SECONDS = 0.2

ESTIMATED_MESSAGES = """
SELECT greatest(reltuples, 0)::bigint FROM pg_class WHERE oid = to_regclass('chat_messages')
"""

MESSAGES_OF_TENANT = "SELECT count(*) FROM chat_messages WHERE tenant_id = %(tenant_id)s"

# Messages that somebody has locked are skipped: waiting for them could be a deadlock, as a deletion
# of a session locks its messages in another order.
REINDEX = """
WITH wanted AS MATERIALIZED (
    SELECT coalesce((SELECT search_language FROM tenant_settings
                      WHERE tenant_id = %(tenant_id)s),
                    %(default_language)s::text) AS language
), page AS MATERIALIZED (
    SELECT id, octet_length(content) AS bytes,
           language_code IS NULL AND search_language <> language AS is_due
      FROM chat_messages CROSS JOIN wanted
     WHERE tenant_id = %(tenant_id)s AND id >= %(first)s::uuid
     ORDER BY id
     LIMIT %(messages)s
), due AS MATERIALIZED (
    SELECT id, sum(bytes) OVER (ORDER BY id) - bytes AS bytes_before FROM page WHERE is_due
), locked AS MATERIALIZED (
    SELECT id FROM chat_messages
     WHERE tenant_id = %(tenant_id)s
       AND id IN (SELECT id FROM due WHERE bytes_before < %(bytes)s)
       FOR NO KEY UPDATE SKIP LOCKED
), changed AS (
    UPDATE chat_messages SET search_language = language
      FROM wanted
     WHERE tenant_id = %(tenant_id)s AND id IN (SELECT id FROM locked)
    RETURNING id
)
SELECT (SELECT count(*) FROM page), (SELECT count(*) FROM due), (SELECT count(*) FROM changed),
       (SELECT id::text FROM page ORDER BY id DESC LIMIT 1)
"""


class Reindexed(NamedTuple):
    """How many messages a batch has read, and how many of them have another language now."""

    read: int
    changed: int


class _Batch(NamedTuple):
    read: int
    due: int
    changed: int
    last: str | None


async def count_messages(db: Database, tenant_id: str | None) -> int:
    """The number of messages of a tenant. Of all tenants, PostgreSQL's estimate."""
    if tenant_id is None:
        [count] = await db.fetch_all(ESTIMATED_MESSAGES, {}, int)
    else:
        [count] = await db.fetch_all(MESSAGES_OF_TENANT, {"tenant_id": tenant_id}, int)
    return count


async def reindex(
    db: Database, tenant_id: str, *, default_language: str
) -> AsyncIterator[Reindexed]:
    """Bring the messages of a tenant to its search language, in batches.

    Messages that name their own language stay as they are. `default_language` is that of a tenant
    without a setting. Each batch is a transaction, which locks nothing that an append waits for. No
    revision changes. Messages that are right are only read, so after an interruption, another call
    continues.
    """
    first = UUID(int=0)
    while True:
        params = {
            "tenant_id": tenant_id,
            "default_language": default_language,
            "first": str(first),
            "messages": MESSAGES_PER_BATCH,
            "bytes": BYTES_PER_BATCH,
        }
        [batch] = await db.write(REINDEX, params, _Batch, idempotent=True)
        if batch.changed < batch.due:  # locked, or too much text for one transaction
            yield Reindexed(0, batch.changed)
            if not batch.changed:
                await asyncio.sleep(LOCKED_SECONDS)
            continue
        yield Reindexed(batch.read, batch.changed)
        following = UUID(batch.last).int + 1 if batch.last else 0
        if batch.read < MESSAGES_PER_BATCH or following == 2**128:
            return
        first = UUID(int=following)
