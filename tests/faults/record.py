"""What callers sent and received: all that the checker knows of a run, apart from the database."""

import itertools
import time
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

import grpc.aio
from google.rpc import error_details_pb2 as details_pb2
from google.rpc import status_pb2
from grpc import StatusCode

from faults.draft_record import DraftRecord, SeenDrafts
from faults.feed_record import FeedRecord

clock = time.monotonic


class Outcome(Enum):
    """What a caller knows of its write."""

    ACKNOWLEDGED = auto()
    REFUSED = auto()  # it was not done
    UNKNOWN = auto()  # it was done, or was not


def info_of(error: grpc.aio.AioRpcError) -> details_pb2.ErrorInfo:
    """The ErrorInfo in the details of an error, or an empty one."""
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            for packed in status_pb2.Status.FromString(value).details:
                info = details_pb2.ErrorInfo()
                if packed.Unpack(info):
                    return info
    return details_pb2.ErrorInfo()


def reason_of(error: grpc.aio.AioRpcError) -> str:
    """The reason in the details of an error, or an empty string."""
    return str(info_of(error).reason)


# UNAVAILABLE too, unless its reason is the service's: gRPC itself also answers UNAVAILABLE.
UNKNOWN = {
    StatusCode.CANCELLED,
    StatusCode.DEADLINE_EXCEEDED,
    StatusCode.INTERNAL,
    StatusCode.UNKNOWN,
}


@dataclass(kw_only=True)
class Attempt:
    """A call of a write, and how it ended."""

    began: float
    ended: float
    code: StatusCode
    reason: str = ""
    text: str = ""

    @property
    def outcome(self) -> Outcome:
        if self.code is StatusCode.OK:
            return Outcome.ACKNOWLEDGED
        if self.code in UNKNOWN or (
            self.code is StatusCode.UNAVAILABLE and self.reason in ("", "OUTCOME_UNKNOWN")
        ):
            return Outcome.UNKNOWN
        return Outcome.REFUSED


@dataclass(kw_only=True)
class Write:
    """A write with its ids, as often as it was called."""

    kind: str  # the method
    tenant: str
    session_id: str
    request: Any
    response: Any = None
    attempts: list[Attempt] = field(default_factory=list)

    @property
    def outcome(self) -> Outcome:
        """The outcome of all attempts: after an unknown one, later errors prove little."""
        outcomes = {attempt.outcome for attempt in self.attempts}
        if Outcome.ACKNOWLEDGED in outcomes:
            return Outcome.ACKNOWLEDGED
        return Outcome.UNKNOWN if Outcome.UNKNOWN in outcomes else Outcome.REFUSED

    @property
    def acknowledged_at(self) -> float:
        return next(attempt.ended for attempt in self.attempts if attempt.code is StatusCode.OK)

    @property
    def began(self) -> float:
        return self.attempts[0].began


@dataclass(kw_only=True)
class WatchRecord:
    """Everything that one watch delivered, over all its streams."""

    tenant: str
    session_id: str
    revision: int = 0
    streams: int = 0
    created: list[tuple[str, int]] = field(default_factory=list)  # each message's id and sequence
    messages: dict[str, Any] = field(default_factory=dict)  # in the state after the last event
    backwards: list[str] = field(default_factory=list)  # revisions that were lower than the last
    unknown_changed: list[str] = field(
        default_factory=list
    )  # ids of messages that it never delivered
    deleted: bool = False
    drafts: SeenDrafts | None = None  # of a watch that shows them

    def apply(self, event: Any) -> None:
        """Take down an event."""
        if event.revision < self.revision:
            self.backwards.append(f"{event.revision} after {self.revision}")
        self.revision = event.revision
        if self.drafts is not None:
            self.drafts.apply(event)
        match event.WhichOneof("event"):
            case "messages_created":
                for message in event.messages_created.messages:
                    self.created.append((message.id, message.sequence))
                    self.messages[message.id] = message
            case "message_updated":
                message = event.message_updated
                if message.id not in self.messages:
                    self.unknown_changed.append(message.id)
                self.messages[message.id] = message
            case "message_deleted":
                self.messages.pop(event.message_deleted.message_id, None)
            case "session_deleted":
                self.deleted = True


@dataclass
class Record:
    """A run as its callers saw it."""

    writes: list[Write] = field(default_factory=list)
    watches: list[WatchRecord] = field(default_factory=list)
    drafts: list[DraftRecord] = field(default_factory=list)
    feeds: list[FeedRecord] = field(default_factory=list)
    # Bytes of another tenant, and statuses that no caller may see.
    findings: list[str] = field(default_factory=list)
    # When a write was acknowledged, in order: what lies between is an outage.
    acknowledged: list[float] = field(default_factory=list)

    def longest_outage(self, since: float) -> float:
        times = [since, *(each for each in self.acknowledged if each >= since)]
        return max((b - a for a, b in itertools.pairwise(times)), default=0.0)
