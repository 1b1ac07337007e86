"""Writes that name the revision which the session, or the message, must have."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from grpc import StatusCode
from support.client import Api, a_file, an_id, refused
from support.database import session_locked, wait_for_lock_waiters
from support.drafts import writing
from support.messages import (
    create_batch,
    delete_message,
    get_message,
    merge_metadata,
    sequences,
    set_metadata,
    user_message,
)
from support.sessions import ARCHIVED, RESOLVED, get_revision, set_status
from support.tickets import get_ticket, unlink

from chat_ticket.v1 import resources_pb2 as r
from chat_ticket.v1.chat_session_pb2 import DeleteChatSessionRequest

Write = Callable[[int | None], Awaitable[Any]]

WRITES = ["create", "large", "attached", "batch", "link", "escalate", "set", "merge", "delete"]


async def write_to(api: Api, session_id: str, name: str) -> Write:
    """A call that changes the session, with ids of its own, for any expected revision."""
    message = await api.message(session_id, metadata_json='{"a": 1}')
    ticket_id = ""
    if name == "link":
        other = await api.session()
        ticket_id = (await api.escalate(other.id)).ticket_id
    one, two = an_id(), an_id()
    writes: dict[str, Write] = {
        "create": lambda expected: api.message(session_id, id=one, expected_revision=expected),
        "large": lambda expected: api.message(
            session_id, "x" * 10_000, id=one, expected_revision=expected
        ),
        "attached": lambda expected: api.message(
            session_id, id=one, attachments=[a_file(id=two)], expected_revision=expected
        ),
        "batch": lambda expected: create_batch(
            api,
            session_id,
            [user_message("x", id=one), user_message("y", id=two)],
            expected_revision=expected,
        ),
        "link": lambda expected: api.escalate(
            session_id, chat_ticket_id=one, ticket_id=ticket_id, expected_revision=expected
        ),
        "escalate": lambda expected: api.escalate(
            session_id, ticket=r.Ticket(id=one, title="help"), expected_revision=expected
        ),
        "set": lambda expected: set_metadata(
            api, message.id, '{"b": 2}', expected_revision=expected
        ),
        "merge": lambda expected: merge_metadata(
            api, message.id, '{"b": 2}', expected_revision=expected
        ),
        "delete": lambda expected: delete_message(api, message.id, expected_revision=expected),
    }
    return writes[name]


@pytest.mark.parametrize("name", WRITES)
class TestExpectedRevision:
    async def test_current_revision(self, api: Api, name: str) -> None:
        """The write is done."""
        session = await api.session()
        write = await write_to(api, session.id, name)
        await write(1)
        assert await get_revision(api, session.id) == (3 if name == "batch" else 2)

    @pytest.mark.parametrize("expected", [0, 1, 3, 2**63 - 1])
    async def test_another_revision(self, api: Api, name: str, expected: int) -> None:
        """The write is refused with the revision that the session has, and changes nothing."""
        session = await api.session()
        write = await write_to(api, session.id, name)
        await set_status(api, session.id, RESOLVED)
        with refused(StatusCode.ABORTED, "ETAG_MISMATCH") as refusal:
            await write(expected)
        assert refusal.text == f"the session is at revision 2, not {expected}"
        assert refusal.info.metadata == {"revision": "2"}
        assert "RetryInfo" not in refusal.details, "the same call never succeeds"
        assert await get_revision(api, session.id) == 2
        assert await sequences(api, session.id) == [1]
        await write(2)

    async def test_not_set(self, api: Api, name: str) -> None:
        """Nothing is checked. Unset is not 0."""
        session = await api.session()
        write = await write_to(api, session.id, name)
        await set_status(api, session.id, RESOLVED)
        await write(None)
        assert await get_revision(api, session.id) > 2

    async def test_negative(self, api: Api, name: str) -> None:
        """The request is invalid."""
        session = await api.session()
        write = await write_to(api, session.id, name)
        with refused(StatusCode.INVALID_ARGUMENT) as refusal:
            await write(-1)
        assert refusal.fields == {"expected_revision": "integer -1, at least 0"}
        assert await get_revision(api, session.id) == 1

    async def test_repeat(self, api: Api, name: str) -> None:
        """A repeat finds its own write, whatever the revision of the session is by then."""
        session = await api.session()
        write = await write_to(api, session.id, name)
        written = await write(1)
        for _ in range(2):
            if name == "delete":
                with refused(StatusCode.NOT_FOUND, "CHAT_MESSAGE_NOT_FOUND"):
                    await write(1)
            else:
                assert await write(1) == written
            await api.message(session.id)

    async def test_compared_after_a_wait_for_the_lock(
        self, start_server: Any, fresh_database: str, name: str
    ) -> None:
        """The session has changed while the write waited for it."""
        api = await start_server(fresh_database)
        session = await api.session()
        write = await write_to(api, session.id, name)
        with session_locked(fresh_database, session.id) as connection:
            writing = asyncio.ensure_future(write(1))
            await wait_for_lock_waiters(fresh_database, 1)
            connection.execute("UPDATE chat_sessions SET revision = 7 WHERE id = %s", [session.id])
        with refused(StatusCode.ABORTED, "ETAG_MISMATCH") as refusal:
            await writing
        assert refusal.info.metadata == {"revision": "7"}
        assert await get_revision(api, session.id) == 7


class TestCreate:
    async def test_first_message(self, api: Api) -> None:
        """0 is the revision of a session that has not changed."""
        session = await api.session()
        assert (await api.message(session.id, expected_revision=0)).sequence == 1
        with refused(StatusCode.ABORTED, "ETAG_MISMATCH"):
            await api.message(session.id, expected_revision=0)

    @pytest.mark.parametrize("content", ["x", "x" * 10_000])
    async def test_absent_session(self, api: Api, other: Api, content: str) -> None:
        """Is not found, as is another tenant's, whatever is expected."""
        theirs = await other.session()
        for session_id in (an_id(), theirs.id):
            with refused(StatusCode.NOT_FOUND, "CHAT_SESSION_NOT_FOUND"):
                await api.message(session_id, content, expected_revision=0)

    async def test_other_content_with_the_same_id(self, api: Api) -> None:
        """The id is taken: that is not told as a mismatch, which would go away."""
        session = await api.session()
        message = await api.message(session.id)
        for expected in (0, 1):
            with refused(StatusCode.ALREADY_EXISTS, "CHAT_MESSAGE_ALREADY_EXISTS"):
                await api.message(session.id, "other", id=message.id, expected_revision=expected)

    async def test_id_of_an_open_draft(self, api: Api) -> None:
        """Is refused at the expected revision."""
        session = await api.session()
        async with writing(api, session.id) as stream:
            with refused(StatusCode.ALREADY_EXISTS, "CHAT_MESSAGE_ALREADY_EXISTS"):
                await api.message(session.id, id=stream.draft_id, expected_revision=0)

    async def test_all_violations_at_once(self, api: Api) -> None:
        """The expected revision with the others."""
        with refused(StatusCode.INVALID_ARGUMENT) as refusal:
            await api.message("x", "", expected_revision=-5)
        assert {*refusal.fields} == {"session_id", "message.content", "expected_revision"}


