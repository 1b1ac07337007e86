"""`follow_sessions` of the Python client, over breaks and over a history that changes."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable

import grpc.aio
import pytest
import pytest_asyncio
from support.client import Api
from support.client_calls import NewClient, until
from support.feed_model import (
    Event,
    FeedModel,
    left,
    session,
    session_deleted,
    subject,
    ticket,
    ticket_deleted,
)
from support.feeds import Feed
from support.sessions import get_session

from chat_ticket import errors
from chat_ticket.client import AsyncChatTicketClient, _followed_sessions, _retry
from chat_ticket.client._followed_sessions import matches
from chat_ticket.v1 import chat_session_pb2_grpc, chat_ticket_pb2_grpc
from chat_ticket.v1 import resources_pb2 as r
from chat_ticket.v1.chat_session_pb2 import WatchChatSessionsRequest, WatchChatSessionsResponse
from chat_ticket_svc.server import Server

pytestmark = pytest.mark.usefixtures("feed_turn")

ACTIVE = r.CHAT_SESSION_STATUS_ACTIVE
RESOLVED = r.CHAT_SESSION_STATUS_RESOLVED

FOLLOWER = "follower"


class Follower:
    """What a caller of follow_sessions has been told."""

    def __init__(self, responses: AsyncIterator[WatchChatSessionsResponse]):
        self.responses: list[WatchChatSessionsResponse] = []
        self.task = asyncio.create_task(self._follow(responses), name=FOLLOWER)

    async def _follow(self, responses: AsyncIterator[WatchChatSessionsResponse]) -> None:
        async for response in responses:
            self.responses.append(response)

    @property
    def events(self) -> list[Event]:
        events = [event for response in self.responses for event in response.events]
        return [event for event in events if subject(event)]

    @property
    def cursor(self) -> str:
        return self.responses[-1].cursor if self.responses else ""

    def state(self) -> dict[str, Event]:
        return {subject(event): event for event in self.events}

    def forget(self) -> None:
        self.responses.clear()

    async def reaches(self, condition: Callable[[], bool]) -> None:
        """Wait for the condition, but not longer than the task lives."""
        await until(lambda: condition() or self.task.done())
        if self.task.done():
            self.task.result()
        assert condition()


@pytest.fixture
def feed(monkeypatch: pytest.MonkeyPatch) -> FeedModel:
    """The model, whose client does not wait long."""
    monkeypatch.setattr(_retry, "FIRST_BACKOFF_SECONDS", 0.01)
    return FeedModel()


@pytest_asyncio.fixture
async def client(feed: FeedModel, connect: NewClient) -> AsyncIterator[AsyncChatTicketClient]:
    """A client of the model."""
    server = grpc.aio.server()
    chat_session_pb2_grpc.add_ChatSessionServiceServicer_to_server(feed, server)
    chat_ticket_pb2_grpc.add_ChatTicketServiceServicer_to_server(feed, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    client = connect(port)
    yield client
    followers = [task for task in asyncio.all_tasks() if task.get_name() == FOLLOWER]
    await client.close()
    await asyncio.gather(*followers, return_exceptions=True)
    await server.stop(None)


def kinds(responses: list[WatchChatSessionsResponse]) -> list[str | None]:
    return [event.WhichOneof("event") for response in responses for event in response.events]


async def told(
    client: AsyncChatTicketClient, feed: FeedModel, *events: Event, **filters: object
) -> Follower:
    """A follower from the beginning that was told these events, one by one."""
    follower = Follower(client.follow_sessions(from_beginning=True, **filters))
    await follower.reaches(lambda: "caught_up" in kinds(follower.responses))
    for number, event in enumerate(events, len(follower.events) + 1):
        feed.write(event)
        await follower.reaches(lambda number=number: len(follower.events) == number)
    return follower


async def test_goes_on_after_the_last_cursor_when_the_stream_breaks(
    feed: FeedModel, client: AsyncChatTicketClient
) -> None:
    """And tells once that it has caught up. Without a response there is no cursor yet."""
    feed.breaks_first = 2
    feed.write(session("old", 1))
    follower = Follower(client.follow_sessions(statuses=[ACTIVE], labels={"a": "b"}))
    await follower.reaches(lambda: bool(follower.responses))
    assert [request.cursor for request in feed.requests] == ["", "", ""]
    feed.write(session("new", 1))
    await follower.reaches(lambda: len(follower.events) == 1)
    cursor = follower.cursor
    feed.lose(0)  # ends the streams
    await follower.reaches(lambda: len(follower.responses) == 3)
    assert kinds(follower.responses) == ["caught_up", "session", "heartbeat"]
    assert feed.requests[-1].cursor == cursor
    assert feed.requests[-1].statuses == [ACTIVE]
    assert feed.requests[-1].labels == {"a": "b"}


async def test_from_beginning_goes_on_after_a_cursor(
    feed: FeedModel, client: AsyncChatTicketClient
) -> None:
    """It begins once only."""
    feed.breaks_first = 1
    feed.write(session("old", 1))
    follower = await told(client, feed)
    feed.lose(0)
    await follower.reaches(lambda: len(feed.requests) == 3)
    assert [request.from_beginning for request in feed.requests] == [True, True, False]
    assert [request.cursor for request in feed.requests] == ["", "", "1:1:1:0"]


async def test_cursor_that_has_expired_is_the_callers_to_handle(
    feed: FeedModel, client: AsyncChatTicketClient
) -> None:
    """The client does not begin anew by itself."""
    feed.expired = 5
    with pytest.raises(errors.CursorExpiredError):
        await anext(client.follow_sessions("1:4:4:0"))
    assert issubclass(errors.CursorExpiredError, errors.OutOfRangeError)


async def test_tells_what_is_gone_and_what_is_different(
    feed: FeedModel, client: AsyncChatTicketClient, caplog: pytest.LogCaptureFixture
) -> None:
    """Before it goes on: of sessions and tickets whose creation, change or deletion is lost."""
    feed.write(session("a", 1), session("b", 1), ticket("t", 1), ticket("u", 1))
    follower = await told(
        client,
        feed,
        session("a", 2),
        session_deleted("b"),
        ticket("t", 2),
        ticket_deleted("u"),
        session("c", 0),
        ticket("v", 0),
    )
    cursor = follower.cursor
    follower.forget()
    feed.lose(6)
    feed.write(session("d", 0))
    await follower.reaches(lambda: len(follower.events) == 7)
    corrections, gone_on = follower.events[:-1], follower.events[-1]
    assert {subject(event): event for event in corrections} == {
        "a": session("a", 1),
        "b": session("b", 1),
        "t": ticket("t", 1),
        "u": ticket("u", 1),
        "c": session_deleted("c"),
        "v": ticket_deleted("v"),
    }
    assert follower.responses[0].cursor == cursor, "who leaves now is told again"
    assert gone_on == session("d", 0)
    [warning] = [record for record in caplog.records if "changes are lost" in record.message]
    assert warning.levelname == "WARNING"


async def test_tells_what_leaves_a_filter_because_changes_are_lost(
    feed: FeedModel, client: AsyncChatTicketClient
) -> None:
    """And what is back in it."""
    feed.write(left("a"), session("b", 1, status=ACTIVE), left("c"))
    follower = await told(
        client,
        feed,
        session("a", 5, status=ACTIVE),
        left("b"),
        session_deleted("c"),
        statuses=[ACTIVE],
    )
    follower.forget()
    feed.lose(3)
    await follower.reaches(lambda: len(follower.events) == 3)
    assert follower.state() == {"a": left("a"), "b": session("b", 1, status=ACTIVE), "c": left("c")}


async def test_reads_again_only_what_may_be_lost(
    feed: FeedModel, client: AsyncChatTicketClient
) -> None:
    """What was told before a cursor that the server accepts is not."""
    feed.write(*(session(f"{number}", 1) for number in range(300)))
    follower = await told(client, feed, session("new", 0))
    follower.forget()
    feed.lose(1)
    await follower.reaches(lambda: len(follower.events) == 1)
    assert follower.state() == {"new": session_deleted("new")}
    assert feed.reads == ["new"]


async def test_lost_change_that_was_told_early_is_found(
    feed: FeedModel, client: AsyncChatTicketClient
) -> None:
    """However much was told after it that is true: a stream does not tell by commits."""
    feed.write(*(session(f"{number}", 1) for number in range(300)), session("-", 0))
    follower = await told(client, feed)
    assert follower.events[0] == session("-", 0)
    follower.forget()
    feed.lose(1)
    await follower.reaches(lambda: bool(follower.events))
    assert follower.events == [session_deleted("-")]


@pytest.mark.parametrize("has_cursor", [True, False])
async def test_reads_all_again_when_no_cursor_is_accepted(
    feed: FeedModel, client: AsyncChatTicketClient, has_cursor: bool
) -> None:
    """As after a restore of a dump. It goes on after the cursor of the error, or begins anew."""
    feed.accepts_older, feed.refusal_has_cursor = False, has_cursor
    feed.write(*(session(f"{number}", 1) for number in range(250)))
    follower = await told(client, feed, session("7", 2), session("new", 0))
    follower.forget()
    feed.lose(2)
    feed.write(session("later", 0))
    await follower.reaches(lambda: "later" in follower.state())
    assert follower.events[:2] == [session_deleted("new"), session("7", 1)]
    assert len(feed.reads) == 251
    assert feed.requests[-1].from_beginning is not has_cursor
    assert len(follower.events) == (3 if has_cursor else 2 + 251)


@pytest.mark.parametrize("forgets", [True, False])
async def test_history_that_it_cannot_check_is_the_callers_to_handle(
    feed: FeedModel,
    client: AsyncChatTicketClient,
    forgets: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What was told before this call may be lost too, or what it has forgotten."""
    feed.accepts_older = False
    feed.write(*(session(f"{number}", 1) for number in range(20)))
    if forgets:
        monkeypatch.setattr(_followed_sessions, "MAX_TOLD", 10)
        follower = await told(client, feed)
    else:
        follower = Follower(client.follow_sessions("1:10:10:0"))
        await follower.reaches(lambda: len(follower.events) == 10)
    feed.lose(1)
    with pytest.raises(errors.HistoryChangedError, match="HISTORY_CHANGED"):
        await asyncio.wait_for(follower.task, 10)
    assert not feed.reads


