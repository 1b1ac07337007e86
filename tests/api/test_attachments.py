"""Attachments through the API. How a URL is checked is in test_attachment_url.py."""

import asyncio
import http.server
import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from grpc import StatusCode
from support.attachments import delete_attachment, get_attachment, list_all_attachments
from support.client import Api, a_file, an_id, refused
from support.messages import get_message

from chat_ticket.v1 import resources_pb2 as r
from chat_ticket.v1.chat_attachment_pb2 import (
    ListChatAttachmentsRequest,
)
from chat_ticket.v1.chat_message_pb2 import DeleteChatMessageRequest


@pytest.fixture
async def message(api: Api) -> r.ChatMessage:
    return await api.message((await api.session()).id)


class TestCreate:
    async def test_attachment_is_stored_and_changes_its_message(
        self, api: Api, message: r.ChatMessage
    ) -> None:
        """The message's revision moves, its sequence does not."""
        attachment = await api.attachment(message.id)
        assert attachment.message_id == message.id
        assert await get_attachment(api, attachment.id) == attachment
        changed = await get_message(api, message.id)
        assert list(changed.attachments) == [attachment]
        assert (changed.sequence, changed.revision) == (1, 2)

    @pytest.mark.parametrize(
        ("field", "bad"),
        [
            ("file_url", ""),
            ("file_url", "files.example/a"),
            ("file_url", "https:///a"),
            ("file_url", "https:files.example/a"),
            ("file_url", "https://files.example\\@b/"),
            ("file_url", "https://files.example/a "),
            ("file_url", "https://files.example/a\tb"),
            ("file_url", "https://files.example/\u202e"),
            ("file_url", "https://a|b.example/"),
            ("file_url", "https://files.example:99999/"),
            ("file_url", "https://[::1/"),
            ("file_url", "https://[::1].files.example/"),
            ("file_url", "https://files.example[::1]/"),
            ("file_url", "http://files.example/"),
            ("file_url", "ftp://files.example/"),
            ("file_url", "javascript:alert(1)"),
            ("file_url", "https://user:secret@files.example/"),
            ("file_url", "https://files.example/" + "a" * 2048),
            ("file_name", ""),
            ("file_name", "a\nb"),
            ("file_name", "a\0b"),
            ("file_name", "a\u0085b"),
            ("file_name", "a" * 256),
            ("file_type", ""),
            ("file_type", "png"),
            ("file_type", "image/"),
            ("file_type", "image/png; a"),
            ("file_type", "image/png; a=b c"),
            ("file_type", 'image/png; a="b'),
            ("file_type", "image/png; a=é"),
            ("file_type", "image/png" + "; " * 120 + "a"),
            ("file_type", "image/png "),
            ("file_name", " "),
            ("file_name", "a.png "),
            ("file_name", "a\u2028b"),
            ("file_name", "a\u202egnp.exe"),
            ("file_type", "a/" + "b" * 254),
        ],
    )
    async def test_invalid_file_information_is_rejected(
        self, api: Api, message: r.ChatMessage, field: str, bad: str
    ) -> None:
        """URL, name and type are valid, or the field is named and nothing is stored."""
        with refused(StatusCode.INVALID_ARGUMENT) as refusal:
            await api.attachment(message.id, **{field: bad})
        assert list(refusal.fields) == [f"attachment.{field}"]
        assert "secret" not in refusal.text
        assert (await get_message(api, message.id)).revision == 1

    async def test_limits_themselves_are_accepted(self, api: Api, message: r.ChatMessage) -> None:
        """A URL of 2,048 characters, a name and a type of 255."""
        url = "https://files.example/" + "a" * (2048 - 22)
        file = a_file(
            file_url=url, file_name="é/\\\u2067\u2069" + "é" * 250, file_type="a/" + "b" * 253
        )
        stored = await api.attachment(
            message.id, file_url=file.file_url, file_name=file.file_name, file_type=file.file_type
        )
        assert (stored.file_url, stored.file_name, stored.file_type) == (
            file.file_url,
            file.file_name,
            file.file_type,
        )

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("file_url", "https://files.example/a.png?f=a|b"),
            ("file_url", "https://bücher.example/a.png"),
            ("file_url", "https://example.com/é a.png?q=“ü”#ß"),
            ("file_url", "https://my_bucket.example/100%.png"),
            ("file_type", "audio/ogg; codecs=opus"),
            ("file_type", 'text/plain ;charset=utf-8; name="a \\"b\\"/c;d"'),
        ],
    )
    async def test_what_programs_make_is_stored_as_sent(
        self, api: Api, message: r.ChatMessage, field: str, value: str
    ) -> None:
        """URLs as WHATWG reads them and types with parameters, alone and with a message."""
        assert getattr(await api.attachment(message.id, **{field: value}), field) == value
        with_message = await api.message(message.session_id, attachments=[a_file(**{field: value})])
        assert getattr(with_message.attachments[0], field) == value

    async def test_scheme_in_capitals(self, api: Api, message: r.ChatMessage) -> None:
        """A scheme is the same in any case; the URL is kept as sent."""
        url = "HTTPS://Files.example/A.png"
        assert (await api.attachment(message.id, file_url=url)).file_url == url
        with_message = await api.message(message.session_id, attachments=[a_file(file_url=url)])
        assert with_message.attachments[0].file_url == url

    async def test_message_has_at_most_20_attachments(
        self, api: Api, message: r.ChatMessage
    ) -> None:
        """The limit holds under concurrency."""
        results = await asyncio.gather(
            *(api.attachment(message.id) for _ in range(25)), return_exceptions=True
        )
        stored = [result for result in results if isinstance(result, r.ChatAttachment)]
        assert len(stored) == 20
        with refused(StatusCode.FAILED_PRECONDITION, "TOO_MANY_ATTACHMENTS"):
            await api.attachment(message.id)

    async def test_repeat_returns_the_stored_one(self, api: Api, message: r.ChatMessage) -> None:
        """Sixteen creates of one id are one attachment."""
        attachment_id = an_id()
        answers = await asyncio.gather(
            *(api.attachment(message.id, id=attachment_id) for _ in range(16))
        )
        assert all(answer == answers[0] for answer in answers)
        assert (await get_message(api, message.id)).revision == 2

    async def test_id_of_another_attachment_is_rejected(
        self, api: Api, message: r.ChatMessage
    ) -> None:
        """Other fields, or another message, are not a repeat."""
        elsewhere = await api.message(message.session_id)
        attachment_id = (await api.attachment(message.id)).id
        for message_id, name in ((message.id, "other"), (elsewhere.id, "a.png")):
            with refused(StatusCode.ALREADY_EXISTS, "CHAT_ATTACHMENT_ALREADY_EXISTS"):
                await api.attachment(message_id, id=attachment_id, file_name=name)

    async def test_absent_and_foreign_message_get_the_same_error(
        self, api: Api, other: Api
    ) -> None:
        """An attachment belongs to a message of the same tenant."""
        theirs = await other.message((await other.session()).id)
        for message_id in (theirs.id, an_id()):
            with refused(StatusCode.NOT_FOUND, "CHAT_MESSAGE_NOT_FOUND"):
                await api.attachment(message_id)
        assert (await get_message(other, theirs.id)).revision == 1


