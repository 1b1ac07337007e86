"""How the draft of a client ends: by a stop, a cancellation, another writer, or failing servers."""

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from support.client_calls import NewClient, create_session_id, only_asyncio
from support.client_drafts import content_becomes, drafts_in, messages_in, outcomes_in
from support.client_servers import OPTIONS, SETTINGS, Servers
from support.process import server_process
from support.server import serving

from chat_ticket import errors
from chat_ticket.client import AsyncChatTicketClient, ChatDraftWriter, _drafts
from chat_ticket.v1 import resources_pb2 as r
from chat_ticket.v1.chat_draft_pb2 import (
    StopChatDraftRequest,
)
from chat_ticket.v1.chat_session_pb2 import DeleteChatSessionRequest

ASSISTANT = r.CHAT_MESSAGE_ROLE_ASSISTANT


class Model:
    """A model that says a word, and then nothing more."""

    def __init__(self) -> None:
        self.is_closed = False

    async def generate(self) -> AsyncIterator[str]:
        try:
            yield "Well, "
            await asyncio.Event().wait()
        finally:
            self.is_closed = True


class Call:
    """A stream of responses that can be cancelled."""

    def __init__(self, responses: Any):
        self._responses = responses

    def __aiter__(self) -> Any:
        return self._responses

    def cancel(self) -> None:
        pass


@only_asyncio
class TestEnd:
    async def test_stop_interrupts_the_model(
        self, client: AsyncChatTicketClient, server: Any, connect: NewClient
    ) -> None:
        """Although it is silent. What is appended afterwards is nowhere."""
        session_id = await create_session_id(client)
        model, other = Model(), connect(server.port)
        async with client.write(session_id, role=ASSISTANT) as draft, asyncio.timeout(10):
            async for words in draft.until_stopped(model.generate()):
                await draft.append(words)
                await content_becomes(client, session_id, "Well, ")
                request = StopChatDraftRequest(draft_id=draft.id)
                stopped = (await other.drafts.StopChatDraft(request)).message
            assert model.is_closed
            assert draft.stopped
            await draft.append("never mind")
            assert await draft.finish() == stopped
        assert draft.message == stopped
        assert (stopped.content, stopped.state) == ("Well, ", r.CHAT_MESSAGE_STATE_STOPPED)

    async def test_model_that_ends_ends_the_loop(self, client: AsyncChatTicketClient) -> None:
        """And its own errors are raised, a TimeoutError too."""

        async def fails() -> AsyncIterator[str]:
            yield "a"
            raise TimeoutError("of the model")

        async def ends() -> AsyncIterator[str]:
            yield "a"
            yield "b"

        async def answer(model: AsyncIterator[str]) -> None:
            async with client.write(session_id, role=ASSISTANT) as draft:
                async for words in draft.until_stopped(model):
                    await draft.append(words)

        session_id = await create_session_id(client)
        with pytest.raises(TimeoutError, match="of the model"):
            await answer(fails())
        await answer(ends())
        assert await outcomes_in(client, session_id) == [
            ("a", r.CHAT_MESSAGE_STATE_INCOMPLETE),
            ("ab", r.CHAT_MESSAGE_STATE_COMPLETE),
        ]

    async def test_cancelled_writer_leaves_an_incomplete_message(
        self, client: AsyncChatTicketClient
    ) -> None:
        """With all that it has appended, and the cancellation goes on."""
        session_id = await create_session_id(client)
        appended = asyncio.Event()

        async def answer() -> None:
            async with client.write(session_id, role=ASSISTANT) as draft:
                await draft.append("Well, ")
                await draft.append("let me think")
                appended.set()
                await asyncio.Event().wait()

        task = asyncio.create_task(answer())
        await appended.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await outcomes_in(client, session_id) == [
            ("Well, let me think", r.CHAT_MESSAGE_STATE_INCOMPLETE)
        ]

    @pytest.mark.parametrize("finishing", [False, True])
    async def test_cancelled_writer_does_not_wait_long_for_a_server_that_is_gone(
        self,
        database: str,
        connect: NewClient,
        monkeypatch: pytest.MonkeyPatch,
        finishing: bool,
    ) -> None:
        """The server finishes the draft by itself, when it is back."""
        monkeypatch.setattr(_drafts, "LEAVE_SECONDS", 0.3)
        async with serving(database) as other:
            elsewhere = connect(other.port)
            session_id = await create_session_id(elsewhere)
            with server_process(database, **SETTINGS) as server:
                await asyncio.to_thread(server.wait_for, "serving")
                client = connect(int(server.address.rpartition(":")[2]))
                opened = asyncio.Event()

                async def answer() -> None:
                    async with client.write(session_id, role=ASSISTANT) as draft:
                        await draft.append("Well, ")
                        await content_becomes(elsewhere, session_id, "Well, ")
                        opened.set()
                        if not finishing:
                            await asyncio.Event().wait()
                        await asyncio.sleep(0.5)

                task = asyncio.create_task(answer())
                await opened.wait()
                server.popen.kill()
                await asyncio.sleep(1)
                task.cancel()
                await asyncio.wait({task}, timeout=2)
                assert task.cancelled()
            assert await drafts_in(elsewhere, session_id) == ["Well, "]

    async def test_deleted_session_ends_the_writer(self, client: AsyncChatTicketClient) -> None:
        """Even while the model is silent."""
        session_id = await create_session_id(client)
        model = Model()

        async def answer() -> None:
            async with client.write(session_id, role=ASSISTANT) as draft:
                async for words in draft.until_stopped(model.generate()):
                    await draft.append(words)
                    await content_becomes(client, session_id, "Well, ")
                    request = DeleteChatSessionRequest(session_id=session_id)
                    await client.sessions.DeleteChatSession(request)

        async with asyncio.timeout(10):
            with pytest.raises(errors.NotFoundError):
                await answer()
        assert model.is_closed

    async def test_closed_client_ends_the_writer(self, server: Any, connect: NewClient) -> None:
        """As it ends every other call."""
        client = connect(server.port)
        session_id = await create_session_id(client)

        async def answer() -> None:
            async with client.write(session_id, role=ASSISTANT) as draft:
                async for _ in draft.until_stopped(Model().generate()):
                    await client.close()

        async with asyncio.timeout(10):
            with pytest.raises(errors.CallCancelledError, match="the client is closed"):
                await answer()


