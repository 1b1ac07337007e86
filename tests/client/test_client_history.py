"""What a watch tells its caller when the database has lost changes, without a server."""

import itertools
import random
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest
from google.rpc.error_details_pb2 import ErrorInfo

from chat_ticket.client import _told_messages
from chat_ticket.client._position import Position
from chat_ticket.client._resume import ListProgress, WatchProgress
from chat_ticket.errors import HistoryChangedError
from chat_ticket.v1 import resources_pb2 as r
from chat_ticket.v1.chat_message_pb2 import ListChatMessagesResponse
from chat_ticket.v1.chat_session_pb2 import WatchChatSessionResponse
from chat_ticket_svc.store import epochs

ONE, TWO, THREE, FOUR = (str(uuid.UUID(int=number)) for number in range(1, 5))
EPOCHS = [f"{number:016x}" for number in range(10)]
OLD, NEW = Position(0, f"0.{EPOCHS[0]}"), Position(0, f"0.{EPOCHS[1]}")


def message(id_: str, sequence: int, revision: int = 0, content: str = "") -> r.ChatMessage:
    revision = revision or sequence
    return r.ChatMessage(id=id_, sequence=sequence, revision=revision, content=content)


class Caller:
    """Keeps what ordinary events say. It knows nothing of histories."""

    def __init__(self) -> None:
        self.messages: dict[str, r.ChatMessage] = {}
        self.events: list[WatchChatSessionResponse] = []

    def take(self, event: WatchChatSessionResponse) -> None:
        self.events.append(event)
        for created in event.messages_created.messages:
            assert created.id not in self.messages, "created twice"
            self.messages[created.id] = created
        if event.HasField("message_updated"):
            assert event.message_updated.id in self.messages, "updated, but never created"
            self.messages[event.message_updated.id] = event.message_updated
        if event.HasField("message_deleted"):
            self.messages.pop(event.message_deleted.message_id, None)

    def take_corrections(
        self, progress: WatchProgress, change: HistoryChangedError, now: dict[str, r.ChatMessage]
    ) -> list[tuple[str, int, str]]:
        """As the client does it. Returns the kinds of the events, with their positions."""
        before = len(self.events)
        corrections = progress.corrections(change)
        for event in corrections.first_events():
            self.take(event)
        while (request := corrections.next_read()) is not None:
            for event in corrections.on_read(now.get(request.message_id)):
                self.take(event)
        for event in corrections.last_events():
            self.take(event)
        progress.resume_after(corrections)
        return [
            (event.WhichOneof("event") or "", event.revision, event.epoch)
            for event in self.events[before:]
        ]


def watching(
    *events: WatchChatSessionResponse, after: int = 0, include_drafts: bool = False
) -> tuple[WatchProgress, Caller]:
    """A watch and its caller, who were told these events."""
    progress, caller = WatchProgress("it", after, include_drafts=include_drafts), Caller()
    progress.request()
    for event in events:
        for item in progress.items(event):
            caller.take(item)
    return progress, caller


def old(revision: int, **event: Any) -> WatchChatSessionResponse:
    return OLD._replace(revision=revision).event(**event)


def new(revision: int, **event: Any) -> WatchChatSessionResponse:
    return NEW._replace(revision=revision).event(**event)


def created(*messages: r.ChatMessage) -> WatchChatSessionResponse:
    event = old(messages[-1].sequence)
    event.messages_created.messages.extend(messages)
    return event


def change_after(revision: int, epoch: str = NEW.epoch) -> HistoryChangedError:
    metadata = {"revision": str(revision), "epoch": epoch}
    info = ErrorInfo(reason="HISTORY_CHANGED", metadata=metadata)
    return HistoryChangedError(grpc.StatusCode.OUT_OF_RANGE, "", [info])


def test_stream_resumes_with_the_epoch_of_its_position() -> None:
    """First the one that the caller has stored."""
    progress = WatchProgress("it", 7, "stored", include_drafts=False)
    assert (progress.request().after_revision, progress.request().epoch) == (7, "stored")
    progress.items(old(8, heartbeat={}))
    assert (progress.request().after_revision, progress.request().epoch) == (8, OLD.epoch)


def test_lost_messages_are_deleted() -> None:
    """Before the stream goes on after the shared position."""
    progress, caller = watching(created(message(ONE, 1), message(TWO, 2), message(THREE, 3)))
    told = caller.take_corrections(progress, change_after(1), {})
    assert told == [
        ("message_deleted", 3, OLD.epoch),
        ("message_deleted", 3, OLD.epoch),
        ("heartbeat", 1, NEW.epoch),
    ]
    assert list(caller.messages) == [ONE]
    request = progress.request()
    assert (request.after_revision, request.epoch) == (1, NEW.epoch)


