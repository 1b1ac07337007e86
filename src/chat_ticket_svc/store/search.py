"""Full-text search over the messages of a tenant, with a bounded cost.

There are two strategies. Each reads and ranks a bounded amount, and reports whether it was
incomplete. By index: read the messages that match. If too many match, an arbitrary part of them is
ranked. By session: read the messages of the newest sessions. That finds many matches of a common
word and few of a rare one. If both are incomplete, the page has the best matches of both.

A query of stop words alone matches nothing, because websearch_to_tsquery turns it into an empty
query.
"""

from datetime import datetime
from typing import NamedTuple

import psycopg

from chat_ticket_svc import errors
from chat_ticket_svc.store.database import Database
from chat_ticket_svc.store.transaction import Params, Transaction


class Hit(NamedTuple):
    """A message that matches. In `snippet`, the caller's markers enclose the matching words."""

    message_id: str
    session_id: str
    sequence: int
    role: str
    created_at: int
    score: float
    snippet: str


class SearchPage(NamedTuple):
    """The best matches in order, the number of all matches, and whether there may be more."""

    hits: list[Hit]
    matches: int
    incomplete: bool


# A search result shows a part of a message. One endless word must not return the whole message.
SNIPPET_CHARACTERS = 8000

# Limits of each strategy. Parsing text into words takes 6 microseconds for a chat message, and
# 0.1 s per MiB of long messages.
MAX_MESSAGES = 5000
MAX_BYTES = 2 * 1024 * 1024
# Includes sessions that are skipped because they have not changed since `created_from`.
MAX_SESSIONS = 50_000

# The time to read the index entries of a word grows with their number, and is wasted if they exceed
# the limits. So if the planner expects too many matches, the strategy by session is tried first.
# If it finds enough, the index is not read.
TOO_MANY_MATCHES = 2 * MAX_MESSAGES
ENOUGH_MATCHES = 100
# The planner's estimate may be wrong.
INDEX_TIMEOUT_MS = 1000

# The best plans differ by orders of magnitude between tenants and queries, so no generic plan is
# used. Parallel workers would return rows in no order. A bitmap that exceeds work_mem keeps only
# the pages of the matches, and then all rows of these pages are parsed into words.
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

ESTIMATE = f"EXPLAIN (FORMAT JSON) SELECT {MATCHES}"

CANDIDATES_BY_INDEX = f"""
    SELECT id, session_id, sequence, role, content, created_at, 0 AS position
    {MATCHES}
     LIMIT %(messages)s + 1
"""

# A message is not older than its session, nor newer than the session's last change. LEFT JOIN keeps
# empty sessions, so they count. LIMIT + 1 returns one session too many, which shows that the search
# is incomplete.
CANDIDATES_BY_SESSION = """
    SELECT m.*, s.position
      FROM (SELECT id, created_at, updated_at,
                   row_number() OVER (ORDER BY created_at DESC, id DESC) AS position
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
        OR s.position > %(sessions)s
     ORDER BY s.created_at DESC, s.id DESC, m.sequence DESC
     LIMIT %(messages)s + 1
"""

# If there is more text than MAX_BYTES, the newest messages are ranked.
RANKED = """
), allowed AS (
    SELECT *, coalesce(sum(octet_length(content)) OVER (
                           ORDER BY created_at DESC, id DESC
                           ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING), 0) AS bytes_before
      FROM candidates
     WHERE (%(session_id)s::uuid IS NULL OR session_id = %(session_id)s::uuid)
       AND (%(roles)s::text[] IS NULL OR role = ANY (%(roles)s::text[]))
       AND (%(created_from)s::timestamptz IS NULL OR created_at >= %(created_from)s::timestamptz)
       AND (%(created_to)s::timestamptz IS NULL OR created_at < %(created_to)s::timestamptz)
), matching AS (
    SELECT allowed.*, ts_rank(words, websearch_to_tsquery('english', %(query)s)) AS score
      FROM allowed
     CROSS JOIN LATERAL (SELECT to_tsvector('english', content) AS words OFFSET 0) AS parsed
     WHERE bytes_before < %(bytes)s AND words @@ websearch_to_tsquery('english', %(query)s)
), page AS (
    SELECT * FROM matching
     WHERE (score, created_at, id)
           < (%(after_score)s::real, %(after_time)s::timestamptz, %(after_id)s::uuid)
     ORDER BY score DESC, created_at DESC, id DESC
     LIMIT %(limit)s
)
SELECT coalesce((SELECT count(*) > %(messages)s OR max(position) > %(sessions)s
                   FROM candidates), false)
           OR EXISTS (SELECT FROM allowed WHERE bytes_before >= %(bytes)s),
       (SELECT count(*) FROM matching),
       page.id::text, page.session_id::text, page.sequence, page.role,
       (extract(epoch FROM page.created_at) * 1000000)::bigint, page.score,
       left(ts_headline('english', page.content, websearch_to_tsquery('english', %(query)s),
                        %(snippet_options)s), %(snippet_characters)s)
  FROM (SELECT) AS one_row LEFT JOIN page ON true
 ORDER BY page.score DESC, page.created_at DESC, page.id DESC
"""