@only_asyncio
class TestTakeover:
    async def test_other_writer_goes_on_from_what_is_durable(
        self, client: AsyncChatTicketClient
    ) -> None:
        """And the first hears of it, even while its model is silent."""
        session_id = await create_session_id(client)
        model = Model()
        first = client.write(session_id, role=ASSISTANT)

        async def answer() -> None:
            async with first:
                async for words in first.until_stopped(model.generate()):
                    await first.append(words)

        task = asyncio.create_task(answer())
        await content_becomes(client, session_id, "Well, ")
        async with client.write(session_id, role=ASSISTANT, draft_id=first.id) as second:
            async with asyncio.timeout(10):
                with pytest.raises(errors.AbortedError, match="DRAFT_TAKEN_OVER"):
                    await task
            assert model.is_closed
            assert not first.stopped
            assert second.length == len("Well, ")
            await second.append("here I am")
        assert await messages_in(client, session_id) == [second.message]
        assert await outcomes_in(client, session_id) == [
            ("Well, here I am", r.CHAT_MESSAGE_STATE_COMPLETE)
        ]

    async def test_finished_draft_is_not_written_again(self, client: AsyncChatTicketClient) -> None:
        """Its message is there from the beginning of the block, in which there is nothing to do."""
        session_id = await create_session_id(client)
        async with client.write(session_id, role=ASSISTANT) as first:
            await first.append("once")
        async with client.write(session_id, role=ASSISTANT, draft_id=first.id) as second:
            assert second.stopped
            async for _ in second.until_stopped(Model().generate()):
                pytest.fail("it is not to be asked")
            await second.append("twice")
        assert second.message == first.message
        assert await messages_in(client, session_id) == [first.message]


@only_asyncio
class TestResume:
    async def test_lost_answer_of_finish_is_found_out(self, client: AsyncChatTicketClient) -> None:
        """The message is there once, and the writer has it."""
        session_id = await create_session_id(client)
        write: Any = client.drafts.WriteChatDraft
        lost = []

        async def losing(requests: Any) -> Any:
            async for response in write(requests):
                if response.HasField("finished") and not lost:
                    lost.append(response)
                    raise errors.UnavailableError(grpc.StatusCode.UNAVAILABLE, "Socket closed")
                yield response

        client.drafts.WriteChatDraft = lambda requests: Call(losing(requests))  # type: ignore[assignment]
        async with client.write(session_id, role=ASSISTANT) as draft:
            await draft.append("once")
        assert len(lost) == 1
        assert (draft.stopped, draft.message) == (False, lost[0].finished.message)
        assert await messages_in(client, session_id) == [draft.message]

    async def test_nothing_is_lost_or_doubled_while_servers_fail(
        self,
        fresh_database: str,
        tenant: str,
        client_class: type[AsyncChatTicketClient],
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        """Killed, drained, and all gone at once; the drafts go on on the other server."""
        caplog.set_level("INFO", "chat_ticket.client")

        async def answer(number: int) -> ChatDraftWriter:
            async with client.write(session_id, role=ASSISTANT) as draft:
                while not done:
                    word = f"{number}: {draft.length} é\n"
                    written[number].append(word)
                    await draft.append(word)
                    await asyncio.sleep(0.003)
            return draft

        with contextlib.ExitStack() as stack:
            servers = await asyncio.to_thread(Servers, fresh_database, stack)
            await servers.serving()
            async with client_class(servers.target, tenant=tenant, options=OPTIONS) as client:
                session_id = await create_session_id(client)
                done, written = [], [[], [], [], []]  # type: ignore[var-annotated]
                answers = [asyncio.create_task(answer(number)) for number in range(4)]
                await asyncio.sleep(0.3)
                await servers.restart(signal.SIGKILL, 0)
                await servers.restart(signal.SIGTERM, 1)
                await servers.restart(signal.SIGKILL, 0, 1)
                await asyncio.sleep(0.3)
                done.append(True)
                async with asyncio.timeout(30):
                    drafts = await asyncio.gather(*answers)
                stored = {m.id: m for m in await messages_in(client, session_id)}
        assert len(stored) == 4
        for draft, words in zip(drafts, written, strict=True):
            assert stored[draft.id] == draft.message
            assert stored[draft.id].content == "".join(words)
            assert stored[draft.id].state == r.CHAT_MESSAGE_STATE_COMPLETE
        assert "DRAINING" in caplog.text
        assert caplog.text.count("resumes after length") >= 4

    async def test_error_is_raised_when_no_server_comes_back(
        self, database: str, connect: NewClient
    ) -> None:
        """After the time that it was given."""
        with server_process(database, **SETTINGS) as server:
            await asyncio.to_thread(server.wait_for, "serving")
            client = connect(int(server.address.rpartition(":")[2]))
            session_id = await create_session_id(client)

            async def answer() -> None:
                async with client.write(session_id, role=ASSISTANT, timeout=1) as draft:
                    server.popen.kill()
                    async for words in draft.until_stopped(Model().generate()):
                        await draft.append(words)

            async with asyncio.timeout(10):
                with pytest.raises(errors.UnavailableError):
                    await answer()
