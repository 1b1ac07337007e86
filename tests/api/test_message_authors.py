"""Who wrote a message: stored and returned everywhere, compared by a repeat, never changed."""

import asyncio
import json

import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from grpc import StatusCode
from support.client import Api, a_file, an_id, refused
from support.drafts import (
    a_start,
    get_draft,
    list_drafts,
    start_finished,
    stop_draft,
    unstarted,
    write_message,
    writing,
)
from support.messages import (
    ASSISTANT,
    batches,
    create_batch,
    get_message,
    redact_message,
    sequences,
    set_metadata,
    user_message,
)
from support.process import command
from support.sessions import get_revision
from support.watching import assert_same_state, watching

from chat_ticket.v1 import resources_pb2 as r
from chat_ticket.v1.chat_message_pb2 import (
    CreateChatMessageRequest,
    ListChatMessagesRequest,
    ListChatMessagesResponse,
    UpdateChatMessageRequest,
)

Author = r.ChatMessageAuthor
END_USER = r.CHAT_MESSAGE_AUTHOR_KIND_END_USER
AI_AGENT = r.CHAT_MESSAGE_AUTHOR_KIND_AI_AGENT
HUMAN_AGENT = r.CHAT_MESSAGE_AUTHOR_KIND_HUMAN_AGENT
ANN = Author(kind=END_USER, id="ann")

AUTHORS = [
    None,
    ANN,
    Author(kind=AI_AGENT),
    Author(kind=HUMAN_AGENT, id="x" * 127),
    Author(kind=HUMAN_AGENT, id="x" * 128),
    Author(id="é" * 255),
    Author(id='"\\{},NULL'),
    Author(id="NULL"),
]


def author_of(message: r.ChatMessage | r.ChatDraft) -> Author | None:
    return message.author if message.HasField("author") else None


class TestStored:
    async def test_author_is_returned_as_sent(self, api: Api) -> None:
        """By each way to create a message and each way to read one."""
        session = await api.session()
        async with watching(api, session.id) as watcher:
            await watcher.until("caught_up")
            for author in AUTHORS:
                message = await api.message(session.id, author=author)
                assert author_of(message) == author
            attached = await api.message(session.id, author=ANN, attachments=[a_file()])
            await create_batch(
                api, session.id, [user_message("x", author=author) for author in AUTHORS]
            )
            assert (await set_metadata(api, attached.id, "{}")).author == ANN

            [page] = await batches(api, session.id)
            listed = list(page.messages)
            assert [author_of(message) for message in listed] == [*AUTHORS, ANN, *AUTHORS]
            for message in listed:
                assert await get_message(api, message.id) == message
            await watcher.until_revision(len(listed) + 1)
            await assert_same_state(api, watcher, session.id)
        async with watching(api, session.id) as watcher:
            await watcher.until("caught_up")
            await assert_same_state(api, watcher, session.id)

    async def test_list(self, api: Api) -> None:
        """Byte for byte, as the list writes the wire format itself, with redacted messages too."""
        session = await api.session()
        for author in AUTHORS:
            for fields in ({}, {"language_code": "de", "metadata_json": "{}"}):
                await api.message(session.id, author=author, **fields)
            await redact_message(api, (await api.message(session.id, author=author)).id)
        call = api.channel.unary_stream("/chat_ticket.v1.ChatMessageService/ListChatMessages")
        request = ListChatMessagesRequest(session_id=session.id).SerializeToString()
        [data] = [data async for data in call(request, metadata=[("x-tenant-id", api.tenant)])]
        response = ListChatMessagesResponse.FromString(data)
        assert response.SerializeToString() == data
        for message in response.messages:
            assert message.etag == str(message.revision)
            assert await get_message(api, message.id) == message

    async def test_messages_of_one_statement_keep_their_own(self, api: Api) -> None:
        """Messages of many callers are appended together."""
        session = await api.session()
        created = await asyncio.gather(
            *(api.message(session.id, author=author) for author in AUTHORS)
        )
        assert [author_of(message) for message in created] == AUTHORS

    async def test_empty_author_is_none(self, api: Api) -> None:
        """Neither a kind nor an id says nothing."""
        session = await api.session()
        message = await api.message(session.id, id=an_id(), author=Author())
        assert author_of(message) is None
        assert await api.message(session.id, id=message.id) == message

    async def test_role_and_kind_are_independent(self, api: Api) -> None:
        """A human agent writes as the assistant does; other pairs are accepted too."""
        session = await api.session()
        for kind in (END_USER, AI_AGENT, HUMAN_AGENT):
            message = await api.message(session.id, role=ASSISTANT, author=Author(kind=kind))
            assert (message.role, message.author.kind) == (ASSISTANT, kind)

    async def test_export(self, api: Api, database: str) -> None:
        """An export has the author; the kind by name."""
        session = await api.session()
        await api.message(session.id, author=ANN)
        await api.message(session.id)
        done = await command("export", "--tenant", api.tenant, DATABASE_URL=database)
        lines = [json.loads(line) for line in done.output.splitlines() if "chatMessage" in line]
        assert [line["chatMessage"].get("author") for line in lines] == [
            {"kind": "CHAT_MESSAGE_AUTHOR_KIND_END_USER", "id": "ann"},
            None,
        ]


