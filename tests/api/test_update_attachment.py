"""UpdateChatAttachment: the URL of a file is replaced, as presigned URLs expire."""

import asyncio
from typing import Any

import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from grpc import StatusCode
from support.attachments import (
    delete_attachment,
    get_attachment,
    list_all_attachments,
    update_attachment,
)
from support.client import Api, a_file, an_id, refused
from support.messages import batches, get_message
from support.sessions import get_session
from support.sites import OK, paths, serve, status
from support.watching import watching

from chat_ticket.v1 import resources_pb2 as r
from chat_ticket.v1.chat_attachment_pb2 import UpdateChatAttachmentRequest

NEW = "https://files.example/new?signature=2"


@pytest.fixture
async def message(api: Api) -> r.ChatMessage:
    return await api.message((await api.session()).id, attachments=[a_file(), a_file()])


async def test_url_is_replaced_in_one_change(api: Api, message: r.ChatMessage) -> None:
    """Of the attachment alone. The session and the message take one revision, and the time."""
    file, untouched = message.attachments
    assert file.update_time == file.create_time
    updated = await update_attachment(api, file.id, NEW)
    session = await get_session(api, message.session_id)
    changed = await get_message(api, message.id)
    assert (session.revision, changed.revision, changed.sequence) == (2, 2, 1)
    assert updated.update_time == session.update_time
    expected = r.ChatAttachment()
    expected.CopyFrom(file)
    expected.file_url = NEW
    expected.update_time.CopyFrom(session.update_time)
    assert updated == expected
    assert list(changed.attachments) == [updated, untouched]


async def test_every_reading_method_returns_it(api: Api, message: r.ChatMessage) -> None:
    """Alone, of the session, and with the message, also when it is watched."""
    file = message.attachments[0]
    updated = await update_attachment(api, file.id, NEW)
    assert await get_attachment(api, file.id) == updated
    for parent in ({"session_id": message.session_id}, {"message_id": message.id}):
        assert (await list_all_attachments(api, **parent))[0] == updated
    [response] = await batches(api, message.session_id)
    assert response.messages[0].attachments[0] == updated
    async with watching(api, message.session_id) as watcher:
        event = await watcher.until("messages_created")
        assert event.messages_created.messages[0].attachments[0] == updated


async def test_watchers_receive_the_message_again(start_server: Any, database: str) -> None:
    """At once: the server does not poll."""
    api = await start_server(database, watch_poll_interval_seconds=3600)
    message = await api.message((await api.session()).id, attachments=[a_file()])
    async with watching(api, message.session_id) as watcher:
        await watcher.until("caught_up")
        updated = await update_attachment(api, message.attachments[0].id, NEW)
        received = (await watcher.next()).message_updated
        assert list(received.attachments) == [updated]
        assert received.revision == 2


async def test_equal_url_changes_nothing(api: Api, message: r.ChatMessage) -> None:
    """Neither a revision nor a time, however often it is set."""
    file = message.attachments[0]
    assert await update_attachment(api, file.id, file.file_url) == file
    updated = await update_attachment(api, file.id, NEW)
    assert (
        await asyncio.gather(*(update_attachment(api, file.id, NEW) for _ in range(8)))
        == [updated] * 8
    )
    assert (await get_message(api, message.id)).revision == 2
    back = await update_attachment(api, file.id, file.file_url)
    assert back.update_time.ToNanoseconds() > updated.update_time.ToNanoseconds()
    assert (await get_message(api, message.id)).revision == 3


@pytest.mark.parametrize(
    "bad",
    [
        *("", "files.example/a", "https:///a", "https://files.example/a ", "https://[::1/"),
        *("http://files.example/", "https://user:secret@files.example/", "javascript:alert(1)"),
        "https://files.example/" + "a" * 2048,
    ],
)
async def test_url_is_validated_as_at_create(api: Api, message: r.ChatMessage, bad: str) -> None:
    """The field is named, and nothing has changed."""
    with refused(StatusCode.INVALID_ARGUMENT) as created:
        await api.attachment(message.id, file_url=bad)
    with refused(StatusCode.INVALID_ARGUMENT) as refusal:
        await update_attachment(api, message.attachments[0].id, bad)
    assert list(refusal.fields) == ["attachment.file_url"]
    assert refusal.fields == created.fields
    assert await get_message(api, message.id) == message


@pytest.mark.parametrize(
    "names", [[], ["file_name"], ["*"], ["file_url", "id"], ["file_url"] * 21, ["attachment.id"]]
)
async def test_only_the_url_can_be_updated(
    api: Api, message: r.ChatMessage, names: list[str]
) -> None:
    """Every other mask is rejected, together with what else is wrong."""
    file = message.attachments[0]
    request = UpdateChatAttachmentRequest(
        attachment=a_file(id=file.id, file_url=NEW), update_mask=FieldMask(paths=names)
    )
    with refused(StatusCode.INVALID_ARGUMENT) as refusal:
        await api.attachments.UpdateChatAttachment(request)
    assert list(refusal.fields) == ["update_mask"]
    request.attachment.id = "no id"
    request.attachment.file_url = "no URL"
    with refused(StatusCode.INVALID_ARGUMENT) as refusal:
        await api.attachments.UpdateChatAttachment(request)
    assert {"attachment.id", "update_mask"} <= set(refusal.fields)
    assert await get_message(api, message.id) == message


