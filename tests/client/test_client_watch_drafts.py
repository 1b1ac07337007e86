"""`watch` with `include_drafts`: what the caller has of each draft stays right over breaks."""

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator
from typing import Any

from support.client import an_id
from support.client_calls import NewClient, create_session_id, event_kind
from support.client_servers import OPTIONS, Servers, free_port
from support.server import serving

from chat_ticket.client import AsyncChatTicketClient
from chat_ticket.v1 import resources_pb2 as r
from chat_ticket.v1.chat_draft_pb2 import StopChatDraftRequest, WriteChatDraftRequest
from chat_ticket.v1.chat_session_pb2 import DeleteChatSessionRequest, WatchChatSessionResponse

ASSISTANT = r.CHAT_MESSAGE_ROLE_ASSISTANT
# What the tests are about. The others depend on when a server stops.
KINDS = {"draft", "draft_appended", "draft_ended", "messages_created", "session_deleted"}


class Follower:
    """Follows a session, and checks each event against what it has of each draft."""

    def __init__(self, client: AsyncChatTicketClient, session_id: str):
        self.events: list[tuple[str, str]] = []
        """The kinds, and the text or the id that came with each."""
        self.drafts: dict[str, str] = {}
        self.messages: dict[str, r.ChatMessage] = {}
        self.ended: dict[str, str] = {}
        """The drafts that are open no more, and what was shown of them."""
        self._watch = client.watch(session_id, include_drafts=True, silence_seconds=2)
        self._last_ended = ""

    async def read(self) -> str:
        """Take in an event, and return its kind."""
        event = await anext(self._watch)
        kind = event_kind(event)
        if kind in KINDS:
            self._take(kind, event)
        return kind

    async def read_until(self, last: str, count: int = 1) -> None:
        """Take in events until `count` of a kind have come."""
        async with asyncio.timeout(20):
            while count:
                count -= await self.read() == last

    def _take(self, kind: str, event: WatchChatSessionResponse) -> None:
        said = ""
        match kind:
            case "draft":
                said = event.draft.content
                assert event.draft.id not in self.drafts.keys() | self.ended.keys()
                assert len(said.encode()) == event.draft.length
                self.drafts[event.draft.id] = said
            case "draft_appended":
                appended, said = event.draft_appended, event.draft_appended.text
                assert appended.offset == len(self.drafts[appended.draft_id].encode())
                self.drafts[appended.draft_id] += said
            case "draft_ended":
                said = event.draft_ended.draft_id
                assert said not in self.messages
                self.ended[said] = self.drafts.pop(said)
            case "messages_created":
                for message in event.messages_created.messages:
                    assert message.id not in self.drafts
                    self.messages[message.id] = message
                    said += message.content
        self.events.append((kind, said))

    async def close(self) -> None:
        await self._watch.aclose()


class Draft:
    """A draft that is written by one stream for each text, as by writers that come and go."""

    def __init__(self, client: AsyncChatTicketClient, session_id: str):
        self.id = an_id()
        self._client = client
        self._session_id = session_id

    async def append(self, text: str = "") -> None:
        """Returns when the text is durable."""
        draft = r.ChatDraft(id=self.id, role=ASSISTANT)
        start = WriteChatDraftRequest.Start(session_id=self._session_id, draft=draft)
        begun = asyncio.get_running_loop().create_future()

        async def requests() -> AsyncIterator[WriteChatDraftRequest]:
            yield WriteChatDraftRequest(start=start)
            append = WriteChatDraftRequest.Append(offset=await begun, text=text)
            yield WriteChatDraftRequest(append=append)
            await asyncio.Event().wait()

        call: Any = self._client.drafts.WriteChatDraft(requests())
        async for response in call:
            if response.HasField("started"):
                begun.set_result(response.started.length)
            else:
                break
        call.cancel()

    async def stop(self) -> None:
        request = StopChatDraftRequest(draft_id=self.id)
        await self._client.drafts.StopChatDraft(request)


@contextlib.asynccontextmanager
async def writing_client(port: int, tenant: str) -> AsyncIterator[AsyncChatTicketClient]:
    """The asyncio client: the other has no writer."""
    async with AsyncChatTicketClient(f"localhost:{port}", tenant=tenant, options=OPTIONS) as client:
        yield client