class TestLink:
    async def test_session_that_has_another_ticket(self, api: Api) -> None:
        """The mismatch comes first: it says that the caller's view is old."""
        session = await api.session()
        await api.escalate(session.id)
        with refused(StatusCode.ABORTED, "ETAG_MISMATCH"):
            await api.escalate(session.id, expected_revision=0)
        with refused(StatusCode.ALREADY_EXISTS, "SESSION_HAS_TICKET"):
            await api.escalate(session.id, expected_revision=1)

    async def test_ticket_that_would_be_created(self, api: Api) -> None:
        """Does not exist after a mismatch."""
        session = await api.session()
        ticket_id = an_id()
        with refused(StatusCode.ABORTED, "ETAG_MISMATCH"):
            await api.escalate(
                session.id, ticket=r.Ticket(id=ticket_id, title="x"), expected_revision=1
            )
        with refused(StatusCode.NOT_FOUND):
            await get_ticket(api, ticket_id)

    async def test_repeat_after_the_link_is_gone(self, api: Api) -> None:
        """Is no repeat any more: the session has moved on."""
        session = await api.session()
        link = await api.escalate(session.id, expected_revision=0)
        await unlink(api, link.id)
        with refused(StatusCode.ABORTED, "ETAG_MISMATCH") as refusal:
            await api.escalate(
                session.id, chat_ticket_id=link.id, ticket_id=link.ticket_id, expected_revision=0
            )
        assert refusal.info.metadata == {"revision": "2"}


class TestUpdateWithExpectedRevision:
    async def test_equal_metadata_at_another_revision(self, api: Api) -> None:
        """Is a mismatch, even if nothing would change: only its own change is a repeat."""
        session = await api.session()
        message = await api.message(session.id, metadata_json='{"a": 1}')
        await set_metadata(api, message.id, '{"a": 2}')
        for _ in range(2):
            await api.message(session.id)
        assert await get_revision(api, session.id) == 4
        for expected in (2, 3):
            with refused(StatusCode.ABORTED, "ETAG_MISMATCH"):
                await set_metadata(api, message.id, '{"a": 2}', expected_revision=expected)
        unchanged = await set_metadata(api, message.id, '{"a": 2}', expected_revision=4)
        assert unchanged.revision == 2

    async def test_repeat_after_another_change_of_the_message(self, api: Api) -> None:
        """Is a mismatch: the repeat would undo what came after."""
        session = await api.session()
        message = await api.message(session.id)
        await set_metadata(api, message.id, '{"a": 1}', expected_revision=1)
        await set_metadata(api, message.id, '{"a": 2}')
        with refused(StatusCode.ABORTED, "ETAG_MISMATCH") as refusal:
            await set_metadata(api, message.id, '{"a": 1}', expected_revision=1)
        assert refusal.info.metadata == {"revision": "3"}
        assert (await get_message(api, message.id)).metadata_json == '{"a": 2}'


