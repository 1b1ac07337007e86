"""The epoch of a position in ListChatMessages."""

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from grpc import StatusCode
from support.client import Api, refused
from support.messages import (
    batches,
    create_batch,
    read_rest,
    sequences,
    session_with_messages,
    user_message,
)
from support.restores import begin_epoch, restore
from support.sessions import get_session

from chat_ticket.v1 import resources_pb2 as r
from chat_ticket.v1.chat_message_pb2 import CHAT_MESSAGE_ORDER_DESC, ListChatMessagesRequest
from chat_ticket_svc.store import message_listing

DESC = {"order": CHAT_MESSAGE_ORDER_DESC}


async def two_histories(api: Api, database: str) -> tuple[r.ChatSession, r.ChatSession]:
    """A session that was restored at revision 3, when it was at 5, and its epoch before that.

    Its messages 4 to 6 are of the new history.
    """
    session_id = await session_with_messages(api, 3)
    backup = await get_session(api, session_id)
    for _ in range(2):
        await api.message(session_id)
    restore(database, backup)
    for _ in range(3):
        await api.message(session_id)
    return backup, await get_session(api, session_id)


async def test_position_that_is_still_true(api: Api, database: str) -> None:
    """The list goes on, in both orders, with the epoch of then or of now."""
    old, current = await two_histories(api, database)
    for session in (old, current):
        position = {"epoch": session.epoch}
        assert await sequences(api, old.id, after_sequence=3, **position) == [4, 5, 6]
        assert await sequences(api, old.id, before_sequence=3, **position, **DESC) == [2, 1]
    position = {"epoch": current.epoch}
    assert await sequences(api, old.id, after_sequence=5, **position) == [6]
    assert await sequences(api, old.id, before_sequence=5, **position, **DESC) == [4, 3, 2, 1]


async def test_position_that_was_lost(api: Api, database: str) -> None:
    """It is refused, also where another message has taken it."""
    old, current = await two_histories(api, database)
    for position in (
        {"after_sequence": 5},
        {"after_sequence": 4},
        {"after_sequence": 99},
        {"before_sequence": 5, **DESC},
        {"before_sequence": 4, **DESC},
    ):
        with refused(StatusCode.OUT_OF_RANGE, "HISTORY_CHANGED") as refusal:
            await batches(api, old.id, epoch=old.epoch, **position)
        assert refusal.info.metadata == {"revision": "3", "epoch": current.epoch}


async def test_only_where_the_list_goes_on_is_checked(api: Api, database: str) -> None:
    """Not the other end of a list, nor one that begins, nor one without an epoch."""
    old, _ = await two_histories(api, database)
    everything = [1, 2, 3, 4, 5, 6]
    epoch = {"epoch": old.epoch}
    assert await sequences(api, old.id, **epoch) == everything
    assert await sequences(api, old.id, **epoch, **DESC) == everything[::-1]
    assert await sequences(api, old.id, after_sequence=1, before_sequence=6, **epoch) == [
        2,
        3,
        4,
        5,
    ]
    descending = {"after_sequence": 4, "before_sequence": 3, **DESC}
    assert await sequences(api, old.id, **descending, **epoch) == []
    assert await sequences(api, old.id, after_sequence=5) == [6]
    assert await sequences(api, old.id, after_sequence=99) == []


async def test_new_epoch_that_lost_nothing(
    api: Api, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The list goes on through it."""
    session_id = await session_with_messages(api, 40)

    async def change() -> None:
        begin_epoch(database)
        await api.message(session_id)

    before_second_page(monkeypatch, change)
    assert await sequences(api, session_id) == list(range(1, 41))


@pytest.mark.parametrize(
    ("order", "shared"), [({}, 20), (DESC, 5)], ids=["ascending", "descending"]
)
async def test_history_that_changes_during_a_list(
    api: Api,
    database: str,
    monkeypatch: pytest.MonkeyPatch,
    order: dict[str, Any],
    shared: int,
) -> None:
    """The list ends, although the session has as many messages again."""
    session_id = await session_with_messages(api, shared)
    backup = await get_session(api, session_id)
    await create_batch(api, session_id, [user_message("lost")] * (40 - shared))

    async def change() -> None:
        restore(database, backup)
        await create_batch(api, session_id, [user_message("new")] * (40 - shared))

    before_second_page(monkeypatch, change)
    call = api.messages.ListChatMessages(ListChatMessagesRequest(session_id=session_id, **order))
    assert len((await call.read()).messages) == 32
    with refused(StatusCode.OUT_OF_RANGE, "HISTORY_CHANGED") as refusal:
        await read_rest(call)
    current = await get_session(api, session_id)
    assert refusal.info.metadata == {"revision": str(shared), "epoch": current.epoch}


async def test_text_that_is_no_epoch(api: Api) -> None:
    """INVALID_ARGUMENT that names it."""
    session = await api.session()
    for epoch in ("x", "0." + "A" * 16, "0" * 9000):
        with refused(StatusCode.INVALID_ARGUMENT) as refusal:
            await batches(api, session.id, epoch=epoch)
        assert set(refusal.fields) == {"epoch"}


def before_second_page(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[], Awaitable[None]]
) -> None:
    """Await `change` between the reads of the first two pages of the next list."""
    read, pages = message_listing.page, 0

    async def page(*arguments: Any, **options: Any) -> message_listing.MessagePage:
        nonlocal pages
        pages += 1
        if pages == 2:
            await change()
        return await read(*arguments, **options)

    monkeypatch.setattr(message_listing, "page", page)
