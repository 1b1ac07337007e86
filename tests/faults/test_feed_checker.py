"""The checker of the tenant's feed finds what it must, in what followers were told."""

import pytest

from faults.feed_audit import Audit, Change, SessionState, Snapshot, State, Stored
from faults.feed_checker import check_audit, check_feed
from faults.feed_record import Checkpoint, Event, FeedRecord, Filters, Told

ONE, TWO, THREE = (("session", name) for name in "123")
ACTIVE, RESOLVED = SessionState("active", False), SessionState("resolved", False)
ACTIVE_ONLY = Filters(statuses=("active",))

# Transaction 10 is committed after 11.
AUDIT = Audit.of(
    [
        Change(ONE, 0, 5, ACTIVE),
        Change(TWO, 0, 6, ACTIVE),
        Change(THREE, 0, 6, ACTIVE),
        Change(TWO, 1, 11, RESOLVED),
        Change(ONE, 1, 10, RESOLVED),
        Change(ONE, 2, 12, ACTIVE),
        Change(THREE, 1, 12, RESOLVED),
        Change(TWO, 1, 13, None),
    ],
    {ONE: Stored(2, ACTIVE), THREE: Stored(1, RESOLVED)},
)
STARTED = Snapshot(7, 7, frozenset())  # all sessions had been created

# What a follower is told. A number is a checkpoint: all transactions below had ended.
Story = list[Told | int]


def state(key: tuple[str, str], revision: int, shown: State) -> Told:
    return Told(key, Event.STATE, revision, shown)


def deleted(key: tuple[str, str]) -> Told:
    return Told(key, Event.DELETED)


def left(key: tuple[str, str]) -> Told:
    return Told(key, Event.LEFT)


CREATED: Story = [state(each, 0, ACTIVE) for each in (ONE, TWO, THREE)]
END: Story = [state(ONE, 2, ACTIVE), state(THREE, 1, RESOLVED), deleted(TWO), 99]
END_OF_ACTIVE: Story = [state(ONE, 2, ACTIVE), left(THREE), deleted(TWO), 99]


def violations(story: Story, *, from_beginning: bool = True, active_only: bool = False) -> str:
    filters = ACTIVE_ONLY if active_only else Filters()
    feed = FeedRecord(tenant="t", filters=filters, from_beginning=from_beginning, began=STARTED)
    for each in story:
        if isinstance(each, int):
            feed.checkpoints.append(Checkpoint(len(feed.told), each))
        else:
            feed.told.append(each)
    return str(list(check_feed(feed, AUDIT)))


@pytest.mark.parametrize(
    "story",
    [
        END,
        [*CREATED, *END],
        [*CREATED, 7, state(TWO, 1, RESOLVED), 10, state(ONE, 1, RESOLVED), 12, *END],
        [*CREATED, *END[:-1], 8, *CREATED, *END],
    ],
)
def test_follower_may_be_told_late_or_twice(story: Story) -> None:
    """States coalesce, and transactions that run hold up those after them."""
    assert violations(story) == "[]"
    assert violations(story, from_beginning=False) == "[]"


@pytest.mark.parametrize(
    "story",
    [
        END_OF_ACTIVE,
        [*CREATED, 7, left(TWO), 10, left(ONE), 12, *END_OF_ACTIVE],
        [*CREATED, *END_OF_ACTIVE],
    ],
)
def test_follower_with_a_filter_holds_what_matches(story: Story) -> None:
    """What has left is not held any more, and may come back."""
    assert violations(story, active_only=True) == "[]"
    assert violations(story, active_only=True, from_beginning=False) == "[]"


@pytest.mark.parametrize(
    ("story", "found"),
    [
        ([*CREATED, *END[1:]], "was not told session 1 at 2 (transaction 12), only at 0"),
        (END[1:], "was not told session 1 at 2 (transaction 12)"),
        ([*CREATED, state(TWO, 1, RESOLVED), 12, *END], "told session 1 at 1 (transaction 10), on"),
        ([*CREATED, *END[:2], 99], "still holds session 2 at 1 (transaction 13), which was del"),
        ([*END[:-1], CREATED[1], 99], "still holds session 2"),
        ([*END[:2], 99], "was not told that session 2 was deleted"),
        ([state(ONE, 3, ACTIVE), *END], "was told a state of session 1 at 3 that was never comm"),
        ([state(ONE, 2, RESOLVED), *END], "was told a state of session 1 at 2 that was never comm"),
        ([deleted(ONE), *END], "was told that session 1 was deleted, which is there"),
        (END[:-1], "has never caught up"),
    ],
)
def test_checker_finds_what_was_not_told(story: Story, found: str) -> None:
    """A change, a deletion or an order; also if a later state hides it in the end."""
    assert found in violations(story)


@pytest.mark.parametrize(
    ("story", "found"),
    [
        ([*CREATED, 12, *END_OF_ACTIVE], "still holds session 1 at 1 (transaction 10), which has"),
        ([*CREATED, *END], "was told session 3 at 1, which does not match"),
        ([END[0], deleted(TWO), 99], "was not told that session 3 has left"),
        ([*END_OF_ACTIVE[:-1], left(ONE), 99], "was not told session 1 at 2"),
    ],
)
def test_checker_finds_what_has_not_left(story: Story, found: str) -> None:
    """Also of a follower that began when the session matched, and was not told it."""
    assert found in violations(story, active_only=True, from_beginning=False)


def test_audit_is_what_the_tables_have() -> None:
    """Otherwise it proves nothing."""
    assert list(check_audit(AUDIT)) == []
    for stored in ({}, {**AUDIT.stored, TWO: Stored(1, RESOLVED)}, {ONE: Stored(1, ACTIVE)}):
        assert list(check_audit(AUDIT._replace(stored=stored)))
