"""Full-text search over the messages of a tenant, bounded however many there are and match.

There are two ways to look, each of which reads so many rows and ranks so much text at the most,
and says when that was not all. By the index: what matches, but of too much of it an arbitrary
part. By session: the messages of the newest sessions one by one, which meets plenty of what is
common and hardly anything of what is rare. When neither is enough, a page is the best of both.
"""

from datetime import datetime
from typing import NamedTuple

import psycopg

from chat_ticket_svc import errors
from chat_ticket_svc.store.database import Database
from chat_ticket_svc.store.transaction import Params, Transaction


class Hit(NamedTuple):
    """A message that a search found; `headline` has the hits between the caller's markers."""

    message_id: str
    session_id: str
    sequence: int
    role: str
    created_at: int
    score: float
    headline: str


class Page(NamedTuple):
    """The best matches in order, of how many, and whether there may be more than those."""

    hits: list[Hit]
    matches: int
    incomplete: bool


# A search result shows a part of a message; one endless word must not make it a whole one.
HEADLINE_CHARACTERS = 8000

# What each way looks at. Making words of it takes 6 microseconds for a message of a chat, and
# 0.1 s for a MiB of long ones.
MOST_MESSAGES = 5000
MOST_BYTES = 2 * 1024 * 1024
# Sessions passed over because they have not changed since the time asked for.
MOST_SESSIONS = 50_000

# Reading what the index has on a word takes the longer the more it is, for nothing when there is
# too much to look at. So when the planner expects that, the other way may do with these.
TOO_MANY_MATCHES = 2 * MOST_MESSAGES
ENOUGH_MATCHES = 100
# The planner may be wrong.
INDEX_TIMEOUT_MS = 1000

# Each tenant and query needs a plan of its own: they differ by orders of magnitude. Parallel
# workers would meet the rows in no order. A bitmap of what matches that has no room forgets which
# rows of a page those are, and then all of them are made into words.
SETTINGS = """
SELECT set_config('plan_cache_mode', 'force_custom_plan', true),
       set_config('max_parallel_workers_per_gather', '0', true),
       set_config('jit', 'off', true),
       set_config('work_mem', '64MB', true),
       set_config('statement_timeout',
                  coalesce(%(timeout)s::text, current_setting('statement_timeout')), true)
"""

MATCHES = """
      FROM chat_messages
     WHERE tenant_id = %(tenant_id)s
       AND to_tsvector('english', content) @@ websearch_to_tsquery('english', %(query)s)
"""

EXPECT = f"EXPLAIN (FORMAT JSON) SELECT {MATCHES}"

FOUND_BY_INDEX = f"""
    SELECT id, session_id, sequence, role, content, created_at, 0 AS place
    {MATCHES}
     LIMIT %(messages)s + 1
"""

# A message is not older than its session, nor newer than the session's last change. A session
# without messages is a row as well, so it counts; so is the first one that is too many.
FOUND_BY_SESSION = """
    SELECT m.*, s.place
      FROM (SELECT id, created_at, updated_at,
                   row_number() OVER (ORDER BY created_at DESC, id DESC) AS place
              FROM chat_sessions
             WHERE tenant_id = %(tenant_id)s
               AND (%(session_id)s::uuid IS NULL OR id = %(session_id)s::uuid)
               AND (%(created_to)s::timestamptz IS NULL
                    OR created_at < %(created_to)s::timestamptz)
             ORDER BY created_at DESC, id DESC
             LIMIT %(sessions)s + 1) AS s
      LEFT JOIN LATERAL (
           SELECT id, session_id, sequence, role, content, created_at
             FROM chat_messages
            WHERE tenant_id = %(tenant_id)s AND session_id = s.id
            ORDER BY sequence DESC
            LIMIT %(messages)s + 1) AS m ON true
     WHERE %(created_from)s::timestamptz IS NULL
        OR s.updated_at >= %(created_from)s::timestamptz
        OR s.place > %(sessions)s
     ORDER BY s.created_at DESC, s.id DESC, m.sequence DESC
     LIMIT %(messages)s + 1
"""