class TestUrlCheck:
    """With the check on, as it is by default."""

    @contextmanager
    def files(self, handle: Callable[[str], int]) -> Iterator[str]:
        """An HTTP server whose answers have the status of `handle`; yields host:port."""

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(handle(self.path))
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            threading.Thread(target=server.serve_forever).start()
            try:
                yield f"127.0.0.1:{server.server_port}"
            finally:
                server.shutdown()

    @pytest.mark.parametrize(
        "url", ["https://127.0.0.1/a", "https://169.254.169.254/", "https://no-such.invalid/a"]
    )
    async def test_inaccessible_url_is_rejected(
        self, start_server: Any, database: str, url: str
    ) -> None:
        """Whatever the cause, the answer is the same, and nothing is stored."""
        api = await start_server(database, attachment_url_check=True)
        message = await api.message((await api.session()).id)
        reason = "ATTACHMENT_URL_NOT_ACCESSIBLE"
        with refused(StatusCode.FAILED_PRECONDITION, reason) as alone:
            await api.attachment(message.id, file_url=url)
        with refused(StatusCode.FAILED_PRECONDITION, reason) as with_message:
            await api.message(message.session_id, attachments=[a_file(file_url=url)])
        assert alone.text == with_message.text
        assert alone.text == "file_url not accessible: attachment 1 of the request"
        assert alone.details["PreconditionFailure"].violations[0].type == reason
        assert (await get_message(api, message.id)).revision == 1

    async def test_allowed_host_is_reached_and_a_repeat_is_not_checked(
        self, start_server: Any, database: str
    ) -> None:
        """A repeat returns what is stored, also when the file is gone by then."""
        with self.files(lambda path: 200 if path == "/there" else 404) as host:
            api = await start_server(
                database,
                attachment_url_check=True,
                attachment_url_schemes="http,https",
                attachment_url_allowed_hosts=host,
            )
            session = await api.session()
            fields = {
                "id": an_id(),
                "attachments": [a_file(id=an_id(), file_url=f"http://{host}/there")],
            }
            message = await api.message(session.id, **fields)
            alone = {"id": an_id(), "file_url": f"http://{host}/there"}
            attachment = await api.attachment(message.id, **alone)
            with refused(StatusCode.FAILED_PRECONDITION, "ATTACHMENT_URL_NOT_ACCESSIBLE"):
                await api.attachment(message.id, file_url=f"http://{host}/gone")
        repeated = await api.message(session.id, **fields)
        assert repeated.id == message.id
        assert len(repeated.attachments) == 2
        assert await api.attachment(message.id, **alone) == attachment

    @pytest.mark.parametrize("alone", [False, True])
    async def test_repeated_create_does_not_check_the_url(
        self, start_server: Any, database: str, alone: bool
    ) -> None:
        """One that is stored already is answered without a request to its host."""
        requests = []
        with self.files(lambda _: requests.append(1) or 200) as host:
            api = await start_server(
                database,
                attachment_url_check=True,
                attachment_url_schemes="http",
                attachment_url_allowed_hosts=host,
            )
            session = await api.session()
            message = await api.message(session.id, id=an_id())
            fields = {"id": an_id(), "file_url": f"http://{host}/"}
            for _ in range(2):
                if alone:
                    await api.attachment(message.id, **fields)
                else:
                    await api.message(session.id, id=fields["id"], attachments=[a_file(**fields)])
        assert len(requests) == 1

    @pytest.mark.parametrize("alone", [False, True])
    async def test_repeats_that_cross_get_the_same_answer(
        self, start_server: Any, database: str, alone: bool
    ) -> None:
        """The file may go between the first call's check and the second's: it is stored by then."""
        both, stored = threading.Barrier(2), threading.Event()
        turns = itertools.count()

        def handle(_: str) -> int:
            both.wait(10)
            if next(turns) == 0:
                return 200
            stored.wait(10)
            return 404

        with self.files(handle) as host:
            api = await start_server(
                database,
                attachment_url_check=True,
                attachment_url_schemes="http",
                attachment_url_allowed_hosts=host,
            )
            session = await api.session()
            message = await api.message(session.id)
            fields = {"id": an_id(), "file_url": f"http://{host}/"}
            calls = [
                asyncio.create_task(
                    api.attachment(message.id, **fields)
                    if alone
                    else api.message(session.id, id=fields["id"], attachments=[a_file(**fields)])
                )
                for _ in range(2)
            ]
            await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
            stored.set()
            first, second = await asyncio.gather(*calls)
        assert first == second


