"""The histories of a session's revisions.

An epoch is a history of the database. A new one begins when a standby is promoted or a backup is
restored: changes can be lost then, and their revisions are given to others. A session's `epoch`
names the epochs in which its revisions were given, as FIRST_REVISION.EPOCH_ID with a hyphen between
them. Most sessions have one. A trigger writes it.

While a watch reads what has changed, its caller gets every message in its newest state, and earlier
changes of it do not come. So a position between two such messages depends on later changes too. It
is followed by "--HEAD.EXACT": the revision of the session when it was read, and the last position
at which the caller had exactly the state of that revision.
"""

import re
from typing import NamedTuple

from chat_ticket_svc import errors

PATTERN = re.compile(
    r"[0-9]{1,18}\.[0-9a-f]{16}(-[0-9]{1,18}\.[0-9a-f]{16})*(--[0-9]{1,18}\.[0-9]{1,18})?"
)

MAX_CHARACTERS = 8192


class Position(NamedTuple):
    """What a caller has of a session."""

    epoch: str
    """The history, without what may follow it. Empty when it is not known."""
    head: int
    """The revision that must not be lost."""
    exact: int
    """The revision that the caller can go back to. Equal to `head` if the position is exact."""

    def __str__(self) -> str:
        between = "" if self.exact == self.head else f"--{self.head}.{self.exact}"
        return f"{self.epoch}{between}"


def parse(epoch: str, revision: int) -> Position:
    """The position of a request. `epoch` matches PATTERN, or is empty."""
    history, _, between = epoch.partition("--")
    if not between:
        return Position(history, revision, revision)
    head, exact = map(int, between.split("."))
    return Position(history, max(head, revision), min(exact, revision))


def shared_revision(epoch: str, revision: int, current_epoch: str, current_revision: int) -> int:
    """The last revision up to `revision` that the history `epoch` shares with the current one.

    Below 0 if they share nothing, as for a session that was lost and created again.
    """
    shared = min(revision, current_revision)
    if epoch == current_epoch:
        return shared
    begun, current_begun = epoch.split("-"), current_epoch.split("-")
    common = 0
    while common < min(len(begun), len(current_begun)) and begun[common] == current_begun[common]:
        common += 1
    for later in (begun[common:], current_begun[common:]):
        if later:
            shared = min(shared, int(later[0].split(".")[0]) - 1)
    return shared


def check(epoch: str, revision: int, current_epoch: str, current_revision: int) -> None:
    """Raise HistoryChangedError unless the session still has this revision of the history `epoch`.

    Revision 0 is before all changes, and so in every history.
    """
    history = parse(epoch, revision).epoch
    shared = max(0, shared_revision(history, revision, current_epoch, current_revision))
    if shared != revision:
        raise errors.HistoryChangedError(shared, current_epoch)