async def test_watch_shows_a_draft_and_then_its_message(
    server: Any, client: AsyncChatTicketClient, tenant: str
) -> None:
    """Who does not ask for drafts sees the message only."""
    session_id = await create_session_id(client)
    async with writing_client(server.port, tenant) as other:
        follower = Follower(client, session_id)
        await follower.read_until("caught_up")
        async with other.write(session_id, role=ASSISTANT) as draft:
            await follower.read_until("draft")
            for words in ("Für ", "Elise"):
                await draft.append(words)
                await follower.read_until("draft_appended")
        await follower.read_until("messages_created")
    assert follower.events == [
        ("draft", ""),
        ("draft_appended", "Für "),
        ("draft_appended", "Elise"),
        ("draft_ended", draft.id),
        ("messages_created", "Für Elise"),
    ]
    await follower.close()

    kinds = []
    async for event in client.watch(session_id):
        kinds.append(event_kind(event))
        if kinds[-1] == "caught_up":
            break
    assert kinds == ["session", "messages_created", "caught_up"]


async def test_drafts_go_on_over_a_break(database: str, connect: NewClient, tenant: str) -> None:
    """The caller gets what is new in them, and the end of those that are gone."""
    port = free_port()
    async with serving(database) as other, writing_client(other.port, tenant) as elsewhere:
        session_id = await create_session_id(elsewhere)
        names = ("same", "more", "stopped", "empty", "new")
        same, more, stopped, empty, new = (Draft(elsewhere, session_id) for _ in names)
        for draft, text in ((same, "same"), (more, "ö"), (stopped, "stopped"), (empty, "")):
            await draft.append(text)
        follower = Follower(connect(port), session_id)
        async with serving(database, port=port):
            await follower.read_until("caught_up")
        assert follower.drafts == {
            same.id: "same",
            more.id: "ö",
            stopped.id: "stopped",
            empty.id: "",
        }

        follower.events.clear()
        await more.append(" and more")
        await stopped.append(" here")
        await stopped.stop()
        await empty.stop()
        await new.append("new")
        async with serving(database, port=port):
            await follower.read_until("messages_created")
            async with asyncio.timeout(10):
                while len(follower.events) < 5:
                    await follower.read()
            assert follower.events[:2] == [
                ("draft_ended", stopped.id),
                ("messages_created", "stopped here"),
            ]
            assert sorted(follower.events[2:]) == [
                ("draft", "new"),
                ("draft_appended", " and more"),
                ("draft_ended", empty.id),
            ]
            await same.append(" as before")
            await follower.read_until("draft_appended")
        assert follower.drafts == {
            same.id: "same as before",
            more.id: "ö and more",
            new.id: "new",
        }

        follower.events.clear()
        request = DeleteChatSessionRequest(session_id=session_id)
        await elsewhere.sessions.DeleteChatSession(request)
        async with serving(database, port=port):
            await follower.read_until("session_deleted")
        assert follower.drafts == {}
        assert len(follower.events) == 4
        await follower.close()


async def test_followers_of_writers_miss_and_repeat_nothing_while_servers_fail(
    fresh_database: str, tenant: str, client_class: type[AsyncChatTicketClient]
) -> None:
    """Writers and followers resume on whichever server there is."""
    with contextlib.ExitStack() as stack:
        servers = await asyncio.to_thread(Servers, fresh_database, stack)
        await servers.serving()
        async with (
            AsyncChatTicketClient(servers.target, tenant=tenant, options=OPTIONS) as client,
            client_class(servers.target, tenant=tenant, options=OPTIONS) as watching,
        ):
            session_id = await create_session_id(client)
            done = asyncio.Event()
            followers = [Follower(watching, session_id) for _ in range(2)]

            async def answer() -> None:
                while not done.is_set():
                    async with client.write(session_id, role=ASSISTANT) as draft:
                        for number in range(50):
                            await draft.append(f"{number} ü ")
                            await asyncio.sleep(0.005)

            async def follow(follower: Follower) -> None:
                while not done.is_set() or follower.drafts:
                    await follower.read()

            answers = [asyncio.create_task(answer()) for _ in range(3)]
            follows = [asyncio.create_task(follow(follower)) for follower in followers]
            await asyncio.sleep(0.5)
            await servers.restart(signal.SIGKILL, 0)
            await servers.restart(signal.SIGTERM, 1)
            await servers.restart(signal.SIGKILL, 0, 1)
            await asyncio.sleep(0.5)
            done.set()
            async with asyncio.timeout(60):  # a client that has failed often pauses for long
                await asyncio.gather(*answers, *follows)
            for follower in followers:
                await follower.close()
    content = "".join(f"{number} ü " for number in range(50))
    for follower in followers:
        assert len(follower.ended) >= 3
        for draft_id, shown in follower.ended.items():
            assert content.startswith(shown)
            if draft_id in follower.messages:
                assert follower.messages[draft_id].content == content
        assert any(shown == content for shown in follower.ended.values())