class TestEtagOfMessage:
    async def test_is_its_revision(self, api: Api) -> None:
        """In every answer, and of the message alone: changes of others do not change it."""
        session = await api.session()
        message = await api.message(session.id)
        assert message.etag == "1"
        await api.message(session.id)
        changed = await set_metadata(api, message.id, "{}", etag=message.etag)
        assert (changed.etag, changed.revision) == ("3", 3)
        assert await get_message(api, message.id) == changed
        await delete_message(api, message.id, etag=changed.etag)
        assert await sequences(api, session.id) == [2]

    @pytest.mark.parametrize("etag", ["0", "1", "4"])
    async def test_another_one(self, api: Api, etag: str) -> None:
        """The write is refused with the revision of the message, and changes nothing."""
        session = await api.session()
        message = await api.message(session.id)
        changed = await set_metadata(api, message.id, '{"a": 1}')
        await api.message(session.id)
        for write in (
            set_metadata(api, message.id, '{"b": 1}', etag=etag),
            set_metadata(api, message.id, '{"a": 1}', etag=etag),
            merge_metadata(api, message.id, '{"b": 1}', etag=etag),
            delete_message(api, message.id, etag=etag),
        ):
            with refused(StatusCode.ABORTED, "ETAG_MISMATCH") as refusal:
                await write
            assert refusal.text == f"the message is at revision 2, not {etag}"
            assert refusal.info.metadata == {"revision": "2"}
            assert "RetryInfo" not in refusal.details
        assert await get_message(api, message.id) == changed
        assert await get_revision(api, session.id) == 3

    async def test_attachments_change_it(self, api: Api) -> None:
        """They are a part of the message."""
        message = await api.message((await api.session()).id)
        await api.attachment(message.id)
        with refused(StatusCode.ABORTED, "ETAG_MISMATCH"):
            await delete_message(api, message.id, etag=message.etag)

    async def test_both_expectations(self, api: Api) -> None:
        """Each must hold."""
        session = await api.session()
        message = await api.message(session.id)
        await api.message(session.id)
        for etag, expected, found in (("1", 1, "2"), ("2", 2, "1")):
            for write in (
                set_metadata(api, message.id, "{}", etag=etag, expected_revision=expected),
                delete_message(api, message.id, etag=etag, expected_revision=expected),
            ):
                with refused(StatusCode.ABORTED, "ETAG_MISMATCH") as refusal:
                    await write
                assert refusal.info.metadata == {"revision": found}
        await set_metadata(api, message.id, "{}", etag="1", expected_revision=2)
        await delete_message(api, message.id, etag="3", expected_revision=3)

    async def test_malformed(self, api: Api) -> None:
        """What this service never handed out is no etag."""
        message = await api.message((await api.session()).id)
        for write, field in (
            (set_metadata(api, message.id, "{}", etag='W/"1"'), "message.etag"),
            (delete_message(api, message.id, etag="1" * 19), "etag"),
        ):
            with refused(StatusCode.INVALID_ARGUMENT) as refusal:
                await write
            assert refusal.fields == {field: "not an etag of this service"}

    async def test_absent_message(self, api: Api, other: Api) -> None:
        """Is not found, as is another tenant's, whatever is expected."""
        theirs = await other.message((await other.session()).id)
        for message_id in (an_id(), theirs.id):
            for write in (
                set_metadata(api, message_id, "{}", etag="1", expected_revision=1),
                delete_message(api, message_id, etag="1", expected_revision=1),
            ):
                with refused(StatusCode.NOT_FOUND, "CHAT_MESSAGE_NOT_FOUND"):
                    await write

    async def test_deleted_while_the_write_waited(
        self, start_server: Any, fresh_database: str
    ) -> None:
        """Is not found, although the session has moved on too."""
        api = await start_server(fresh_database)
        message = await api.message((await api.session()).id)
        for write in (
            lambda: delete_message(api, message.id, expected_revision=1),
            lambda: set_metadata(api, message.id, "{}", etag="1", expected_revision=1),
        ):
            message = await api.message((await api.session()).id)
            with session_locked(fresh_database, message.session_id) as connection:
                writing = asyncio.ensure_future(write())
                await wait_for_lock_waiters(fresh_database, 1)
                connection.execute("DELETE FROM chat_messages WHERE id = %s", [message.id])
                connection.execute(
                    "UPDATE chat_sessions SET revision = 2 WHERE id = %s", [message.session_id]
                )
            with refused(StatusCode.NOT_FOUND, "CHAT_MESSAGE_NOT_FOUND"):
                await writing


async def test_mismatch_of_a_session_names_its_revision(api: Api) -> None:
    """In updates and deletes of the session, and when a draft begins."""

    async def begin_draft() -> None:
        async with writing(api, session.id, expected_revision=0):
            pass

    session = await api.session()
    await api.message(session.id)
    delete = DeleteChatSessionRequest(session_id=session.id, etag="0")
    for write in (
        set_status(api, session.id, ARCHIVED, etag="0"),
        api.sessions.DeleteChatSession(delete),
        begin_draft(),
    ):
        with refused(StatusCode.ABORTED, "ETAG_MISMATCH") as refusal:
            await write
        assert refusal.info.metadata == {"revision": "1"}