class TestRepeat:
    @pytest.mark.parametrize("author", [None, ANN, Author(id="ann")])
    async def test_repeat_has_the_same_author(self, api: Api, author: Author | None) -> None:
        """A create that is repeated with another author, or without one, is another message."""
        session = await api.session()
        others = [None, ANN, Author(kind=AI_AGENT, id="ann"), Author(kind=END_USER, id="Ann"),
                  Author(kind=END_USER), Author(id="ann")]  # fmt: skip
        others.remove(author)
        stored = await api.message(session.id, id=an_id(), author=author)
        changed = await set_metadata(api, stored.id, "{}")
        assert await api.message(session.id, id=stored.id, author=author) == changed
        for other in others:
            with refused(StatusCode.ALREADY_EXISTS, "CHAT_MESSAGE_ALREADY_EXISTS"):
                await api.message(session.id, id=stored.id, author=other)

        batch = [user_message("x", id=an_id(), author=author) for _ in range(2)]
        created = await create_batch(api, session.id, batch)
        assert await create_batch(api, session.id, batch) == created
        for other in others:
            repeated = [batch[0], user_message("x", id=batch[1].id, author=other)]
            with refused(StatusCode.ALREADY_EXISTS, "CHAT_MESSAGE_ALREADY_EXISTS") as refusal:
                await create_batch(api, session.id, repeated)
            assert refusal.info.metadata["index"] == "1"

    async def test_of_two_at_once_one_is_stored(self, api: Api) -> None:
        """Creates with one id and different authors: the second is told."""
        session = await api.session()
        for _ in range(5):
            message_id = an_id()
            outcomes = await asyncio.gather(
                *(
                    api.message(session.id, id=message_id, author=author)
                    for author in (ANN, None, Author(id="bob"))
                ),
                return_exceptions=True,
            )
            [stored] = [each for each in outcomes if not isinstance(each, BaseException)]
            assert await get_message(api, message_id) == stored
        assert await get_revision(api, session.id) == 5