# The newest come first also where there is more text than can be ranked.
RANKED = """
), allowed AS (
    SELECT *, coalesce(sum(octet_length(content)) OVER (
                           ORDER BY created_at DESC, id DESC
                           ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING), 0) AS bytes_before
      FROM found
     WHERE (%(session_id)s::uuid IS NULL OR session_id = %(session_id)s::uuid)
       AND (%(roles)s::text[] IS NULL OR role = ANY (%(roles)s::text[]))
       AND (%(created_from)s::timestamptz IS NULL OR created_at >= %(created_from)s::timestamptz)
       AND (%(created_to)s::timestamptz IS NULL OR created_at < %(created_to)s::timestamptz)
), matching AS (
    SELECT allowed.*, ts_rank(words, websearch_to_tsquery('english', %(query)s)) AS score
      FROM allowed
     CROSS JOIN LATERAL (SELECT to_tsvector('english', content) AS words OFFSET 0) AS made
     WHERE bytes_before < %(bytes)s AND words @@ websearch_to_tsquery('english', %(query)s)
), page AS (
    SELECT * FROM matching
     WHERE (score, created_at, id)
           < (%(after_score)s::real, %(after_time)s::timestamptz, %(after_id)s::uuid)
     ORDER BY score DESC, created_at DESC, id DESC
     LIMIT %(limit)s
)
SELECT coalesce((SELECT count(*) > %(messages)s OR max(place) > %(sessions)s FROM found), false)
           OR EXISTS (SELECT FROM allowed WHERE bytes_before >= %(bytes)s),
       (SELECT count(*) FROM matching),
       page.id::text, page.session_id::text, page.sequence, page.role,
       (extract(epoch FROM page.created_at) * 1000000)::bigint, page.score,
       left(ts_headline('english', page.content, websearch_to_tsquery('english', %(query)s),
                        %(headline)s), %(characters)s)
  FROM (SELECT) AS looked_at LEFT JOIN page ON true
 ORDER BY page.score DESC, page.created_at DESC, page.id DESC
"""

SEARCH_BY_INDEX = f"WITH found AS MATERIALIZED ({FOUND_BY_INDEX} {RANKED}"
SEARCH_BY_SESSION = f"WITH found AS MATERIALIZED ({FOUND_BY_SESSION} {RANKED}"

# What PostgreSQL makes of a query, which it may fail to.
PARSE = "SELECT websearch_to_tsquery('english', %(query)s)::text"


async def page(
    db: Database,
    tenant_id: str,
    query: str,
    *,
    session_id: str | None,
    roles: list[str] | None,
    created_from: datetime | None,
    created_to: datetime | None,
    after_score: float,
    after_time: datetime,
    after_id: str,
    start_marker: str,
    stop_marker: str,
    limit: int,
) -> Page:
    """The best matches after (score, time, id), with the words that match between the markers.

    InvalidArgumentError for a query that PostgreSQL cannot parse.
    """
    params = {
        "tenant_id": tenant_id,
        "query": query,
        "session_id": session_id,
        "roles": roles,
        "created_from": created_from,
        "created_to": created_to,
        "messages": MOST_MESSAGES,
        "bytes": MOST_BYTES,
        "sessions": MOST_SESSIONS,
        "after_score": after_score,
        "after_time": after_time,
        "after_id": after_id,
        "headline": f"StartSel={start_marker}, StopSel={stop_marker}",
        "characters": HEADLINE_CHARACTERS,
        "limit": limit,
    }
    pages: list[Page] = []
    try:
        [expected] = await db.fetch_all(EXPECT, params, lambda plan: plan[0]["Plan"]["Plan Rows"])
        too_many = expected > TOO_MANY_MATCHES
        # Most sessions are short enough to be looked through.
        by_session_first = too_many or session_id is not None
        for by_index in (not by_session_first, by_session_first):
            found = await _look(db, params, by_index=by_index)
            enough = too_many and not by_index and found.matches >= ENOUGH_MATCHES
            if enough or not found.incomplete:
                return found
            pages.append(found)
    except psycopg.errors.InternalError_:  # more than 32 operators in one another, or a fault
        try:
            await db.fetch_all(PARSE, params, str)
        except psycopg.errors.InternalError_ as error:
            violation = errors.Violation("query", "has too many operators, such as -, in a row")
            raise errors.InvalidArgumentError([violation]) from error
        raise
    hits = {hit.message_id: hit for found in pages for hit in found.hits}
    best = sorted(hits.values(), key=_rank, reverse=True)
    return Page(best[:limit], sum(found.matches for found in pages), incomplete=True)


def _rank(hit: Hit) -> tuple[float, int, str]:
    return hit.score, hit.created_at, hit.message_id


async def _look(db: Database, params: Params, *, by_index: bool) -> Page:
    async def body(transaction: Transaction) -> Page:
        await transaction.execute(
            SETTINGS, {"timeout": str(INDEX_TIMEOUT_MS) if by_index else None}
        )
        rows = await transaction.fetch_all(
            SEARCH_BY_INDEX if by_index else SEARCH_BY_SESSION, params, lambda *row: row
        )
        incomplete, matches, *_ = rows[0]
        hits = [Hit(*hit) for _, _, *hit in rows if hit[0] is not None]
        return Page(hits, matches, incomplete)

    try:
        return await db.transaction(body, idempotent=True)
    except errors.DeadlineExceededError:
        if not by_index:
            raise
        return Page([], 0, incomplete=True)
