"""What followers of drafts read: what is new in the open drafts of many sessions.

One statement reads all of it, so it is one snapshot: the drafts of a session, and the revision that
the session has beside them.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from chat_ticket_svc.store.append import array_literal
from chat_ticket_svc.store.columns import microseconds
from chat_ticket_svc.store.database import PIPELINED_MAX_BYTES, Database
from chat_ticket_svc.store.drafts import Draft

# A large read has so many bytes of new text and metadata, or one session whatever its size.
LARGE_READ_BYTES = 4 * 1024 * 1024

# A draft is known if it has the fencing token that the follower names: who takes a draft over may
# go on from less, after a failover. Of a known draft, the text after the length that the follower
# has is read, of others everything. `total` is the size of what is read up to a draft. Text beyond
# `bytes` is not read.
#
# The arrays are selected so that the planner does not see their length. If it does, it plans the
# statement for every execution. OFFSET 0 keeps the look-ups by index: the planner knows nothing of
# the numbers of drafts, which change all the time.
NEW_TEXT = f"""
WITH followed AS MATERIALIZED (
    SELECT *
      FROM unnest((SELECT %(tenant_ids)s::text[]), (SELECT %(session_ids)s::uuid[]))
               WITH ORDINALITY AS followed (tenant_id, session_id, ordinal)
), known AS MATERIALIZED (
    SELECT *
      FROM unnest((SELECT %(ordinals)s::bigint[]), (SELECT %(draft_ids)s::uuid[]),
                  (SELECT %(fencing_tokens)s::bigint[]), (SELECT %(lengths)s::bigint[]))
               AS known (ordinal, draft_id, fencing_token, length)
), draft AS MATERIALIZED (
    SELECT followed.ordinal, d.*, known.length AS known_length,
           sum(CASE WHEN known.length IS NULL
                    THEN d.length + coalesce(octet_length(d.metadata::text), 0)
                    ELSE d.length - known.length END)
               OVER (ORDER BY followed.ordinal, d.created_at, d.id ROWS UNBOUNDED PRECEDING)
               AS total
      FROM followed
     CROSS JOIN LATERAL (
         SELECT * FROM chat_drafts d
          WHERE d.tenant_id = followed.tenant_id AND d.session_id = followed.session_id
         OFFSET 0) AS d
      LEFT JOIN known ON known.ordinal = followed.ordinal AND known.draft_id = d.id
                     AND known.fencing_token = d.fencing_token
)
SELECT followed.ordinal,
       (SELECT s.revision FROM chat_sessions s
         WHERE s.tenant_id = followed.tenant_id AND s.id = followed.session_id),
       draft.id::text, draft.role,
       CASE WHEN draft.length = draft.known_length THEN ''
            WHEN draft.total <= %(bytes)s OR (%(is_large)s AND followed.ordinal = 1)
            THEN (SELECT coalesce(string_agg(p.content, '' ORDER BY p.start_offset), '')
                    FROM chat_draft_pieces p
                   WHERE p.tenant_id = draft.tenant_id AND p.draft_id = draft.id
                     AND p.start_offset >= coalesce(draft.known_length, 0)) END,
       draft.length,
       CASE WHEN draft.known_length IS NULL
                 AND (draft.total <= %(bytes)s OR (%(is_large)s AND followed.ordinal = 1))
            THEN draft.metadata::text END,
       draft.language_code,
       {microseconds("draft.created_at")}, {microseconds("draft.expires_at")},
       draft.author_kind, draft.author_id, draft.fencing_token, draft.known_length
  FROM followed
  LEFT JOIN draft ON draft.ordinal = followed.ordinal
 ORDER BY followed.ordinal, draft.created_at, draft.id
"""


class KnownDraft(NamedTuple):
    """What a follower has of a draft."""

    fencing_token: int
    length: int


class FollowedSession(NamedTuple):
    """A session whose drafts are followed, and those that the follower has, by their ids."""

    tenant_id: str
    session_id: str
    known: Mapping[str, KnownDraft]


class NewText(NamedTuple):
    """What is new in an open draft.

    `draft.content` is its text from `known_length` on. If this is None, it is the whole of a draft
    that is not known; otherwise `draft.metadata` was not read.
    """

    draft: Draft
    fencing_token: int
    known_length: int | None


class OpenDrafts(NamedTuple):
    """The open drafts of a session, oldest first, and its revision: None if it does not exist."""

    revision: int | None
    drafts: Sequence[NewText]


async def read(
    db: Database, followed: Sequence[FollowedSession], *, is_large: bool
) -> list[OpenDrafts | None]:
    """Read what is new in the open drafts of some sessions, in the same order.

    None stands for a session with more text than fits into the read. A large read has at least the
    first session.
    """
    known = [
        (ordinal, draft_id, *draft)
        for ordinal, session in enumerate(followed, 1)
        for draft_id, draft in session.known.items()
    ]
    params = {
        "tenant_ids": array_literal(session.tenant_id for session in followed),
        "session_ids": array_literal(session.session_id for session in followed),
        "ordinals": array_literal(ordinal for ordinal, _, _, _ in known),
        "draft_ids": array_literal(draft_id for _, draft_id, _, _ in known),
        "fencing_tokens": array_literal(token for _, _, token, _ in known),
        "lengths": array_literal(length for _, _, _, length in known),
        "bytes": LARGE_READ_BYTES if is_large else PIPELINED_MAX_BYTES,
        "is_large": "true" if is_large else "false",
    }
    if is_large:
        rows = await db.fetch_all(NEW_TEXT, params, lambda *row: row)
    else:
        rows = await db.fetch_pipelined(NEW_TEXT, params)
    found: list[OpenDrafts | None] = [OpenDrafts(None, [])] * len(followed)
    texts: dict[int, list[NewText]] = {}
    for ordinal, revision, draft_id, role, content, *columns, token, known_length in rows:
        session = followed[ordinal - 1]
        if draft_id is None:
            found[ordinal - 1] = OpenDrafts(revision, [])
            continue
        if ordinal not in texts:
            texts[ordinal] = []
            found[ordinal - 1] = OpenDrafts(revision, texts[ordinal])
        if content is None:
            found[ordinal - 1] = None
        draft = Draft(draft_id, session.session_id, role, content or "", *columns)
        texts[ordinal].append(NewText(draft, token, known_length))
    return found