def test_lost_updates_and_deletions_are_read_again() -> None:
    """An update is undone, and so is a deletion; what is not there is gone."""
    progress, caller = watching(
        created(message(ONE, 1), message(TWO, 2), message(THREE, 3), message(FOUR, 4)),
        old(5, message_updated=message(ONE, 1, 5, "lost")),
        old(6, message_deleted={"message_id": TWO}),
        old(7, message_updated=message(THREE, 3, 7, "lost")),
    )
    now = {ONE: message(ONE, 1), TWO: message(TWO, 2), FOUR: message(FOUR, 4)}
    told = caller.take_corrections(progress, change_after(4), now)
    assert [kind for kind, *_ in told] == [
        "message_updated",
        "message_deleted",
        "messages_created",
        "heartbeat",
    ]
    assert caller.messages == now


def test_messages_that_are_there_again_are_created_in_order() -> None:
    """By their sequence, also those that the stream has never told."""
    progress, caller = watching(
        created(message(TWO, 2), message(THREE, 3)),
        *(old(5 + n, message_deleted={"message_id": id_}) for n, id_ in enumerate([THREE, ONE])),
        old(7, message_deleted={"message_id": TWO}),
        old(8, message_deleted={"message_id": FOUR}),
    )
    now = {id_: message(id_, n) for n, id_ in enumerate([ONE, TWO, THREE], 1)}
    # Created after the shared revision, so the stream tells it.
    now[FOUR] = message(FOUR, 5)
    caller.take_corrections(progress, change_after(4), now)
    assert list(caller.messages) == [ONE, TWO, THREE]
    assert len(caller.events[-2].messages_created.messages) == 3


def test_session_and_ticket_that_went_back_are_told() -> None:
    """And those that did not are not told again."""
    first = {"status": r.CHAT_SESSION_STATUS_ACTIVE, "title": "a title"}
    link = {"id": "link", "ticket": {"id": "ticket", "revision": 1}}
    progress, caller = watching(
        old(0, session=first),
        old(2, session={**first, "has_ticket": True}),
        old(2, ticket=link),
        old(3, heartbeat={}),
    )
    caller.take_corrections(progress, change_after(1), {})
    progress.request()
    kinds = [e.WhichOneof("event") for e in progress.items(new(1, session=first))]
    assert kinds == ["session", "ticket"]
    assert progress.items(new(1, session=first)) == []


def test_drafts_end_and_begin_again() -> None:
    """The text of a draft can be another one, although it is longer."""
    draft = {"id": ONE, "content": "ab", "length": 2}
    progress, caller = watching(old(3, draft=draft), include_drafts=True)
    told = caller.take_corrections(progress, change_after(1), {})
    assert [kind for kind, *_ in told] == ["draft_ended", "heartbeat"]
    progress.request()
    [event] = progress.items(new(1, draft={**draft, "content": "acd", "length": 3}))
    assert event.draft.content == "acd"


def test_what_an_earlier_process_was_told_is_the_callers() -> None:
    """It alone knows that."""
    progress, _ = watching(created(message(THREE, 8)), after=7)
    with pytest.raises(HistoryChangedError) as caught:
        progress.corrections(change_after(6))
    assert (caught.value.revision, caught.value.epoch) == (6, NEW.epoch)
    assert caught.value.reason == "HISTORY_CHANGED"
    progress.corrections(change_after(7))


def test_only_the_newest_messages_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """A change that reaches below them is the caller's."""
    monkeypatch.setattr(_told_messages, "MAX_ENTRIES", 10)
    ids = [str(uuid.UUID(int=number)) for number in range(1, 24)]
    progress, caller = watching(*(created(message(id_, n)) for n, id_ in enumerate(ids, 1)))
    with pytest.raises(HistoryChangedError):
        progress.corrections(change_after(14))
    caller.take_corrections(progress, change_after(15), {})
    assert len(caller.messages) == 15


def test_list_goes_on_with_the_epoch_that_it_began_with() -> None:
    """What it has returned is of that one."""
    progress = ListProgress("it", 0)
    assert progress.request().epoch == ""
    first = r.ChatSession(revision=9, epoch=OLD.epoch)
    progress.items(ListChatMessagesResponse(session=first, messages=[message(ONE, 1)]))
    assert (progress.request().after_sequence, progress.request().epoch) == (1, OLD.epoch)