async def test_cursor_that_the_call_began_with_may_still_be_true(
    feed: FeedModel, client: AsyncChatTicketClient
) -> None:
    """Then what was told before the call is not lost."""
    feed.write(*(session(f"{number}", 1) for number in range(20)))
    follower = Follower(client.follow_sessions("1:10:10:0"))
    await follower.reaches(lambda: len(follower.events) == 10)
    follower.forget()
    feed.lose(10)
    await follower.reaches(lambda: len(follower.events) == 10)
    assert follower.events == [session_deleted(f"{number}") for number in range(19, 9, -1)]
    feed.write(session("new", 0))
    await follower.reaches(lambda: "new" in follower.state())


async def test_follower_that_was_told_nothing_goes_on_after_its_first_cursor(
    feed: FeedModel, client: AsyncChatTicketClient
) -> None:
    """The heartbeats since may have moved on to what is lost."""
    feed.write(session("old", 1))
    follower = Follower(client.follow_sessions("1:1:1:0"))
    feed.write(Event(heartbeat=WatchChatSessionsResponse.Heartbeat()))
    await follower.reaches(lambda: "heartbeat" in kinds(follower.responses))
    feed.lose(1)
    feed.write(session("new", 0))
    await follower.reaches(lambda: follower.events == [session("new", 0)])
    assert not feed.reads


