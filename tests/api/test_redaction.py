"""Redaction: what a message said is gone, and its place stays."""

from typing import Any

import psycopg
import pytest
from grpc import StatusCode
from support.attachments import get_attachment, list_all_attachments
from support.client import Api, a_file, an_id, refused
from support.drafts import leave_draft, start_finished, write_message
from support.messages import (
    batches,
    create_batch,
    delete_message,
    get_message,
    redact_message,
    set_metadata,
    user_message,
)
from support.process import command
from support.search import every_page
from support.sessions import get_revision, get_session
from support.watching import assert_same_state, watching

from chat_ticket.v1 import resources_pb2 as r
from chat_ticket_svc.store import search as search_store

MARK = "[redacted]"
AUTHOR = r.ChatMessageAuthor(kind=r.CHAT_MESSAGE_AUTHOR_KIND_END_USER, id="ann")
FULL: dict[str, Any] = {
    "content": "my card is 4111 1111",
    "metadata_json": '{"card": "4111 1111"}',
    "language_code": "en",
    "author": AUTHOR,
}


async def full_message(api: Api, session_id: str, **fields: Any) -> r.ChatMessage:
    """A message with all that a redaction removes."""
    attachments = [a_file(file_name="card.png"), a_file()]
    return await api.message(session_id, **{**FULL, "attachments": attachments, **fields})


class TestMessage:
    async def test_loses_what_it_says_and_keeps_its_place(self, api: Api) -> None:
        """The content becomes a mark; metadata and attachments are gone; all else stays."""
        session = await api.session()
        message = await full_message(api, session.id)
        redacted = await redact_message(api, message.id)
        expected = r.ChatMessage()
        expected.CopyFrom(message)
        expected.content = MARK
        expected.metadata_json = ""
        expected.redacted = True
        expected.revision = 2
        expected.etag = "2"
        del expected.attachments[:]
        assert redacted == expected
        assert await get_message(api, message.id) == expected
        [page] = await batches(api, session.id)
        assert list(page.messages) == [expected]

    async def test_takes_one_revision(self, api: Api) -> None:
        """Of the session, whose time of change is later; to redact again is not a change."""
        session = await api.session()
        message = await full_message(api, session.id)
        before = await get_session(api, session.id)
        redacted = await redact_message(api, message.id)
        changed = await get_session(api, session.id)
        assert changed.revision == redacted.revision == 2
        assert before.update_time.ToNanoseconds() < changed.update_time.ToNanoseconds()
        for etag in ("", "1", "2"):
            assert await redact_message(api, message.id, etag) == redacted
        assert await get_session(api, session.id) == changed

    async def test_others_stay(self, api: Api) -> None:
        """No other message of the session changes, and no other attachment."""
        session = await api.session()
        messages = [await full_message(api, session.id) for _ in range(3)]
        await redact_message(api, messages[1].id)
        [page] = await batches(api, session.id)
        assert [page.messages[0], page.messages[2]] == [messages[0], messages[2]]
        attachments = await list_all_attachments(api, session_id=session.id)
        assert attachments == [*messages[0].attachments, *messages[2].attachments]

    async def test_attachments_are_gone(self, api: Api) -> None:
        """By their ids too."""
        message = await full_message(api, (await api.session()).id)
        await redact_message(api, message.id)
        assert await list_all_attachments(api, message_id=message.id) == []
        for attachment in message.attachments:
            with refused(StatusCode.NOT_FOUND, "CHAT_ATTACHMENT_NOT_FOUND"):
                await get_attachment(api, attachment.id)

    async def test_nothing_of_it_is_in_the_tables(self, api: Api, database: str) -> None:
        """No row of the session has its words."""
        session = await api.session()
        message = await full_message(api, session.id)
        await redact_message(api, message.id)
        async with await psycopg.AsyncConnection.connect(database) as connection:
            for table in ("chat_messages", "chat_attachments", "chat_draft_pieces"):
                rows = await connection.execute(
                    f"SELECT count(*) FROM {table} t WHERE tenant_id = %s AND t::text ~ %s",
                    [api.tenant, "4111 1111|card"],
                )
                assert await rows.fetchone() == (0,)

    async def test_message_of_a_draft(self, api: Api) -> None:
        """It is redacted like any other, and keeps its state."""
        session = await api.session()
        message = await write_message(api, session.id, "secret", author=AUTHOR)
        redacted = await redact_message(api, message.id)
        assert (redacted.content, redacted.author, redacted.state) == (
            MARK, AUTHOR, message.state,
        )  # fmt: skip
        assert await start_finished(api, session.id, message.id, author=AUTHOR) == redacted

    async def test_can_be_deleted(self, api: Api) -> None:
        """As every message."""
        message = await full_message(api, (await api.session()).id)
        await redact_message(api, message.id)
        await delete_message(api, message.id)
        with refused(StatusCode.NOT_FOUND, "CHAT_MESSAGE_NOT_FOUND"):
            await redact_message(api, message.id)

    async def test_content_that_looks_like_the_mark(self, api: Api) -> None:
        """The mark as content is only text: such a message is not redacted."""
        message = await api.message((await api.session()).id, MARK)
        assert not message.redacted
        assert (await set_metadata(api, message.id, "{}")).metadata_json == "{}"
        assert (await redact_message(api, message.id)).redacted

    async def test_request_does_not_redact(self, api: Api) -> None:
        """`redacted` and `etag` are ignored in a create."""
        message = await api.message((await api.session()).id, redacted=True, etag="9")
        assert (message.redacted, message.etag) == (False, "1")

    async def test_export(self, api: Api, database: str) -> None:
        """An export has the mark, and none of the words."""
        message = await full_message(api, (await api.session()).id)
        await redact_message(api, message.id)
        done = await command("export", "--tenant", api.tenant, DATABASE_URL=database)
        assert f'"content":"{MARK}"' in done.output
        assert '"redacted":true' in done.output
        assert "4111 1111" not in done.output
        assert "card" not in done.output


