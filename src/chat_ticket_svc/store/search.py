"""Full-text search over the messages of a tenant, with a bounded cost.

There are two strategies. Each reads and ranks a bounded amount, and reports whether it was
incomplete. By index: read the messages that match. If too many match, an arbitrary part of them is
ranked. By session: read the messages of the newest sessions. That finds many matches of a common
word and few of a rare one. If both are incomplete, the page has the best matches of both.

search_query.py makes the tsqueries, and search_hits.py the hits of the matches.
"""

import asyncio
from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import NamedTuple

from chat_ticket_svc import errors
from chat_ticket_svc.store import search_hits, search_query
from chat_ticket_svc.store.database import Database
from chat_ticket_svc.store.search_hits import WITH_UNSTEMMED, Hit, Match
from chat_ticket_svc.store.search_query import QueryBuilder, Term, Tsquery, Word, Words
from chat_ticket_svc.store.transaction import Params, Transaction


class SearchPage(NamedTuple):
    """The best matches in order, and whether there may be more.

    `ignored_words` are the parts of the query that the tenant's language does not search for.
    """

    hits: list[Hit]
    incomplete: bool
    ignored_words: list[str]


class _Matches(NamedTuple):
    """The best matches in order, the number of all, and whether there may be more."""

    best: list[Match]
    total: int
    incomplete: bool


# Limits of each strategy. Parsing text into words takes 6 microseconds for a chat message, and
# 0.1 s per MiB of long messages. A character that is not ASCII takes several times as long, and
# counts as 5, 9 or 13 bytes.
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


def _words(tsvector: str) -> str:
    """The words of a tsvector as JSON, in the order of their positions."""
    return f"""
        (SELECT json_agg(json_build_array(position, lexeme) ORDER BY position)
           FROM unnest({tsvector}), unnest(positions) AS position)
    """


# The words of each term, for all languages that find the same in it, and the tenant's language.
TERM_WORDS = f"""
SELECT coalesce((SELECT search_language FROM tenant_settings WHERE tenant_id = %(tenant_id)s),
                %(search_language)s::text),
       ordinal, array_agg(language), {_words("stemmed")}, {_words("unstemmed")},
       tsvector_to_array(candidates)
  FROM (SELECT term.ordinal, language.cfgname::text AS language,
               search_vector(term.text, language.cfgname) AS stemmed,
               CASE WHEN term.is_prefix
                   THEN to_tsvector('simple', search_text(term.text, language.cfgname))
               END AS unstemmed,
               CASE WHEN term.is_prefix
                   THEN search_vector(term.stem_candidates, language.cfgname)
               END AS candidates
          FROM unnest(%(texts)s::text[], %(prefixes)s::boolean[], %(stem_candidates)s::text[])
                   WITH ORDINALITY AS term (text, is_prefix, stem_candidates, ordinal)
         CROSS JOIN pg_ts_config AS language
         WHERE language.cfgnamespace = 'pg_catalog'::regnamespace) AS each
 GROUP BY ordinal, stemmed, unstemmed, candidates
 ORDER BY ordinal
"""

# PostgreSQL keeps 255 positions of a word, and none after 16,383. A phrase with others is not found
# by the positions of its words. So many words need more than 500 bytes.
KNOWS_ALL_POSITIONS = """
(octet_length(content) <= 500
 OR NOT EXISTS (SELECT FROM unnest({words})
                 WHERE cardinality(positions) >= 255
                    OR positions[cardinality(positions)] >= 16383))
"""

ESTIMATE = """
EXPLAIN (FORMAT JSON)
SELECT FROM chat_messages
 WHERE tenant_id = %(tenant_id)s
   AND search_vector(content, search_language) @@ %(any_query)s::tsquery
"""

