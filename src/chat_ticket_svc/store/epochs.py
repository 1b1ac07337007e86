"""The histories of a session's revisions.

An epoch is a history of the database. A new one begins when a standby is promoted or a backup is
restored: changes can be lost then, and their revisions are given to others. A session's `epoch`
names the epochs in which its revisions were given, as FIRST_REVISION.EPOCH_ID with a hyphen between
them. Most sessions have one. A trigger writes it.
"""

import re

from chat_ticket_svc import errors

PATTERN = re.compile(r"[0-9]{1,18}\.[0-9a-f]{16}(-[0-9]{1,18}\.[0-9a-f]{16})*")

MAX_CHARACTERS = 8192


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
    shared = max(0, shared_revision(epoch, revision, current_epoch, current_revision))
    if shared != revision:
        raise errors.HistoryChangedError(shared, current_epoch)