async def test_fields_that_the_mask_does_not_name_are_ignored(
    api: Api, message: r.ChatMessage
) -> None:
    """Another name, type or message is not read."""
    file = message.attachments[0]
    request = UpdateChatAttachmentRequest(
        attachment=a_file(
            id=file.id.upper(), message_id=an_id(), file_url=NEW, file_name="", file_type="b"
        ),
        update_mask=FieldMask(paths=["file_url", "file_url"]),
    )
    updated = (await api.attachments.UpdateChatAttachment(request)).attachment
    assert (updated.id, updated.message_id) == (file.id, message.id)
    assert (updated.file_name, updated.file_type) == (file.file_name, file.file_type)


async def test_absent_and_foreign_are_not_found(api: Api, other: Api) -> None:
    """Nobody changes another tenant's attachment."""
    theirs = await other.message((await other.session()).id, attachments=[a_file()])
    for attachment_id in (theirs.attachments[0].id, an_id()):
        with refused(StatusCode.NOT_FOUND, "CHAT_ATTACHMENT_NOT_FOUND"):
            await update_attachment(api, attachment_id, NEW)
    assert await get_message(other, theirs.id) == theirs


async def test_updates_and_a_deletion_at_once(api: Api) -> None:
    """In some order: those behind the deletion are NOT_FOUND, and nothing else fails."""
    for _ in range(5):
        message = await api.message((await api.session()).id, attachments=[a_file()])
        file = message.attachments[0]
        outcomes = await asyncio.gather(
            *(update_attachment(api, file.id, f"{NEW}&{number}") for number in range(6)),
            delete_attachment(api, file.id),
            return_exceptions=True,
        )
        updated = [each for each in outcomes if isinstance(each, r.ChatAttachment)]
        for error in outcomes:
            if isinstance(error, Exception):
                assert error.code() is StatusCode.NOT_FOUND
        changed = await get_message(api, message.id)
        assert (len(changed.attachments), changed.revision) == (0, 2 + len(updated))


class TestRepeatOfTheCreate:
    async def test_url_is_compared_until_it_is_updated(
        self, api: Api, message: r.ChatMessage
    ) -> None:
        """A late repeat has the old URL, and gets the attachment as it is now."""
        file_id = an_id()
        await api.attachment(message.id, id=file_id)
        with refused(StatusCode.ALREADY_EXISTS, "CHAT_ATTACHMENT_ALREADY_EXISTS"):
            await api.attachment(message.id, id=file_id, file_url=NEW)
        updated = await update_attachment(api, file_id, NEW)
        assert await api.attachment(message.id, id=file_id) == updated
        with refused(StatusCode.ALREADY_EXISTS, "CHAT_ATTACHMENT_ALREADY_EXISTS"):
            await api.attachment(message.id, id=file_id, file_name="b")
        assert await get_attachment(api, file_id) == updated

    async def test_repeat_of_its_message(self, api: Api) -> None:
        """It returns the message with the new URL."""
        session = await api.session()
        fields = {"id": an_id(), "attachments": [a_file(id=an_id())]}
        message = await api.message(session.id, **fields)
        updated = await update_attachment(api, message.attachments[0].id, NEW)
        repeated = await api.message(session.id, **fields)
        assert list(repeated.attachments) == [updated]


async def test_url_must_be_accessible(start_server: Any, database: str) -> None:
    """As at create. The one that is stored is not looked at again."""
    pages = {"/old": OK, "/new": OK, "/gone": status(404)}
    async with serve(paths(pages)) as site:
        api = await start_server(
            database,
            attachment_url_check=True,
            attachment_url_schemes="http,https",
            attachment_url_allowed_hosts=site.at,
        )
        message = await api.message(
            (await api.session()).id, attachments=[a_file(file_url=f"http://{site.at}/old")]
        )
        file = message.attachments[0]
        with refused(StatusCode.FAILED_PRECONDITION, "ATTACHMENT_URL_NOT_ACCESSIBLE") as refusal:
            await update_attachment(api, file.id, f"http://{site.at}/gone")
        assert refusal.text == "file_url not accessible: attachment 1 of the request"
        assert await get_message(api, message.id) == message
        updated = await update_attachment(api, file.id, f"http://{site.at}/new")
        assert updated.file_url == f"http://{site.at}/new"
        visits = await site.visits()
        assert await update_attachment(api, file.id, updated.file_url) == updated
        with refused(StatusCode.NOT_FOUND, "CHAT_ATTACHMENT_NOT_FOUND"):
            await update_attachment(api, an_id(), f"http://{site.at}/new")
        assert await site.visits() == visits
