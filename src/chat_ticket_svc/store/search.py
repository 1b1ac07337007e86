"""Full-text search over the messages of a tenant."""

from datetime import datetime
from typing import NamedTuple

import psycopg

from chat_ticket_svc import errors
from chat_ticket_svc.store.database import Database


class Hit(NamedTuple):
    """A message that a search found; `headline` has the hits between the caller's markers."""

    message_id: str
    session_id: str
    sequence: int
    role: str
    created_at: int
    score: float
    headline: str


# A search result shows a part of a message; one endless word must not make it a whole one.
HEADLINE_CHARACTERS = 8000

SEARCH = """
SELECT id::text, session_id::text, sequence, role,
       (extract(epoch FROM created_at) * 1000000)::bigint, score,
       left(ts_headline('english', content, websearch_to_tsquery('english', %(query)s),
                        %(headline)s), %(characters)s)
  FROM (SELECT *
          FROM (SELECT m.*, ts_rank(to_tsvector('english', m.content),
                                    websearch_to_tsquery('english', %(query)s)) AS score
                  FROM chat_messages m
                 WHERE m.tenant_id = %(tenant_id)s
                   AND to_tsvector('english', m.content)
                       @@ websearch_to_tsquery('english', %(query)s)
                   AND (%(session_id)s::uuid IS NULL OR m.session_id = %(session_id)s::uuid)
                   AND (%(roles)s::text[] IS NULL OR m.role = ANY (%(roles)s::text[]))
                   AND (%(created_from)s::timestamptz IS NULL
                        OR m.created_at >= %(created_from)s::timestamptz)
                   AND (%(created_to)s::timestamptz IS NULL
                        OR m.created_at < %(created_to)s::timestamptz)) AS matching
         WHERE (score, created_at, id)
               < (%(after_score)s::real, %(after_time)s::timestamptz, %(after_id)s::uuid)
         ORDER BY score DESC, created_at DESC, id DESC
         LIMIT %(limit)s) AS page
 ORDER BY score DESC, created_at DESC, id DESC
"""


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
) -> list[Hit]:
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
        "after_score": after_score,
        "after_time": after_time,
        "after_id": after_id,
        "headline": f"StartSel={start_marker}, StopSel={stop_marker}",
        "characters": HEADLINE_CHARACTERS,
        "limit": limit,
    }
    try:
        return await db.rows(SEARCH, params, Hit)
    except psycopg.errors.InternalError_:  # more than 32 operators in one another, or a fault
        try:
            await db.rows(PARSE, params, str)
        except psycopg.errors.InternalError_ as error:
            violation = errors.Violation("query", "has too many operators, such as -, in a row")
            raise errors.InvalidArgumentError([violation]) from error
        raise
