"""The cursors of WatchChatSessions: how far a stream has come, and in which history.

A cursor is opaque to callers. It is neither a secret nor a credential: a forged one can only move
within what the request may read anyway.
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from chat_ticket_svc.services import paging
from chat_ticket_svc.services.validate import Validator
from chat_ticket_svc.store.change_feed import SECTIONS, Epoch, Place

MAX_CHARACTERS = 8192

_EPOCH_ID = re.compile("[0-9a-f]{16}")


class Cursor(NamedTuple):
    """A place in the feed, and the history that it belongs to.

    All that was told up to here was committed before `wal_position`. None: that is not known.
    `earlier` has the epochs that the caller has been in before, each with the position up to which
    it knew all changes then.
    """

    place: Place
    epoch_id: str
    wal_position: int | None
    earlier: tuple[tuple[str, int], ...] = ()

    def in_current_epoch(self, epochs: Sequence[Epoch], wal_position: int | None) -> "Cursor":
        """This place in the history of the last of `epochs`, whose WAL is at `wal_position`.

        Raises HistoryChanged if what was told before may be no more.
        """
        numbers = {epoch.id: number for number, epoch in enumerate(epochs)}
        been_in = [*self.earlier, (self.epoch_id, self.place.start)]
        shared = list(been_in)
        while shared and shared[-1][0] not in numbers:
            shared.pop()
        if not shared:
            raise HistoryChanged(None)
        epoch_id, start = shared[-1]
        after = epochs[numbers[epoch_id] + 1 :]
        if (
            len(shared) == len(been_in)
            and after
            and after[0].branch_position is not None
            and self.wal_position is not None
            and self.wal_position <= after[0].branch_position
        ):
            return Cursor(self.place, epochs[-1].id, self.wal_position, tuple(shared))
        raise HistoryChanged(Cursor(Place(start), epochs[-1].id, wal_position, tuple(shared)))

    def encode(self, digest: str) -> str:
        """Opaque text for the caller with this tenant and these filters: see paging.digest."""
        return paging.encode(digest, *self.place, *self[1:])


class HistoryChanged(Exception):  # noqa: N818 - a signal to the stream, never to a caller
    """What was told before may be no more.

    `cursor` goes on in the current history without a gap. None if no history is shared.
    """

    def __init__(self, cursor: Cursor | None):
        super().__init__()
        self.cursor = cursor


def decode(validator: Validator, text: str, digest: str) -> Cursor | None:
    """The cursor of a request. None, and a violation, if it does not come from `encode`."""
    if len(text) > MAX_CHARACTERS:
        validator.add_violation("cursor", f"{len(text):,} characters, at most {MAX_CHARACTERS:,}")
        return None
    try:
        return _parse(text, digest)
    except (ValueError, TypeError, IndexError, RecursionError):
        validator.add_violation("cursor", "not a cursor of this method with these filters")
        return None


def _parse(text: str, digest: str) -> Cursor:
    text_digest, *values = paging.decode(text)
    if text_digest != digest:
        raise ValueError
    start, end, section, bucket, row_id, epoch_id, wal_position, earlier = values
    place = Place(
        paging.parse_integer(start),
        None if end is None else paging.parse_integer(end),
        SECTIONS[paging.parse_integer(section)],
        paging.parse_integer(bucket),
        paging.parse_id(row_id) if row_id else "",
    )
    return Cursor(
        place,
        _parse_epoch_id(epoch_id),
        None if wal_position is None else paging.parse_integer(wal_position),
        tuple((_parse_epoch_id(id_), paging.parse_integer(at)) for id_, at in earlier),
    )


def _parse_epoch_id(value: Any) -> str:
    if type(value) is not str or not _EPOCH_ID.fullmatch(value):
        raise ValueError
    return value