class TestRefusal:
    @pytest.mark.parametrize(
        ("message_id", "etag", "fields"),
        [
            ("", "", {"message_id": "required"}),
            ("?", "x", {"message_id": "not a UUID", "etag": "not an etag of this service"}),
        ],
    )
    async def test_bad_request(
        self, api: Api, message_id: str, etag: str, fields: dict[str, str]
    ) -> None:
        """Every violation is named."""
        with refused(StatusCode.INVALID_ARGUMENT) as refusal:
            await redact_message(api, message_id, etag)
        assert refusal.fields == fields

    async def test_message_that_does_not_exist(self, api: Api, other: Api) -> None:
        """None has the id, or it is another tenant's, which stays as it is."""
        with refused(StatusCode.NOT_FOUND, "CHAT_MESSAGE_NOT_FOUND"):
            await redact_message(api, an_id())
        message = await full_message(other, (await other.session()).id)
        with refused(StatusCode.NOT_FOUND, "CHAT_MESSAGE_NOT_FOUND"):
            await redact_message(api, message.id)
        assert await get_message(other, message.id) == message

    async def test_open_draft(self, api: Api) -> None:
        """A draft is not a message yet."""
        session = await api.session()
        draft_id = await leave_draft(api, session.id, "secret")
        with refused(StatusCode.NOT_FOUND, "CHAT_MESSAGE_NOT_FOUND"):
            await redact_message(api, draft_id)

    async def test_etag_of_before(self, api: Api) -> None:
        """The error has the revision of the message. Nothing is done."""
        session = await api.session()
        message = await full_message(api, session.id)
        changed = await set_metadata(api, message.id, "{}")
        await api.message(session.id)
        with refused(StatusCode.ABORTED, "ETAG_MISMATCH") as refusal:
            await redact_message(api, message.id, message.etag)
        assert dict(refusal.info.metadata) == {"revision": "2"}
        assert refusal.text == "the message is at revision 2, not 1"
        assert await get_message(api, message.id) == changed
        assert await get_revision(api, session.id) == 3
        assert (await redact_message(api, message.id, changed.etag)).redacted

    @pytest.mark.parametrize("metadata", ['{"a": 1}', "{}", ""])
    async def test_metadata_of_a_redacted_message(self, api: Api, metadata: str) -> None:
        """It takes none, and to remove what is gone is refused too."""
        session = await api.session()
        message = await full_message(api, session.id)
        redacted = await redact_message(api, message.id)
        with refused(StatusCode.FAILED_PRECONDITION, "CHAT_MESSAGE_REDACTED") as refusal:
            await set_metadata(api, message.id, metadata)
        [violation] = refusal.details["PreconditionFailure"].violations
        assert violation.subject == f"chat_messages/{message.id}"
        assert await get_message(api, message.id) == redacted
        assert await get_revision(api, session.id) == 2

    async def test_attachment_of_a_redacted_message(self, api: Api) -> None:
        """It takes none: not a new one, and not one that it had."""
        session = await api.session()
        message = await full_message(api, session.id)
        await redact_message(api, message.id)
        for attachment_id in ("", message.attachments[0].id):
            with refused(StatusCode.FAILED_PRECONDITION, "CHAT_MESSAGE_REDACTED"):
                await api.attachment(message.id, id=attachment_id)
        assert (await get_message(api, message.id)).attachments == []
        assert await get_revision(api, session.id) == 2


