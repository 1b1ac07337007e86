"""The responses of WatchChatSessions to followers of one tenant."""

from chat_ticket_svc.services import change_feed_events
from chat_ticket_svc.services.change_feed_cursor import Cursor
from chat_ticket_svc.services.change_feed_events import SessionFilter
from chat_ticket_svc.store.change_feed import SESSION, Page, Place, Row


def test_followers_with_many_filters_keep_no_more_than_the_rows() -> None:
    """Pages are kept as long as the tenant is followed."""
    row = Row(
        SESSION, 1, "id", "active", False, 1, 0, 0, None, "x" * 255, None, "0.epoch", 1, None,
        None, 0,
    )  # fmt: skip
    page = Page(Place(1), Place(2), [row] * 100, "epoch", 2, 2, None)
    everything = SessionFilter(None, None, None, {})
    cursor = Cursor(Place(1), "epoch", None)
    for number in range(50):
        made, _ = change_feed_events.responses(
            page, everything, "tenant", f"filter {number}", cursor, frozenset()
        )
        assert len(made[0]) > 100 * 255
    assert 0 < sum(len(r) for kept, _ in page.cache.values() for r in kept) <= page.size
