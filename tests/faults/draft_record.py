"""What the writers of drafts sent and got, and what followers saw of drafts."""

import math
import time
from dataclasses import dataclass, field
from typing import Any

from grpc import StatusCode

# CHAT_TICKET_DRAFT_SECONDS of the services.
LEASE_SECONDS = 2.0

# Compared with times of the database, which is on this machine.
wall_clock = time.time


@dataclass(kw_only=True)
class Stream:
    """A call of WriteChatDraft, and how it ended."""

    began: float
    started: float = math.inf  # when `started` came
    code: StatusCode | None = None  # None while it runs, and when the writer left it
    reason: str = ""


@dataclass(kw_only=True)
class Writer:
    """One that writes a draft until it is done, has left, or hears that another writes on.

    Lengths are in bytes of UTF-8.
    """

    name: str  # each of its words begins with it
    base: int | None = None  # the length of the draft when it took over: its own text is after this
    text: bytes = b""  # all that it has produced
    # Where each of its pieces ends in the draft, and when it was sent first.
    sent: list[tuple[int, float]] = field(default_factory=list)
    acknowledged: int = 0  # the length of the draft that is durable
    finish_state: int | None = None  # of the finish that was sent
    streams: list[Stream] = field(default_factory=list)


@dataclass(kw_only=True)
class DraftRecord:
    """A draft, as its callers know it."""

    tenant: str
    session_id: str
    id: str
    writers: list[Writer] = field(default_factory=list)  # each takes over from the one before
    has_stop: bool = False  # whether somebody has called StopChatDraft
    # What callers were told to be its message, and by which response.
    messages: list[tuple[str, Any]] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)  # in what its callers got

    @property
    def acknowledged(self) -> int:
        return max((writer.acknowledged for writer in self.writers), default=0)


@dataclass
class SeenDrafts:
    """What one watch showed of drafts, over all its streams."""

    open: dict[str, bytes] = field(default_factory=dict)  # what this stream holds
    longest: dict[str, bytes] = field(default_factory=dict)  # the most that any stream showed
    pieces: int = 0
    violations: list[str] = field(default_factory=list)
    # Drafts that have no message, as the next response after their end was this one.
    without_message: dict[str, str] = field(default_factory=dict)
    _ended: str = ""  # by the last response

    def begin_stream(self) -> None:
        self.open.clear()
        self._ended = ""

    def apply(self, event: Any) -> None:
        kind = event.WhichOneof("event")
        created = [message.id for message in event.messages_created.messages]
        if self._ended and self._ended != (created or [event.message_deleted.message_id])[0]:
            self.without_message[self._ended] = f"{kind} {created}"
        self._ended = ""
        for message_id in created:
            if message_id in self.open:
                self.violations.append(f"delivered message {message_id} before its draft ended")
        match kind:
            case "draft":
                self._hold(event.draft.id, event.draft.content.encode())
            case "draft_appended":
                self._append(event.draft_appended)
            case "draft_ended":
                self._end(event.draft_ended.draft_id)

    def _append(self, appended: Any) -> None:
        held = self.open.get(appended.draft_id)
        if held is None:
            self.violations.append(f"appended to draft {appended.draft_id}, which it did not show")
            return
        if appended.offset > len(held):
            self.violations.append(f"skipped a piece of draft {appended.draft_id}")
        elif appended.offset < len(held):
            self.violations.append(f"repeated a piece of draft {appended.draft_id}")
        self.pieces += 1
        self._hold(appended.draft_id, held[: appended.offset] + appended.text.encode())

    def _end(self, draft_id: str) -> None:
        held = self.open.pop(draft_id, None)
        if held is None:
            self.violations.append(f"ended draft {draft_id}, which it did not show")
        elif held:  # an empty one may be dropped, and begin again
            self._ended = draft_id

    def _hold(self, draft_id: str, content: bytes) -> None:
        self.open[draft_id] = content
        longest = self.longest.get(draft_id, b"")
        if not content.startswith(longest):
            self.violations.append(f"took back text of draft {draft_id}")
        self.longest[draft_id] = max(content, longest, key=len)
