"""The text of drafts: offsets in bytes of UTF-8, repeats, gaps, limits, what is no text."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

import grpc.aio
import pytest
from grpc import StatusCode
from support.client import REQUEST_ID, Api, refused
from support.drafts import DraftStream, a_start, get_draft, leave_draft, writing
from support.messages import KIB

from chat_ticket.v1.chat_draft_pb2 import WriteChatDraftRequest, WriteChatDraftResponse
from chat_ticket_svc import errors
from chat_ticket_svc.store.database import Database

LIMIT = 256 * KIB
# One, two, three and four bytes, a combining character, and several characters that look like one.
CHARACTERS = ["a", "é", "日", "\U0001f600", "e\u0301", "\U0001f468\u200d\U0001f469\u200d\U0001f467"]


class TestOffsets:
    async def test_offsets_count_bytes_of_utf8(self, api: Api) -> None:
        """Whatever the characters are."""
        session = await api.session()
        async with writing(api, session.id) as stream:
            length = 0
            for character in CHARACTERS:
                await stream.append(character, offset=length)
                length += len(character.encode())
                assert (await stream.until("written")).written.length == length
            draft = await get_draft(api, stream.draft_id)
            assert (draft.content, draft.length) == ("".join(CHARACTERS), length)
            assert (await stream.finish()).content == "".join(CHARACTERS)

    async def test_text_is_stored_as_sent(self, api: Api) -> None:
        """Nothing is normalised, trimmed or escaped, in one piece or several."""
        session = await api.session()
        pieces = [" \t\r\n", '{}\\ " , \\0 %s NULL', "e", "\u0301\u202e\ufeff", "\U0001f600 \n"]
        async with writing(api, session.id) as stream:
            for piece in pieces:
                await stream.write(piece)
            assert (await get_draft(api, stream.draft_id)).content == "".join(pieces)
            assert (await stream.finish()).content == "".join(pieces)

    async def test_gap_is_rejected_with_the_length(self, api: Api) -> None:
        """Also when the text before it is not durable yet. What was sent before it is kept."""
        session = await api.session()
        async with writing(api, session.id) as stream:
            await stream.append("größer")
            await stream.append("x", offset=9)
            with refused(StatusCode.OUT_OF_RANGE, "DRAFT_GAP") as refusal:
                await stream.until_error()
            assert dict(refusal.info.metadata) == {"length": "8"}
        async with writing(api, session.id, stream.draft_id) as again:
            assert again.written == 8
            assert (await again.finish()).content == "größer"

    async def test_gap_of_an_empty_append(self, api: Api) -> None:
        """A writer that is only alive, and is wrong about the length, is told."""
        session = await api.session()
        async with writing(api, session.id) as stream:
            await stream.append("", offset=1)
            with refused(StatusCode.OUT_OF_RANGE, "DRAFT_GAP") as refusal:
                await stream.until_error()
        assert dict(refusal.info.metadata) == {"length": "0"}

    async def test_negative_offset(self, api: Api) -> None:
        """It is no offset."""
        session = await api.session()
        async with writing(api, session.id) as stream:
            await stream.append("x", offset=-1)
            with refused(StatusCode.INVALID_ARGUMENT) as refusal:
                await stream.until_error()
        assert refusal.fields == {"append.offset": "integer -1, at least 0"}


class TestRepeats:
    @pytest.mark.parametrize(
        ("offset", "text"),
        [
            (0, "größer \U0001f600"),  # everything
            (0, "grö"),
            (2, "öß"),
            (8, " \U0001f600"),
            (9, ""),
            (0, "größer \U0001f600 und mehr é"),  # and beyond the end
            (9, "\U0001f600 und mehr é"),
            (13, " und mehr é"),
        ],
    )
    async def test_repeat_is_not_added_again(self, api: Api, offset: int, text: str) -> None:
        """What the draft has already is compared, and only the rest is added."""
        session = await api.session()
        stored = "größer \U0001f600"
        async with writing(api, session.id) as stream:
            await stream.write(stored)
            await stream.append(text, offset=offset)
            content = (await stream.finish()).content
        end = offset + len(text.encode())
        assert content == (stored if end <= 13 else stored + " und mehr é")

    async def test_repeat_of_what_is_on_its_way(self, api: Api) -> None:
        """Each append is sent twice, the second time longer, without waiting."""
        session = await api.session()
        text = "0123456789é" * 10
        async with writing(api, session.id) as stream:
            for end in range(10, len(text) + 1, 10):
                start = len(text[: end - 10].encode())
                await stream.append(text[end - 10 : end - 3], offset=start)
                await stream.append(text[end - 10 : end], offset=start)
            assert (await stream.finish()).content == text

    @pytest.mark.parametrize(
        ("offset", "text"),
        [
            (0, "x"),
            (0, "großer"),
            (7, "r!"),
            (8, "!, and beyond"),
            (0, "größer!?"),
            (3, "x"),  # the second byte of a character: no text begins there
            (3, "ö"),
            (0, "gro"),
        ],
    )
    async def test_other_text_is_a_conflict(self, api: Api, offset: int, text: str) -> None:
        """Nothing of it is stored. The length says from where to go on."""
        session = await api.session()
        async with writing(api, session.id) as stream:
            await stream.write("größer? No.")
            await stream.append(text, offset=offset)
            with refused(StatusCode.ABORTED, "DRAFT_CONFLICT") as refusal:
                await stream.until_error()
            assert dict(refusal.info.metadata) == {"length": "13"}
        assert (await get_draft(api, stream.draft_id)).content == "größer? No."

    async def test_overlap_that_ends_within_a_character(self, api: Api) -> None:
        """The bytes before the end agree as far as the draft goes, or they do not: no third way."""
        session = await api.session()
        async with writing(api, session.id) as stream:
            # é is c3 a9, ê is c3 aa: they differ in the last byte that the draft has.
            await stream.write("é")
            await stream.append("ê and more", offset=0)
            with refused(StatusCode.ABORTED, "DRAFT_CONFLICT"):
                await stream.until_error()
        assert (await get_draft(api, stream.draft_id)).content == "é"


class TestNoText:
    @pytest.mark.parametrize(
        "text",
        [b"ab\xc3", b"\xa9", b"\xed\xa0\x80", b"\xff", b"\xf4\x90\x80\x80", b"\xc0\x80"],
        ids=["first half", "second half", "surrogate", "no utf-8", "too high", "overlong"],
    )
    async def test_bytes_that_are_no_utf8(self, api: Api, text: bytes) -> None:
        """A character that is split between two appends is refused, and the draft is as before."""
        session = await api.session()
        draft_id = await leave_draft(api, session.id, "before")
        start = WriteChatDraftRequest(start=a_start(session.id, draft_id))
        append = b"\x08\x06\x12" + bytes([len(text)]) + text
        call = api.channel.stream_stream(
            "/chat_ticket.v1.ChatDraftService/WriteChatDraft",
            response_deserializer=WriteChatDraftResponse.FromString,
        )(metadata=[("x-tenant-id", api.tenant), ("x-request-id", REQUEST_ID)], timeout=60)
        stream = DraftStream(call)
        await call.write(start.SerializeToString())
        assert (await stream.until("started")).started.length == 6
        await call.write(b"\x12" + bytes([len(append)]) + append)
        with refused(StatusCode.INVALID_ARGUMENT) as refusal:
            await stream.until_error()
        assert list(refusal.fields) == [""]
        assert (await get_draft(api, draft_id)).content == "before"

    async def test_nul_is_rejected(self, api: Api) -> None:
        """PostgreSQL cannot store it. What was sent before it is kept, and the writer resumes."""
        session = await api.session()
        async with writing(api, session.id) as stream:
            await stream.append("before")
            await stream.append("a\0b")
            with refused(StatusCode.INVALID_ARGUMENT) as refusal:
                await stream.until_error()
        assert refusal.fields == {"append.text": "contains a NUL character"}
        async with writing(api, session.id, stream.draft_id) as again:
            await again.append(" and after")
            assert (await again.finish()).content == "before and after"


class TestLimit:
    @pytest.mark.parametrize("letter", ["a", "é", "\U0001f600"])
    async def test_content_is_limited_to_256_kib_of_utf8(self, api: Api, letter: str) -> None:
        """The limit counts bytes of all appends together: at it is stored, one more is refused."""
        session = await api.session()
        text = letter * (LIMIT // 2 // len(letter.encode()))
        async with writing(api, session.id) as stream:
            await stream.append(text)
            await stream.append(text)
            await stream.append("x")
            with refused(StatusCode.INVALID_ARGUMENT) as refusal:
                await stream.until_error()
            assert stream.written == LIMIT, "what was sent before it is acknowledged"
        assert refusal.fields == {
            "append.text": "content of 262,145 bytes of UTF-8, at most 262,144"
        }
        async with writing(api, session.id, stream.draft_id) as again:
            assert again.written == LIMIT
            await again.append("", offset=LIMIT)
            assert (await again.finish()).content == text * 2

    async def test_one_large_append(self, api: Api) -> None:
        """Everything may come at once, but not one byte more."""
        session = await api.session()
        async with writing(api, session.id) as stream:
            await stream.append("x" * LIMIT)
            assert (await stream.finish()).content == "x" * LIMIT
        async with writing(api, session.id) as stream:
            await stream.append("x" * (LIMIT + 1))
            with refused(StatusCode.INVALID_ARGUMENT):
                await stream.until_error()
        assert (await get_draft(api, stream.draft_id)).content == ""

    async def test_request_that_is_too_large_for_grpc(self, api: Api) -> None:
        """More than 4 MiB: the draft is as before, and is resumed."""
        session = await api.session()
        async with writing(api, session.id) as stream:
            await stream.write("before")
            await stream.append("x" * (4 * KIB * KIB))
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await stream.until_error()
            assert error.value.code() is StatusCode.RESOURCE_EXHAUSTED
        assert (await get_draft(api, stream.draft_id)).content == "before"

    async def test_writer_that_is_not_read(self, api: Api) -> None:
        """A writer that reads nothing until the end gets few acknowledgements, but the last one."""
        session = await api.session()
        async with writing(api, session.id) as stream:
            for _ in range(300):
                await stream.append("x" * 100)
            await asyncio.sleep(0.2)
            assert len((await stream.finish()).content) == 30_000
        assert stream.written == 30_000


class TestRenewal:
    async def test_empty_append_renews_the_lease(self, api: Api) -> None:
        """At any offset that the draft has, and it changes nothing else."""
        session = await api.session()
        async with writing(api, session.id) as stream:
            await stream.write("text")
            for offset in (4, 0):
                before = await get_draft(api, stream.draft_id)
                await stream.append("", offset=offset)
                async with asyncio.timeout(5):
                    while (now := await get_draft(api, stream.draft_id)) == before:
                        await asyncio.sleep(0.005)
                assert now.expire_time.ToNanoseconds() > before.expire_time.ToNanoseconds()
                before.expire_time.CopyFrom(now.expire_time)
                assert now == before
            assert (await stream.finish()).content == "text"


async def test_statement_that_fails_for_many(
    start_server: Callable[..., Awaitable[Api]], database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None of the writers hears of it, also when there are more than may wait for connections."""

    async def fail(*_: object) -> None:
        raise errors.StatementCanceledError

    api = await start_server(database, pool_size=2)
    sessions = [(await api.session()).id for _ in range(5)]
    async with contextlib.AsyncExitStack() as stack:
        streams = [
            await stack.enter_async_context(writing(api, session_id))
            for session_id in sessions
            for _ in range(8)
        ]
        with monkeypatch.context() as patch:
            patch.setattr(Database, "write_pipelined", fail)
            await asyncio.gather(*(stream.write("text") for stream in streams))
        for stream in streams:
            assert (await stream.finish()).content == "text"
