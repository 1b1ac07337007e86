"""Log lines that repeat are counted."""

from chat_ticket_svc.telemetry.repeats import INTERVAL_SECONDS, RepeatCounter


def test_repeated_lines_are_counted_for_a_minute() -> None:
    """The first passes at once. Then one a minute passes, with the number of those before it."""
    now = 0.0
    counter = RepeatCounter(lambda: now)
    assert [counter.count("a") for _ in range(3)] == [0, None, None]
    assert counter.count("b") == 0
    now = INTERVAL_SECONDS
    assert counter.count("a") == 2
    assert counter.count("b") == 0
    assert counter.count("a") is None