class TestRepeat:
    @pytest.mark.parametrize("count", [1, 2])
    async def test_create_returns_the_redacted_message(self, api: Api, count: int) -> None:
        """Its content is not compared, as it is gone: no late repeat brings it back."""
        session = await api.session()
        new = [
            user_message(f"secret {n}", id=an_id(), metadata_json="{}", attachments=[a_file()])
            for n in range(count)
        ]
        created = await create_batch(api, session.id, new)
        redacted = await redact_message(api, new[0].id)
        for content in ("secret 0", "other"):
            new[0].content = content
            assert await create_batch(api, session.id, new) == created
        assert await get_message(api, new[0].id) == redacted

    async def test_single_create_returns_the_redacted_message(self, api: Api) -> None:
        """As a batch does."""
        session = await api.session()
        message = await full_message(api, session.id, id=an_id())
        redacted = await redact_message(api, message.id)
        assert await full_message(api, session.id, id=message.id) == redacted
        assert await get_revision(api, session.id) == 2

    @pytest.mark.parametrize(
        "fields",
        [
            {"role": r.CHAT_MESSAGE_ROLE_ASSISTANT},
            {"language_code": "de"},
            {"author": None},
            {"author": r.ChatMessageAuthor(kind=AUTHOR.kind, id="bob")},
        ],
        ids=["role", "language", "no author", "other author"],
    )
    async def test_other_message_is_refused(self, api: Api, fields: dict[str, Any]) -> None:
        """What a redaction keeps is compared."""
        session = await api.session()
        message = await full_message(api, session.id, id=an_id())
        await redact_message(api, message.id)
        with refused(StatusCode.ALREADY_EXISTS, "CHAT_MESSAGE_ALREADY_EXISTS"):
            await full_message(api, session.id, id=message.id, **fields)
        with refused(StatusCode.ALREADY_EXISTS, "CHAT_MESSAGE_ALREADY_EXISTS"):
            await full_message(api, (await api.session()).id, id=message.id)


class TestWatch:
    async def test_followers_receive_the_message_again(self, api: Api) -> None:
        """At the revision of the redaction."""
        session = await api.session()
        message = await full_message(api, session.id)
        async with watching(api, session.id) as watcher:
            await watcher.until("caught_up")
            redacted = await redact_message(api, message.id)
            event = await watcher.until("message_updated")
            assert event.message_updated == redacted
            assert event.revision == 2
            await assert_same_state(api, watcher, session.id)

    async def test_late_follower_sees_nothing_else(self, api: Api) -> None:
        """From the beginning or from the revision before: only the redacted message comes."""
        session = await api.session()
        message = await full_message(api, session.id)
        redacted = await redact_message(api, message.id)
        async with watching(api, session.id) as watcher:
            await watcher.until("caught_up")
            assert watcher.messages == {message.id: redacted}
        async with watching(api, session.id, after=1) as watcher:
            watcher.messages[message.id] = message
            await watcher.until("caught_up")
            assert watcher.messages == {message.id: redacted}

    async def test_redaction_on_another_server(self, two_clients: tuple[Api, Api]) -> None:
        """A notification tells the followers of every server."""
        one, two = two_clients
        session = await one.session()
        message = await full_message(one, session.id)
        async with watching(one, session.id) as watcher:
            await watcher.until("caught_up")
            redacted = await redact_message(two, message.id)
            assert (await watcher.until("message_updated")).message_updated == redacted


class TestSearch:
    @pytest.mark.parametrize("query", ["kumquat", "redacted", '"[redacted]"', "kum*", "-kumquat"])
    async def test_redacted_message_is_not_found(self, api: Api, query: str) -> None:
        """Not by its old words, and not by the mark; in all sessions and in its own."""
        session = await api.session()
        message = await api.message(session.id, "a kumquat redacted")
        await redact_message(api, message.id)
        other = await api.message(session.id, "[redacted] kumquat")
        expected = [] if query == "-kumquat" else [other.id]
        for filters in ({}, {"session_id": session.id}):
            hits, incomplete = await every_page(api, query, **filters)
            assert ([hit.message_id for hit in hits], incomplete) == (expected, False)

    async def test_mark_hides_no_words_of_others(
        self, api: Api, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """However many marks there are: the words of others are found as before."""
        monkeypatch.setattr(search_store, "MAX_MESSAGES", 5)
        session = await api.session()
        found = await api.message(session.id, "it was redacted")
        for _ in range(8):
            await redact_message(api, (await api.message(session.id)).id)
        hits, incomplete = await every_page(api, "redacted")
        assert ([hit.message_id for hit in hits], incomplete) == ([found.id], False)

    async def test_incomplete_search_finds_none_either(
        self, api: Api, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Whichever way it looked for them."""
        monkeypatch.setattr(search_store, "MAX_MESSAGES", 5)
        session = await api.session()
        messages = [await api.message(session.id, "kumquat") for _ in range(18)]
        for message in messages[::2]:
            await redact_message(api, message.id)
        for query in ("kumquat", "redacted", "kumquat or redacted"):
            hits, incomplete = await every_page(api, query)
            assert incomplete == ("kumquat" in query)
            assert bool(hits) == ("kumquat" in query)
            assert {hit.message_id for hit in hits} <= {message.id for message in messages[1::2]}
            assert "redacted" not in "".join(part.text for hit in hits for part in hit.snippet)
