"""What a watch has told its caller of messages. It does no I/O."""

import struct
import uuid
from typing import NamedTuple

from chat_ticket.v1.chat_session_pb2 import WatchChatSessionResponse

MAX_ENTRIES = 100_000

# The id of a message, its sequence, and the revision that was told. A deletion has the sequence 0.
_ENTRY = struct.Struct(">16sqq")


class UndoneMessages(NamedTuple):
    """The messages whose telling is not true any more, each in the order of its sequence."""

    created: list[str]
    """Ids of those that are lost."""
    changed: list[str]
    """Ids of those that were changed."""
    deleted: list[str]
    """Ids of those that were deleted. Some may never have been told as created."""


class _Told(NamedTuple):
    sequence: int  # 0 if it is not known
    revision: int
    is_deleted: bool


class ToldMessages:
    """The messages that a watch has told, to find what is undone when the database loses changes.

    It takes 32 bytes for each message that is told, changed or deleted. At MAX_ENTRIES of them
    (3.2 MB) the older half is forgotten.
    """

    def __init__(self, after_revision: int):
        self.first_known = after_revision
        """What is undone after a revision is known from this one on."""
        # In the order in which they were told: most watches never read it.
        self._entries = bytearray()

    def add(self, response: WatchChatSessionResponse) -> None:
        """Remember what a response tells."""
        match response.WhichOneof("event"):
            case "messages_created":
                for message in response.messages_created.messages:
                    self._add(message.id, message.sequence, message.revision)
            case "message_updated":
                updated = response.message_updated
                self._add(updated.id, updated.sequence, updated.revision)
            case "message_deleted":
                self._add(response.message_deleted.message_id, 0, response.revision)

    def undo(self, revision: int) -> UndoneMessages:
        """Forget what was told of the changes after a revision, and return what that was."""
        undone = UndoneMessages([], [], [])
        told = sorted(self._read(len(self._entries)).items(), key=lambda item: item[1].sequence)
        self._entries.clear()
        for key, (sequence, told_revision, is_deleted) in told:
            message_id = str(uuid.UUID(bytes=key))
            if told_revision <= revision:
                self._add(message_id, 0 if is_deleted else sequence, told_revision)
            elif is_deleted:
                # One that was created after the revision is told again, if it is there.
                if sequence <= revision:
                    undone.deleted.append(message_id)
            elif sequence <= revision:
                undone.changed.append(message_id)
            else:
                undone.created.append(message_id)
        return undone

    def _add(self, message_id: str, sequence: int, revision: int) -> None:
        key = bytes.fromhex(message_id.replace("-", ""))
        self._entries += _ENTRY.pack(key, sequence, revision)
        if len(self._entries) >= MAX_ENTRIES * _ENTRY.size:
            self._forget_older_half()

    def _forget_older_half(self) -> None:
        size = MAX_ENTRIES // 2 * _ENTRY.size
        last = max(told.revision for told in self._read(size).values())
        self.first_known = max(self.first_known, last)
        del self._entries[:size]

    def _read(self, size: int) -> dict[bytes, _Told]:
        """What was told last of each message, by the first bytes of the entries."""
        told: dict[bytes, _Told] = {}
        for key, sequence, revision in _ENTRY.iter_unpack(self._entries[:size]):
            before = told.get(key)
            known = before.sequence if before is not None else 0
            told[key] = _Told(sequence or known, revision, is_deleted=not sequence)
        return told
