"""`write` of the asyncio client, a draft that is written over any number of streams; the stub."""

import asyncio
import signal
from collections.abc import AsyncIterator
from typing import Any

import pytest
from support.client import a_file, an_id
from support.client_calls import NewClient, create_session_id, only_asyncio
from support.client_drafts import content_becomes, drafts_in, messages_in, outcomes_in
from support.client_servers import SETTINGS
from support.process import server_process
from support.server import serving

from chat_ticket import errors
from chat_ticket.client import AsyncChatTicketClient, _drafts
from chat_ticket.v1 import resources_pb2 as r
from chat_ticket.v1.chat_draft_pb2 import (
    WriteChatDraftRequest,
)

ASSISTANT = r.CHAT_MESSAGE_ROLE_ASSISTANT
WORDS = [f"word-{number} ü " for number in range(200)]


def recorded(client: AsyncChatTicketClient) -> list[WriteChatDraftRequest]:
    """The requests that the client sends to write drafts, from now on."""
    requests: list[WriteChatDraftRequest] = []
    write: Any = client.drafts.WriteChatDraft

    async def passed(given: AsyncIterator[WriteChatDraftRequest]) -> Any:
        async for request in given:
            requests.append(request)
            yield request

    client.drafts.WriteChatDraft = lambda given: write(passed(given))  # type: ignore[assignment]
    return requests


class TestStub:
    async def test_stream_of_requests_has_the_metadata_and_typed_errors(
        self, client: AsyncChatTicketClient
    ) -> None:
        """Of the synchronous client too, which has no writer."""

        def requests(session_id: str) -> list[WriteChatDraftRequest]:
            draft = r.ChatDraft(id=an_id(), role=ASSISTANT)
            return [
                WriteChatDraftRequest(start={"session_id": session_id, "draft": draft}),
                WriteChatDraftRequest(append={"text": "hello"}),
                WriteChatDraftRequest(finish={}),
            ]

        async def write(session_id: str) -> list[str | None]:
            call: Any = client.drafts.WriteChatDraft(iter(requests(session_id)))
            return [response.WhichOneof("response") async for response in call]

        session_id = await create_session_id(client)
        kinds = await write(session_id)
        assert (kinds[0], kinds[-1]) == ("started", "finished")
        assert await outcomes_in(client, session_id) == [("hello", r.CHAT_MESSAGE_STATE_COMPLETE)]
        with pytest.raises(errors.NotFoundError):
            await write(an_id())


@only_asyncio
class TestWrite:
    async def test_writes_a_message_with_the_id_of_the_draft(
        self, client: AsyncChatTicketClient
    ) -> None:
        """It is a draft while it is written, and an ordinary message then."""
        session_id = await create_session_id(client)
        author = r.ChatMessageAuthor(kind=r.CHAT_MESSAGE_AUTHOR_KIND_AI_AGENT, id="agent-1")
        async with client.write(
            session_id,
            role=ASSISTANT,
            author=author,
            metadata={"model": "none"},
            language_code="de",
        ) as draft:
            assert (draft.length, draft.message, draft.stopped) == (0, None, False)
            for word in ("Für ", "", "Elise"):
                await draft.append(word)
            assert draft.length == len("Für Elise".encode())
            await content_becomes(client, session_id, "Für Elise")
            assert await messages_in(client, session_id) == []
        assert await messages_in(client, session_id) == [draft.message]
        assert draft.message is not None
        assert (draft.message.id, draft.message.content) == (draft.id, "Für Elise")
        assert (draft.message.role, draft.message.language_code) == (ASSISTANT, "de")
        assert draft.message.author == author
        assert draft.message.metadata_json == '{"model": "none"}'
        assert draft.message.state == r.CHAT_MESSAGE_STATE_COMPLETE
        assert await drafts_in(client, session_id) == []

    async def test_finish_adds_metadata_and_attachments(
        self, client: AsyncChatTicketClient
    ) -> None:
        """And returns the message. Leaving the block does nothing more."""
        session_id = await create_session_id(client)
        file = a_file(id=an_id())
        async with client.write(session_id, role=ASSISTANT, metadata={"a": 1}) as draft:
            await draft.append("See below.")
            message = await draft.finish(metadata={"tokens": 3}, attachments=[file])
            with pytest.raises(RuntimeError, match="finished"):
                await draft.append("more")
        assert message is not None
        assert message.metadata_json == '{"tokens": 3}'
        assert [attachment.id for attachment in message.attachments] == [file.id]
        assert await messages_in(client, session_id) == [message] == [draft.message]

    async def test_empty_draft_leaves_nothing(self, client: AsyncChatTicketClient) -> None:
        """Neither a message nor a draft."""
        session_id = await create_session_id(client)
        async with client.write(session_id, role=ASSISTANT) as draft:
            pass
        assert (draft.message, draft.stopped) == (None, False)
        assert await messages_in(client, session_id) == []
        assert await drafts_in(client, session_id) == []

    async def test_refused_start_does_not_enter_the_block(
        self, client: AsyncChatTicketClient
    ) -> None:
        """The error names the draft that is open, or says why else."""
        session_id = await create_session_id(client)
        async with client.write(session_id, role=ASSISTANT, exclusive=True) as draft:
            with pytest.raises(errors.AlreadyExistsError) as open_already:
                await client.write(session_id, role=ASSISTANT, exclusive=True).__aenter__()
        assert open_already.value.reason == "DRAFT_OPEN"
        assert open_already.value.resource == errors.Resource("chat_draft", draft.id)
        with pytest.raises(errors.AbortedError, match="ETAG_MISMATCH"):
            await client.write(session_id, role=ASSISTANT, expected_revision=7).__aenter__()
        with pytest.raises(errors.NotFoundError):
            await client.write(an_id(), role=ASSISTANT).__aenter__()

    async def test_refused_attachments_can_be_left_out(self, client: AsyncChatTicketClient) -> None:
        """The draft is open still. Who does not handle the error leaves it INCOMPLETE."""
        session_id = await create_session_id(client)
        wrong = r.ChatAttachment(file_url="not a URL", file_name="a", file_type="text/plain")
        async with client.write(session_id, role=ASSISTANT) as draft:
            await draft.append("With a file")
            with pytest.raises(errors.InvalidArgumentError):
                await draft.finish(attachments=[wrong])
            await draft.finish()

        async def answer() -> None:
            async with client.write(session_id, role=ASSISTANT) as draft:
                await draft.append("With another")
                await draft.finish(attachments=[wrong])

        with pytest.raises(errors.InvalidArgumentError):
            await answer()
        assert await outcomes_in(client, session_id) == [
            ("With a file", r.CHAT_MESSAGE_STATE_COMPLETE),
            ("With another", r.CHAT_MESSAGE_STATE_INCOMPLETE),
        ]

    async def test_refused_text_ends_the_draft_with_what_was_before(
        self, client: AsyncChatTicketClient
    ) -> None:
        """At once, and not only when the server misses the writer."""
        session_id = await create_session_id(client)
        draft = client.write(session_id, role=ASSISTANT)

        async def answer() -> None:
            async with draft:
                await draft.append("Good. ")
                await content_becomes(client, session_id, "Good. ")
                await draft.append("Bad: \0")
                await draft.finish()

        with pytest.raises(errors.InvalidArgumentError, match="NUL"):
            await answer()
        assert await messages_in(client, session_id) == [draft.message]
        assert await outcomes_in(client, session_id) == [
            ("Good. ", r.CHAT_MESSAGE_STATE_INCOMPLETE)
        ]