CANDIDATES_BY_INDEX = f"""
    SELECT id, session_id, sequence, role, content, search_language, created_at, redacted,
           0 AS position
      FROM chat_messages
     WHERE tenant_id = %(tenant_id)s AND NOT redacted
       AND search_vector(content, search_language) @@ %(any_query)s::tsquery
       AND (%(any_placed)s::tsquery IS NULL
            OR search_vector(content, search_language) @@ %(any_placed)s::tsquery
            OR NOT {KNOWS_ALL_POSITIONS.format(words="search_vector(content, search_language)")})
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
           SELECT id, session_id, sequence, role, content, search_language, created_at, redacted
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
RANKED = f"""
), allowed AS (
    SELECT *, coalesce(sum(4 * octet_length(content) - 3 * char_length(content)) OVER (
                           ORDER BY created_at DESC, id DESC
                           ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING), 0) AS bytes_before
      FROM candidates
     WHERE NOT redacted
       AND (%(session_id)s::uuid IS NULL OR session_id = %(session_id)s::uuid)
       AND (%(roles)s::text[] IS NULL OR role = ANY (%(roles)s::text[]))
       AND (%(created_from)s::timestamptz IS NULL OR created_at >= %(created_from)s::timestamptz)
       AND (%(created_to)s::timestamptz IS NULL OR created_at < %(created_to)s::timestamptz)
), asked AS (
    SELECT *
      FROM unnest(%(languages)s::text[], %(indexed_queries)s::text[]::tsquery[],
                  %(exact_queries)s::text[]::tsquery[], %(scattered_queries)s::text[]::tsquery[])
               AS asked (language, indexed, exact, scattered)
), matching AS (
    SELECT allowed.*, ts_rank(words, query) AS score
      FROM allowed
      JOIN asked ON asked.language = allowed.search_language
     CROSS JOIN LATERAL (
           SELECT search_vector(content, search_language) AS stems OFFSET 0) AS stemmed
     CROSS JOIN LATERAL (
           SELECT CASE WHEN %(has_prefix)s
                      THEN {WITH_UNSTEMMED.format(stems="stems", text="content")}
                      ELSE stems
                  END AS words OFFSET 0) AS also_unstemmed
     CROSS JOIN LATERAL (
           SELECT CASE WHEN NOT %(has_phrase)s OR {KNOWS_ALL_POSITIONS.format(words="words")}
                      THEN exact
                      ELSE scattered
                  END AS query OFFSET 0) AS query
     WHERE bytes_before < %(bytes)s
       AND (indexed IS NULL OR stems @@ indexed)
       AND words @@ query
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
       page.search_language, page.content
  FROM (SELECT) AS one_row LEFT JOIN page ON true
 ORDER BY page.score DESC, page.created_at DESC, page.id DESC
"""

SEARCH_BY_INDEX = f"WITH candidates AS MATERIALIZED ({CANDIDATES_BY_INDEX} {RANKED}"
SEARCH_BY_SESSION = f"WITH candidates AS MATERIALIZED ({CANDIDATES_BY_SESSION} {RANKED}"


async def page(
    db: Database,
    tenant_id: str,
    query: str,
    *,
    search_language: str,
    session_id: str | None,
    roles: list[str] | None,
    created_from: datetime | None,
    created_to: datetime | None,
    after_score: float,
    after_time: datetime,
    after_id: str,
    limit: int,
) -> SearchPage:
    """A page of matches, best first, after (score, time, id).

    `search_language` is that of a tenant without a setting.
    """
    alternatives = search_query.parse(query)
    words, ignored = await _term_words(db, tenant_id, search_language, alternatives)
    ignored_words = list(dict.fromkeys(term.source for term in ignored))
    asked = [[term for term in terms if term not in ignored] for terms in alternatives]
    # For a long query that takes a while, and other calls must not wait.
    queries = await asyncio.to_thread(_build_queries, builder := QueryBuilder(asked), words)
    if not queries:
        return SearchPage([], incomplete=False, ignored_words=ignored_words)
    each = list(queries.values())
    has_phrase = any(query.exact != query.scattered for query in each)
    any_placed = search_query.any_of(query.placed for query in each)
    params = {
        "tenant_id": tenant_id,
        "any_query": search_query.any_of(query.indexed for query in each),
        "any_placed": any_placed if has_phrase and any_placed else None,
        "languages": list(queries),
        "indexed_queries": [query.indexed or None for query in each],
        "exact_queries": [query.exact for query in each],
        "scattered_queries": [query.scattered for query in each],
        "has_phrase": has_phrase,
        "has_prefix": builder.has_prefix,
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
        "limit": limit,
    }
    matches = await _matches(db, params)
    hits = await search_hits.hits(db, matches.best, queries, has_prefix=builder.has_prefix)
    return SearchPage(hits, matches.incomplete, ignored_words)


async def _term_words(
    db: Database, tenant_id: str, search_language: str, alternatives: Sequence[Sequence[Term]]
) -> tuple[dict[str, dict[Term, Words]], list[Term]]:
    """The words of each term by language, and the terms that the tenant's language ignores."""
    terms = list(dict.fromkeys(term for terms in alternatives for term in terms))
    params = {
        "tenant_id": tenant_id,
        "search_language": search_language,
        "texts": [term.text for term in terms],
        "prefixes": [term.is_prefix for term in terms],
        "stem_candidates": [term.stem_candidates for term in terms],
    }
    result: dict[str, dict[Term, Words]] = defaultdict(dict)
    ignored: list[Term] = []
    for tenant_language, ordinal, languages, *found in await db.fetch_all(
        TERM_WORDS, params, lambda *row: row
    ):
        stemmed, unstemmed, candidates = (each or () for each in found)
        term = terms[ordinal - 1]
        words = Words(
            tuple(Word(*each) for each in stemmed),
            tuple(Word(*each) for each in unstemmed),
            tuple(candidates),
        )
        for language in languages:
            result[language][term] = words
        if tenant_language in languages and not words.stemmed and not words.unstemmed:
            ignored.append(term)
    return result, ignored


def _build_queries(
    builder: QueryBuilder, words: Mapping[str, Mapping[Term, Words]]
) -> dict[str, Tsquery]:
    """The query of each language that asks for something. Most languages share theirs."""
    built: dict[tuple[int, ...], Tsquery | None] = {}
    result = {}
    for language, of_terms in words.items():
        key = tuple(map(id, of_terms.values()))
        if key not in built:
            built[key] = builder.build(of_terms)
        if (query := built[key]) is not None:
            result[language] = query
    return result


async def _matches(db: Database, params: Params) -> _Matches:
    """The best matches that the strategies find."""
    # Most sessions are short enough to be read completely.
    strategies = [False, True]
    is_common = False
    if not params["any_query"]:
        strategies = [False]
    elif params["session_id"] is None:
        [expected] = await db.fetch_all(ESTIMATE, params, lambda plan: plan[0]["Plan"]["Plan Rows"])
        is_common = expected > TOO_MANY_MATCHES
        if not is_common:
            strategies = [True, False]
    found: list[_Matches] = []
    for by_index in strategies:
        result = await _search(db, params, by_index=by_index)
        is_enough = is_common and not by_index and result.total >= ENOUGH_MATCHES
        if is_enough or not result.incomplete:
            return result
        found.append(result)
    matches = {match.message_id: match for result in found for match in result.best}
    best = sorted(matches.values(), key=lambda match: match.rank, reverse=True)
    total = sum(result.total for result in found)
    return _Matches(best[: params["limit"]], total, incomplete=True)


async def _search(db: Database, params: Params, *, by_index: bool) -> _Matches:
    async def body(transaction: Transaction) -> _Matches:
        await transaction.execute(
            SETTINGS, {"timeout": str(INDEX_TIMEOUT_MS) if by_index else None}
        )
        rows = await transaction.fetch_all(
            SEARCH_BY_INDEX if by_index else SEARCH_BY_SESSION, params, lambda *row: row
        )
        incomplete, total, *_ = rows[0]
        best = [Match(*match) for _, _, *match in rows if match[0] is not None]
        return _Matches(best, total, incomplete)

    try:
        return await db.transaction(body, idempotent=True)
    # The search by index has a timeout of its own, which is shorter than that of the connection.
    except (errors.DeadlineExceededError, errors.StatementCanceledError):
        if not by_index:
            raise
        return _Matches([], 0, incomplete=True)