@dataclass
class Session:
    """A session as the database has it, and what a stream of it tells."""

    epoch: str = OLD.epoch
    epoch_id: str = EPOCHS[0]
    # The kind, the message and the content, of revisions 1, 2, …
    changes: list[tuple[str, str, str]] = field(default_factory=list)

    @property
    def revision(self) -> int:
        return len(self.changes)

    def write(self, chance: random.Random, count: int) -> None:
        for _ in range(count):
            existing = list(self.state()[0])
            kind = chance.choice(["create", "create", "update", "delete"]) if existing else "create"
            # Random, so that what was lost can also be written again.
            id_ = str(uuid.UUID(int=chance.randrange(1, 40)))
            if kind == "create" and any(id_ == changed for _, changed, _ in self.changes):
                kind = "update"
            if kind != "create":
                id_ = chance.choice(existing) if existing else id_
            if not self.epoch.endswith(self.epoch_id):
                self.epoch += f"-{self.revision + 1}.{self.epoch_id}"
            self.changes.append((kind, id_, str(chance.random())))

    def lose(self, chance: random.Random, epoch_id: str) -> None:
        """The database is restored as it was some changes ago."""
        del self.changes[chance.randrange(len(self.changes) + 1) :]
        begun = self.epoch.split("-")
        self.epoch = "-".join(e for e in begun if int(e.split(".")[0]) <= self.revision)
        self.epoch_id = epoch_id

    def state(self) -> tuple[dict[str, r.ChatMessage], dict[str, int]]:
        """The messages, and the revisions of the deletions."""
        messages, tombstones = {}, {}
        for revision, (kind, id_, content) in enumerate(self.changes, 1):
            if kind == "delete" and id_ in messages:
                del messages[id_]
                tombstones[id_] = revision
            elif kind == "update" and id_ in messages:
                messages[id_] = message(id_, messages[id_].sequence, revision, content)
            elif kind == "create":
                messages[id_] = message(id_, revision, content=content)
        return messages, tombstones

    def stream(self, after: int, epoch: str) -> Iterator[WatchChatSessionResponse]:
        """As the server's: its positions say what they depend on."""
        messages, tombstones = self.state()
        position, head = epochs.parse(epoch, after), self.revision
        between = str(epochs.Position(self.epoch, head, position.exact))
        first_epoch = self.epoch if position.exact == position.head else between
        yield Position(after, first_epoch).event(session={"revision": head})
        told: list[tuple[int, dict[str, Any]]] = [
            (at, {"message_deleted": {"message_id": id_}}) for id_, at in tombstones.items()
        ]
        for each in messages.values():
            if each.sequence > after:
                told.append((each.sequence, {"messages_created": {"messages": [each]}}))
            if each.revision > each.sequence:
                told.append((each.revision, {"message_updated": each}))
        for at, event in sorted(told, key=lambda each: each[0]):
            if at > after:
                yield Position(at, between).event(**event)
        yield Position(head, self.epoch).event(caught_up={})

    def refuse(self, position: Position) -> HistoryChangedError | None:
        """Whether the server refuses a position, as it does."""
        if not position.epoch:
            return None
        epoch, head, exact = epochs.parse(position.epoch, position.revision)
        shared = epochs.shared_revision(epoch, head, self.epoch, self.revision)
        return None if shared == head else change_after(min(shared, exact), self.epoch)


def test_caller_ends_with_what_the_database_has() -> None:
    """Whatever was lost, written, and lost again, and wherever the streams broke."""
    for seed in range(500):
        caller, session = watched_at_random(seed)
        assert caller.messages == session.state()[0], seed
        last = caller.events[-1]
        assert (last.revision, last.epoch) == (session.revision, session.epoch), seed


def watched_at_random(seed: int) -> tuple[Caller, Session]:
    chance, session = random.Random(seed), Session()
    progress, caller = WatchProgress("it", 0, include_drafts=False), Caller()
    for turn in range(1, 7):
        session.write(chance, chance.randrange(12))
        follow(session, progress, caller, chance, is_last=turn == 6)
        if chance.random() < 0.5 and session.changes:
            session.lose(chance, EPOCHS[turn])
            if chance.random() < 0.7:
                session.write(chance, chance.randrange(12))
    follow(session, progress, caller, chance, is_last=True)
    return caller, session


def follow(
    session: Session,
    progress: WatchProgress,
    caller: Caller,
    chance: random.Random,
    *,
    is_last: bool,
) -> None:
    """One stream, which may break early, and the corrections before it.

    After corrections it does not break: what is read for them can be newer than the position. If
    that is lost too, before the stream has caught up, nobody tells.
    """
    request = progress.request()
    if change := session.refuse(Position(request.after_revision, request.epoch)):
        start = len(caller.events)
        caller.take_corrections(progress, change, session.state()[0])
        *corrections, last = caller.events[start:]
        assert all(session.refuse(Position(e.revision, e.epoch)) for e in corrections)
        assert session.refuse(Position(last.revision, last.epoch)) is None
        request, is_last = progress.request(), True
    responses = session.stream(request.after_revision, request.epoch)
    for response in itertools.islice(responses, None if is_last else chance.randrange(20)):
        for item in progress.items(response):
            caller.take(item)