@only_asyncio
class TestPace:
    async def test_first_text_goes_at_once_and_what_follows_together(
        self, client: AsyncChatTicketClient, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Within a time that is made long here."""
        monkeypatch.setattr(_drafts, "COALESCE_SECONDS", 60)
        session_id = await create_session_id(client)
        requests = recorded(client)
        async with client.write(session_id, role=ASSISTANT) as draft:
            await draft.append("first ")
            await content_becomes(client, session_id, "first ")
            for word in WORDS:
                await draft.append(word)
                await asyncio.sleep(0)
            assert await drafts_in(client, session_id) == ["first "]
        texts = [request.append.text for request in requests if request.HasField("append")]
        assert texts == ["first ", "".join(WORDS)]
        assert draft.message is not None
        assert draft.message.content == "".join(texts)

    async def test_writer_waits_while_much_is_not_acknowledged(
        self, database: str, connect: NewClient
    ) -> None:
        """It goes on when the server does."""
        with server_process(database, **SETTINGS) as server:
            await asyncio.to_thread(server.wait_for, "serving")
            client = connect(int(server.address.rpartition(":")[2]))
            session_id = await create_session_id(client)
            async with client.write(session_id, role=ASSISTANT) as draft:
                server.popen.send_signal(signal.SIGSTOP)
                try:
                    async with asyncio.timeout(1):
                        await draft.append("x" * 40_000)
                    waiting = asyncio.create_task(draft.append("y" * 40_000))
                    await asyncio.sleep(0.5)
                    assert not waiting.done()
                finally:
                    server.popen.send_signal(signal.SIGCONT)
                async with asyncio.timeout(10):
                    await waiting
        assert draft.message is not None
        assert draft.message.content == "x" * 40_000 + "y" * 40_000

    @pytest.mark.parametrize("keep_alive", [0.2, 60])
    async def test_silent_writer_is_not_lost_while_it_shows_that_it_is_alive(
        self, database: str, connect: NewClient, monkeypatch: pytest.MonkeyPatch, keep_alive: float
    ) -> None:
        """Every 20 seconds. If it does not, it is stopped."""
        monkeypatch.setattr(_drafts, "KEEP_ALIVE_SECONDS", keep_alive)
        async with serving(database, draft_seconds=1) as server:
            client = connect(server.port)
            session_id = await create_session_id(client)
            async with client.write(session_id, role=ASSISTANT) as draft:
                await draft.append("Let me think")
                await asyncio.sleep(3)
                assert draft.stopped == (keep_alive > 1)
        assert draft.message is not None
        assert draft.message.state == (
            r.CHAT_MESSAGE_STATE_INCOMPLETE if keep_alive > 1 else r.CHAT_MESSAGE_STATE_COMPLETE
        )

    async def test_silent_model_is_not_a_silent_server(
        self, client: AsyncChatTicketClient, monkeypatch: pytest.MonkeyPatch, caplog: Any
    ) -> None:
        """The server answers each sign of life, so that the stream is not taken for a dead one."""
        caplog.set_level("INFO", "chat_ticket.client")
        monkeypatch.setattr(_drafts, "KEEP_ALIVE_SECONDS", 0.2)
        monkeypatch.setattr("chat_ticket.client._async.SILENCE_SECONDS", 1.5)
        session_id = await create_session_id(client)
        async with client.write(session_id, role=ASSISTANT) as draft:
            await draft.append("Let me think")
            await asyncio.sleep(3)
        assert draft.message is not None
        assert caplog.text == ""