class TestRejected:
    async def test_invalid_authors(self, api: Api) -> None:
        """Every violation is reported, with its path. Nothing is stored."""
        session = await api.session()
        messages = [
            user_message("x", author=Author(kind=4, id="a")),  # type: ignore[arg-type]
            user_message("x", author=Author(kind=-1, id="x" * 256)),  # type: ignore[arg-type]
            user_message("x", author=Author(id="a\nb")),
            user_message("x", author=Author(id=" a")),
            user_message("x", author=Author(id="a\0b")),
            user_message("x", author=Author(id="a\u202eb")),
            user_message("x", author=Author(id="fine")),
        ]
        fields = {
            "[0].author.kind": "unknown enum value 4",
            "[1].author.kind": "unknown enum value -1",
            "[1].author.id": "256 characters, at most 255",
            "[2].author.id": "contains a control character or a line break",
            "[3].author.id": "begins or ends with a blank",
            "[4].author.id": "contains a NUL character",
            "[5].author.id": "contains an unpaired bidirectional control character",
        }
        with refused(StatusCode.INVALID_ARGUMENT) as refusal:
            await create_batch(api, session.id, messages)
        assert refusal.fields == {f"messages{path}": text for path, text in fields.items()}
        for index, message in enumerate(messages[:-1]):
            with refused(StatusCode.INVALID_ARGUMENT) as refusal:
                await api.messages.CreateChatMessage(
                    CreateChatMessageRequest(session_id=session.id, message=message)
                )
            start = f"[{index}]"
            assert refusal.fields == {
                f"message{path.removeprefix(start)}": text
                for path, text in fields.items()
                if path.startswith(start)
            }
        assert await sequences(api, session.id) == []

    async def test_invalid_author_of_a_draft(self, api: Api) -> None:
        """By the same rules. No draft begins."""
        session = await api.session()
        author = Author(kind=9, id="a\n")  # type: ignore[arg-type]
        async with unstarted(api) as stream:
            await stream.send(start=a_start(session.id, an_id(), author=author))
            with refused(StatusCode.INVALID_ARGUMENT) as refusal:
                await stream.until_error()
        assert refusal.fields == {
            "start.draft.author.kind": "unknown enum value 9",
            "start.draft.author.id": "contains a control character or a line break",
        }
        assert await list_drafts(api, session.id) == []

    @pytest.mark.parametrize("path", ["author", "author.id", "redacted", "etag"])
    async def test_update(self, api: Api, path: str) -> None:
        """The author is immutable, and what the server sets is no field to update."""
        message = await api.message((await api.session()).id, author=ANN)
        changed = r.ChatMessage(id=message.id, author=Author(id="bob"), redacted=True)
        request = UpdateChatMessageRequest(message=changed, update_mask=FieldMask(paths=[path]))
        with refused(StatusCode.INVALID_ARGUMENT) as refusal:
            await api.messages.UpdateChatMessage(request)
        assert list(refusal.fields) == ["update_mask"]
        assert await get_message(api, message.id) == message


class TestDraft:
    @pytest.mark.parametrize("author", AUTHORS)
    async def test_author_of_a_draft_is_that_of_its_message(
        self, api: Api, author: Author | None
    ) -> None:
        """The draft has it wherever it is read, and so has the message."""
        session = await api.session()
        async with (
            watching(api, session.id, include_drafts=True) as watcher,
            writing(api, session.id, author=author) as stream,
        ):
            await stream.write("x")
            draft = await get_draft(api, stream.draft_id)
            assert author_of(draft) == author
            assert await list_drafts(api, session.id) == [draft]
            assert author_of((await watcher.until("draft")).draft) == author
            message = await stream.finish()
            assert author_of(message) == author
            created = await watcher.until("messages_created")
            assert list(created.messages_created.messages) == [message]
        assert await get_message(api, message.id) == message
        assert await start_finished(api, session.id, message.id, author=author) == message

    async def test_draft_that_is_taken_over_or_stopped(self, api: Api) -> None:
        """It keeps the author that it began with."""
        session = await api.session()
        async with writing(api, session.id, author=ANN) as stream:
            await stream.write("x")
        async with writing(api, session.id, stream.draft_id, author=ANN):
            assert (await get_draft(api, stream.draft_id)).author == ANN
        assert (await stop_draft(api, stream.draft_id)).author == ANN

    async def test_message_of_a_draft_is_repeated_by_a_create(self, api: Api) -> None:
        """With the same author only, as any message."""
        session = await api.session()
        message = await write_message(api, session.id, "x", author=ANN)
        fields = {"id": message.id, "role": ASSISTANT}
        assert await api.message(session.id, "x", **fields, author=ANN) == message
        with refused(StatusCode.ALREADY_EXISTS, "CHAT_MESSAGE_ALREADY_EXISTS"):
            await api.message(session.id, "x", **fields)