SEARCH_BY_INDEX = f"WITH candidates AS MATERIALIZED ({CANDIDATES_BY_INDEX} {RANKED}"
SEARCH_BY_SESSION = f"WITH candidates AS MATERIALIZED ({CANDIDATES_BY_SESSION} {RANKED}"

# Parses a query, to find out whether it is at fault.
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
) -> SearchPage:
    """A page of matches, best first, after (score, time, id), with the markers around the words.

    Raises InvalidArgumentError if PostgreSQL cannot parse the query.
    """
    params = {
        "tenant_id": tenant_id,
        "query": query,
        "session_id": session_id,
        "roles": roles,
        "created_from": created_from,
        "created_to": created_to,
        "messages": MAX_MESSAGES,
        "bytes": MAX_BYTES,
        "sessions": MAX_SESSIONS,
        "after_score": after_score,
        "after_time": after_time,
        "after_id": after_id,
        "snippet_options": f"StartSel={start_marker}, StopSel={stop_marker}",
        "snippet_characters": SNIPPET_CHARACTERS,
        "limit": limit,
    }
    pages: list[SearchPage] = []
    try:
        [expected] = await db.fetch_all(ESTIMATE, params, lambda plan: plan[0]["Plan"]["Plan Rows"])
        is_common = expected > TOO_MANY_MATCHES
        # Most sessions are short enough to be read completely.
        by_session_first = is_common or session_id is not None
        for by_index in (not by_session_first, by_session_first):
            result = await _search(db, params, by_index=by_index)
            is_enough = is_common and not by_index and result.matches >= ENOUGH_MATCHES
            if is_enough or not result.incomplete:
                return result
            pages.append(result)
    except psycopg.errors.InternalError_:  # more than 32 nested operators, or an internal error
        try:
            await db.fetch_all(PARSE, params, str)
        except psycopg.errors.InternalError_ as error:
            violation = errors.Violation("query", "too many nested operators, at most 32")
            raise errors.InvalidArgumentError([violation]) from error
        raise
    hits = {hit.message_id: hit for result in pages for hit in result.hits}
    best_hits = sorted(hits.values(), key=_rank, reverse=True)
    matches = sum(result.matches for result in pages)
    return SearchPage(best_hits[:limit], matches, incomplete=True)


def _rank(hit: Hit) -> tuple[float, int, str]:
    return hit.score, hit.created_at, hit.message_id


async def _search(db: Database, params: Params, *, by_index: bool) -> SearchPage:
    async def body(transaction: Transaction) -> SearchPage:
        await transaction.execute(
            SETTINGS, {"timeout": str(INDEX_TIMEOUT_MS) if by_index else None}
        )
        rows = await transaction.fetch_all(
            SEARCH_BY_INDEX if by_index else SEARCH_BY_SESSION, params, lambda *row: row
        )
        incomplete, matches, *_ = rows[0]
        hits = [Hit(*hit) for _, _, *hit in rows if hit[0] is not None]
        return SearchPage(hits, matches, incomplete)

    try:
        return await db.transaction(body, idempotent=True)
    # The search by index has a timeout of its own, which is shorter than that of the connection.
    except (errors.DeadlineExceededError, errors.StatementCanceledError):
        if not by_index:
            raise
        return SearchPage([], 0, incomplete=True)
