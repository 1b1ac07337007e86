"""What a follower of the tenant's feed was told is compared with the database's audit of commits.

A follower holds what it was told last of each session and ticket. At each checkpoint that must be
a state which the session had at its last change below the checkpoint, or later. So every change is
covered, although states coalesce.
"""

from collections.abc import Iterator, Sequence

from faults.feed_audit import Audit, Change, Key, Stored
from faults.feed_record import Event, FeedRecord, Told


def check_audit(audit: Audit) -> Iterator[str]:
    """The audit has what the tables have."""
    last = {
        key: Stored(history[-1].revision, history[-1].state)
        for key, history in audit.histories.items()
        if history[-1].state is not None
    }
    for key in last.keys() | audit.stored.keys():
        if last.get(key) != audit.stored.get(key):
            yield f"{' '.join(key)} is another one in the audit than in the tables"


def check_feed(feed: FeedRecord, audit: Audit) -> Iterator[str]:
    """What is wrong with what a follower was told."""
    if feed.began is None or not feed.checkpoints:
        yield "has never caught up"
        return
    follower = _Follower(feed, audit)
    changes = sorted(
        (
            (change.transaction, key, number)
            for key, history in audit.histories.items()
            for number, change in enumerate(history)
            if feed.from_beginning or not feed.began.sees(change.transaction)
        ),
    )
    due = told = 0
    for checkpoint in feed.checkpoints:
        touched = set()
        for event in feed.told[told : checkpoint.told]:
            yield from follower.take(event)
            touched.add(event.key)
        told = checkpoint.told
        while due < len(changes) and changes[due][0] < checkpoint.xmin:
            _, key, number = changes[due]
            follower.due[key] = max(number, follower.due.get(key, 0))
            touched.add(key)
            due += 1
        for key in sorted(touched):
            yield from follower.check(key)
    yield from follower.check_end()


class _Follower:
    """What a follower holds as its events are replayed."""

    def __init__(self, feed: FeedRecord, audit: Audit):
        self._feed = feed
        self._audit = audit
        self._held: dict[Key, int] = {}  # the number of the change in the history
        self._named = {
            event: {told.key for told in feed.told if told.event is event} for event in Event
        }
        self._numbers = {
            key: {
                change.revision: number
                for number, change in enumerate(history)
                if change.state is not None
            }
            for key, history in audit.histories.items()
        }
        # The last change of each that must have been told.
        self.due: dict[Key, int] = {}

    def take(self, told: Told) -> Iterator[str]:
        history = self._audit.histories.get(told.key, [])
        what = " ".join(told.key)
        if told.event is not Event.STATE:
            self._held.pop(told.key, None)
            if told.event is Event.DELETED and not (history and history[-1].state is None):
                yield f"was told that {what} was deleted, which is there"
            return
        number = self._numbers.get(told.key, {}).get(told.revision)
        if number is None or history[number].state != told.state:
            yield f"was told a state of {what} at {told.revision} that was never committed"
            return
        assert told.state is not None
        if not self._feed.filters.match(told.state):
            yield f"was told {what} at {told.revision}, which does not match"
        self._held[told.key] = number

    def check(self, key: Key) -> Iterator[str]:
        """What it holds is a state from its last due change on."""
        if key not in self.due:
            return
        history, due, held = self._audit.histories[key], self.due[key], self._held.get(key)
        what = (
            f"{' '.join(key)} at {history[due].revision} (transaction {history[due].transaction})"
        )
        if held is None:
            if all(self._is_shown(change) for change in history[due:]):
                yield f"was not told {what}"
        elif held < due:
            if history[due].state is None:
                yield f"still holds {what}, which was deleted"
            elif not self._is_shown(history[due]):
                yield f"still holds {what}, which has left"
            else:
                yield f"was not told {what}, only at {history[held].revision}"

    def check_end(self) -> Iterator[str]:
        """What was deleted or has left since it began was named, although it may not hold it."""
        began = self._feed.began
        assert began is not None
        for key, due in self.due.items():
            history = self._audit.histories[key]
            if began.sees(history[due].transaction):
                continue
            if history[due].state is None:
                if key not in self._named[Event.DELETED]:
                    yield f"was not told that {' '.join(key)} was deleted"
                continue
            before = _last_seen(history, self._feed)
            if (
                not self._feed.from_beginning
                and before is not None
                and self._is_shown(before)
                and not self._is_shown(history[due])
                and key not in self._named[Event.LEFT]
            ):
                yield f"was not told that {' '.join(key)} has left"

    def _is_shown(self, change: Change) -> bool:
        return change.state is not None and self._feed.filters.match(change.state)


def _last_seen(history: Sequence[Change], feed: FeedRecord) -> Change | None:
    """The last change that had been committed when the follower began."""
    assert feed.began is not None
    seen = [change for change in history if feed.began.sees(change.transaction)]
    return seen[-1] if seen else None