class TestList:
    async def test_of_a_message_in_pages(self, api: Api, message: r.ChatMessage) -> None:
        """In the order they were added, each once."""
        ids = [(await api.attachment(message.id)).id for _ in range(5)]
        found = await list_all_attachments(api, message_id=message.id, page_size=2)
        assert [attachment.id for attachment in found] == ids

    async def test_of_a_session_by_message(self, api: Api, message: r.ChatMessage) -> None:
        """By the order of the messages first, whenever they were added; pages may cut a message."""
        second = await api.message(message.session_id, attachments=[a_file()] * 4)
        late = await api.attachment(message.id)
        elsewhere = await api.message((await api.session()).id, attachments=[a_file()])
        found = await list_all_attachments(api, session_id=message.session_id, page_size=1)
        expected = [late.id, *(attachment.id for attachment in second.attachments)]
        assert [attachment.id for attachment in found] == expected
        assert elsewhere.attachments[0].id not in expected

    async def test_large_page_fits_into_a_response(self, api: Api) -> None:
        """1,000 attachments of 3 KB each come in pages under 3 MiB, none lost."""
        session = await api.session()
        url = "https://files.example/" + "a" * 2000
        file = a_file(file_url=url, file_name="\U0001f600" * 255)
        for _ in range(55):
            await api.message(session.id, attachments=[file] * 20)
        request = ListChatAttachmentsRequest(session_id=session.id, page_size=1000)
        page = await api.attachments.ListChatAttachments(request)
        assert page.ByteSize() <= 3 * 1024 * 1024
        assert 900 < len(page.attachments) < 1000
        assert len(await list_all_attachments(api, session_id=session.id, page_size=1000)) == 1100

    async def test_parent_is_required_and_must_exist(self, api: Api, other: Api) -> None:
        """No parent is invalid; an absent or foreign one NOT_FOUND; an empty one an empty page."""
        with refused(StatusCode.INVALID_ARGUMENT) as refusal:
            await list_all_attachments(api)
        required = "required: message_id or session_id"
        assert refusal.fields == {"message_id": required, "session_id": required}
        theirs = await other.message((await other.session()).id, attachments=[a_file()])
        for message_id in (theirs.id, an_id()):
            with refused(StatusCode.NOT_FOUND, "CHAT_MESSAGE_NOT_FOUND"):
                await list_all_attachments(api, message_id=message_id)
        for session_id in (theirs.session_id, an_id()):
            with refused(StatusCode.NOT_FOUND, "CHAT_SESSION_NOT_FOUND"):
                await list_all_attachments(api, session_id=session_id)
        assert await list_all_attachments(api, session_id=(await api.session()).id) == []