@pytest.mark.parametrize("seed", range(2))
async def test_holds_the_truth_after_any_changes_of_the_history(
    feed: FeedModel, client: AsyncChatTicketClient, seed: int
) -> None:
    """Whatever is written and lost, in whichever order, while the follower is cut off or not."""

    def knows_all() -> bool:
        state = feed.state()
        return (
            all(
                event == state.get(id_, session_deleted(id_))
                for id_, event in follower.state().items()
            )
            and state.keys() <= follower.state().keys()
        )

    chance = random.Random(seed)
    follower = await told(client, feed)
    for _ in range(25):
        for _ in range(chance.randint(1, 8)):
            present = [event for event in feed.state().values() if event.HasField("session")]
            if len(present) < 5 or chance.random() < 0.2:
                feed.write(session(f"{chance.random()}", 0))
            elif chance.random() < 0.2:
                feed.write(session_deleted(chance.choice(present).session.id))
            else:
                before = chance.choice(present).session
                feed.write(session(before.id, before.revision + 1, title=f"{chance.random()}"))
        if chance.random() < 0.5:
            await follower.reaches(knows_all)
        if chance.random() < 0.5:
            feed.lose(chance.randint(0, min(len(feed.log), 12)))
    await follower.reaches(knows_all)


async def test_filters_mean_what_they_mean_to_the_server(
    server: Server, api: Api, connect: NewClient
) -> None:
    """A session that is read again matches exactly if a stream would tell it."""
    client = connect(server.port)
    plain = await api.session(user_id="jo")
    labelled = await api.session(labels={"a": "b", "c": ""})
    resolved = await api.session(status=RESOLVED, labels={"a": "c"})
    linked = await api.session(user_id="jo", labels={"a": "b"})
    await api.escalate(linked.id)
    sessions = [await get_session(api, s.id) for s in (plain, labelled, resolved, linked)]
    for filters in (
        {},
        {"statuses": [RESOLVED]},
        {"statuses": [RESOLVED, ACTIVE]},
        {"has_ticket": True},
        {"has_ticket": False},
        {"user_id": "jo"},
        {"labels": {"a": "b"}},
        {"labels": {"a": "b", "c": ""}, "statuses": [ACTIVE]},
    ):
        feed = Feed(None)
        async for response in client.follow_sessions(from_beginning=True, **filters):
            feed.apply(response)
            if ("caught_up", "") in feed.told:
                break
        request = WatchChatSessionsRequest(**filters)
        matching = {each.id: each for each in sessions if matches(each, request)}
        assert feed.sessions == matching, filters
