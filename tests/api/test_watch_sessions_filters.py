"""WatchChatSessions with filters: what is told, and which sessions have left."""

import itertools
from typing import Any

import pytest
from support.client import Api
from support.database import execute
from support.feeds import caught_up_feed, following_feed
from support.sessions import (
    ACTIVE,
    ARCHIVED,
    RESOLVED,
    delete_session,
    set_status,
    update_session,
)
from support.tickets import create_ticket, delete_ticket, unlink

pytestmark = pytest.mark.usefixtures("feed_turn")

STATUSES = (ACTIVE, RESOLVED, ARCHIVED)
GOLD = {"plan": "gold", "region": "eu"}


async def test_only_sessions_that_match_are_told(api: Api, other: Api) -> None:
    """All filters must match, from the beginning and later."""
    filters: dict[str, Any] = {
        "statuses": [ACTIVE, RESOLVED],
        "has_ticket": True,
        "user_id": "ann",
        "labels": GOLD,
    }
    fields: dict[str, Any] = {"user_id": "ann", "labels": {**GOLD, "more": ""}}
    others: list[dict[str, Any]] = [
        {"user_id": "Ann"},
        {"labels": {"plan": "gold"}},
        {"labels": {**GOLD, "plan": "golden"}},
    ]

    async def make() -> str:
        """Sessions of which one matches. Returns its id."""
        for each in others:
            await api.escalate((await api.session(**each)).id)
        await api.session(**fields)  # without a ticket
        await other.session(**fields)
        matching = await api.session(**fields)
        await api.escalate(matching.id)
        return matching.id

    first = await make()
    async with caught_up_feed(api, from_beginning=True, **filters) as feed:
        assert {*feed.sessions} == {first}
        second = await make()
        told = await feed.settle(api)
        assert {*feed.sessions} == {first, second}
        assert {kind for kind, _ in told} == {"session", "ticket", "caught_up"}


async def test_tickets_and_deletions_are_told_whatever_the_filters_are(api: Api) -> None:
    """A ticket has none of these fields, and a deleted session no fields at all."""
    async with caught_up_feed(api, user_id="ann") as feed:
        ticket = await create_ticket(api)
        await delete_ticket(api, ticket.id)
        session = await api.session(user_id="bob")
        await delete_session(api, session.id)
        assert {*await feed.settle(api)} >= {
            ("ticket_deleted", ticket.id),
            ("session_deleted", session.id),
        }


async def test_session_that_leaves_is_named_once(api: Api) -> None:
    """By its status, its ticket or its labels. Then nothing of it, until it comes back."""
    session = await api.session(labels=GOLD)
    for filters, leave, come_back in (
        (
            {"statuses": [ACTIVE]},
            lambda: set_status(api, session.id, RESOLVED),
            lambda: set_status(api, session.id, ACTIVE),
        ),
        (
            {"labels": {"plan": "gold"}},
            lambda: update_session(api, session.id, "labels.plan"),
            lambda: update_session(api, session.id, "labels", labels=GOLD),
        ),
        (
            {"has_ticket": False},
            lambda: api.escalate(session.id),
            None,
        ),
    ):
        async with caught_up_feed(api, from_beginning=True, **filters) as feed:  # type: ignore[arg-type]
            assert [*feed.sessions] == [session.id]
            await feed.settle(api)
            link = await leave()
            left = [each for each in await feed.settle(api) if each[1] == session.id]
            assert left == [("left", session.id)], filters
            await api.message(session.id)
            await update_session(api, session.id, "title", title=str(filters))
            assert await feed.settle(api) == [], filters
            await (come_back() if come_back else unlink(api, link.id))
            back = [each for each in await feed.settle(api) if each[1] == session.id]
            assert back == [("session", session.id)], filters