class TestDelete:
    async def test_delete_removes_the_attachment_and_changes_its_message(
        self, api: Api, message: r.ChatMessage
    ) -> None:
        """The message's revision moves; a repeat is NOT_FOUND."""
        attachment = await api.attachment(message.id)
        await delete_attachment(api, attachment.id)
        changed = await get_message(api, message.id)
        assert (list(changed.attachments), changed.revision) == ([], 3)
        for attempt in (get_attachment, delete_attachment):
            with refused(StatusCode.NOT_FOUND, "CHAT_ATTACHMENT_NOT_FOUND"):
                await attempt(api, attachment.id)

    async def test_deleting_a_message_deletes_its_attachments(
        self, api: Api, message: r.ChatMessage
    ) -> None:
        """Deleting a message deletes its attachments."""
        attachment = await api.attachment(message.id)
        await api.messages.DeleteChatMessage(DeleteChatMessageRequest(message_id=message.id))
        with refused(StatusCode.NOT_FOUND, "CHAT_ATTACHMENT_NOT_FOUND"):
            await get_attachment(api, attachment.id)

    async def test_foreign_attachment_is_out_of_reach(self, api: Api, other: Api) -> None:
        """Nobody reads or deletes another tenant's attachment."""
        theirs = await other.message((await other.session()).id, attachments=[a_file()])
        for attempt in (get_attachment, delete_attachment):
            with refused(StatusCode.NOT_FOUND, "CHAT_ATTACHMENT_NOT_FOUND"):
                await attempt(api, theirs.attachments[0].id)
        assert await get_message(other, theirs.id) == theirs


@pytest.mark.parametrize(
    "changed",
    [{"file_url": "https://files.example/b"}, {"file_name": "b"}, {"file_type": "a/b"}],
    ids=["url", "name", "type"],
)
async def test_id_of_another_file_is_rejected(api: Api, changed: dict[str, str]) -> None:
    """An id stands for the URL, the name and the type that it was first used for."""
    session, message_id, file_id = await api.session(), an_id(), an_id()
    await api.message(session.id, id=message_id, attachments=[a_file(id=file_id)])
    with refused(StatusCode.ALREADY_EXISTS, "CHAT_ATTACHMENT_ALREADY_EXISTS"):
        await api.attachment(message_id, id=file_id, **changed)
    with refused(StatusCode.ALREADY_EXISTS, "CHAT_MESSAGE_ALREADY_EXISTS"):
        await api.message(session.id, id=message_id, attachments=[a_file(id=file_id, **changed)])
    assert (await api.attachment(message_id, id=file_id)).id == file_id
