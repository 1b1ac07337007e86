"""WatchChatSession tells its callers when the title or the labels of a session change."""

from typing import Any

import psycopg
import pytest
from support.client import Api
from support.messages import create_batch, user_message
from support.sessions import RESOLVED, get_session, set_status, update_session
from support.watching import watching

from chat_ticket_svc.store import message_listing, messages, session_changes

LABELS = {"plan": "gold", "region": "eu"}


@pytest.mark.parametrize("include_drafts", [False, True])
async def test_session_comes_again_when_title_or_labels_change(
    api: Api, include_drafts: bool
) -> None:
    """Also when they are removed. Its position is the revision of the change."""
    session = await api.session(user_id="ann", title="old", labels=LABELS)
    async with watching(api, session.id, include_drafts=include_drafts) as watcher:
        await watcher.until("caught_up")
        assert watcher.session == session
        for paths, fields in (
            (["title"], {"title": "new"}),
            (["labels.plan"], {"labels": {"plan": "free"}}),
            (["labels.region"], {}),
            (["labels"], {}),
            (["title"], {}),
        ):
            changed = await update_session(api, session.id, *paths, **fields)
            event = await watcher.next()
            assert (event.WhichOneof("event"), event.revision) == ("session", changed.revision)
            assert watcher.session == changed == await get_session(api, session.id)


async def test_session_does_not_come_again_when_neither_changes(api: Api) -> None:
    """A message, or an update that changes nothing, is no reason."""
    session = await api.session(title="t", labels=LABELS)
    async with watching(api, session.id) as watcher:
        await watcher.until("caught_up")
        await update_session(api, session.id, "title", "labels", title="t", labels=LABELS)
        await api.message(session.id)
        assert (await watcher.next()).WhichOneof("event") == "messages_created"
        await set_status(api, session.id, RESOLVED)
        assert (await watcher.next()).session.labels == LABELS


async def test_resumed_stream_begins_with_the_session_as_it_is(api: Api) -> None:
    """Whatever was missed."""
    session = await api.session(labels=LABELS)
    await api.message(session.id)
    changed = await update_session(api, session.id, "labels.new", labels={"new": "1"})
    async with watching(api, session.id, 1) as watcher:
        event = await watcher.next()
        assert (event.revision, event.session) == (1, changed)


@pytest.mark.parametrize(
    ("statement", "rows", "params"),
    [
        (session_changes.PAGE, (1, 1, 51), {"after": 0, "bytes": messages.PAGE_BYTES}),
        *(
            (first, (1, 2, 52), {"after": 0, "before": 2**62, "roles": None, "message_bytes": 2048})
            for first in (message_listing.FIRST_ASC, message_listing.FIRST_DESC)
        ),
    ],
    ids=["changes", "list", "list backwards"],
)
async def test_pages_have_the_labels_once(
    api: Api, database: str, statement: Any, rows: tuple[int, ...], params: dict[str, Any]
) -> None:
    """The session is in the first row, and not in the others: its labels may have 10 kB."""
    session = await api.session(labels={f"key-{n}": "v" * 255 for n in range(32)})
    with psycopg.connect(database) as connection:
        for count, row_count in zip((0, 1, 50), rows, strict=True):
            if count:
                await create_batch(api, session.id, [user_message("x")] * count)
            cursor = connection.execute(
                statement,
                {**params, "tenant_id": api.tenant, "session_id": session.id, "limit": 500},
            )
            sizes = [len(str(row)) for row in cursor]
            assert sizes[0] > 32 * 255
            assert all(size < 1000 for size in sizes[1:])
            assert len(sizes) == row_count