async def test_session_that_never_matched_is_not_named(api: Api) -> None:
    """Neither when it is created, nor when it changes, nor when a filter that it fails changes."""
    async with caught_up_feed(api, statuses=[ACTIVE], user_id="ann", labels=GOLD) as feed:
        for fields in (
            {"status": ARCHIVED, "user_id": "ann", "labels": GOLD},
            {"user_id": "bob", "labels": GOLD},
            {"user_id": "ann"},
        ):
            session = await api.session(**fields)
            await feed.settle(api)
            await api.message(session.id)
            assert await feed.settle(api) == []
            for status in (RESOLVED, ARCHIVED):
                await set_status(api, session.id, status)
                assert await feed.settle(api) == [], fields


async def test_follower_that_was_away_learns_which_sessions_have_left(
    api: Api, database: str
) -> None:
    """Whatever happened meanwhile: each combination of a status and up to two changes of it.

    A session that matched at the cursor and does not match now has left, and it is told once. One
    that does not match and never did may be named only if its last two changes are unknown.
    """
    histories = {
        statuses: (await api.session(status=statuses[0], labels=GOLD)).id
        for count in (1, 2, 3)
        for statuses in itertools.product(STATUSES, repeat=count)
    }
    filters: dict[str, Any] = {"statuses": [ACTIVE, RESOLVED], "labels": GOLD}
    async with caught_up_feed(api, from_beginning=True, **filters) as feed:
        await feed.settle(api)
    for statuses, session_id in histories.items():
        for status in statuses[1:]:
            await set_status(api, session_id, status)
        await api.message(session_id)
    async with caught_up_feed(api, feed.cursor, **filters) as resumed:
        told = resumed.told[:-1]
    for statuses, session_id in histories.items():
        first, last = statuses[0], statuses[-1]
        kinds = [kind for kind, of in told if of == session_id]
        if last != ARCHIVED:
            assert kinds == ["session"], statuses
        elif first != ARCHIVED:
            assert kinds == ["left"], statuses
    for statuses in ((ARCHIVED,), (ARCHIVED, ARCHIVED), (ARCHIVED,) * 3):
        assert histories[statuses] not in {of for _, of in told}, "it never matched"


@pytest.mark.parametrize("together", [True, False])
async def test_two_filters_change_while_the_follower_is_away(
    api: Api, database: str, together: bool
) -> None:
    """In one transaction or in two, the session has left."""
    session = await api.session(labels=GOLD)
    never = await api.session(status=RESOLVED)
    filters: dict[str, Any] = {"statuses": [ACTIVE], "labels": GOLD}
    async with caught_up_feed(api, from_beginning=True, **filters) as feed:
        await feed.settle(api)
    ids = f"id IN ('{session.id}', '{never.id}')"
    changes = [
        f"UPDATE chat_sessions SET status = 'archived', revision = revision + 1 WHERE {ids}",
        f"UPDATE chat_sessions SET labels = NULL, revision = revision + 1 WHERE {ids}",
    ]
    execute(database, *(["; ".join(changes)] if together else changes))
    async with caught_up_feed(api, feed.cursor, **filters) as feed:
        assert ("left", session.id) in feed.told
        assert ("left", never.id) not in feed.told


async def test_session_that_leaves_and_is_deleted(api: Api) -> None:
    """It is named as deleted."""
    session = await api.session()
    async with caught_up_feed(api, from_beginning=True, statuses=[ACTIVE]) as feed:
        await feed.settle(api)
    await set_status(api, session.id, RESOLVED)
    await delete_session(api, session.id)
    async with caught_up_feed(api, feed.cursor, statuses=[ACTIVE]) as feed:
        assert feed.told == [("session_deleted", session.id), ("caught_up", "")]


async def test_from_the_beginning_nothing_has_left(api: Api) -> None:
    """The follower knows of no session, so none can leave, unless it was told before."""
    session = await api.session()
    await set_status(api, session.id, RESOLVED)
    async with following_feed(api, from_beginning=True, statuses=[ACTIVE]) as feed:
        await feed.until("caught_up")
        assert feed.told == [("caught_up", "")]
