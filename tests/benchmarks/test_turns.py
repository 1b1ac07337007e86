"""Works that are measured in turns."""

from concurrent.futures import CancelledError

import pytest

from benchmarks.turns import run_in_turns


def test_each_makes_a_step_before_any_makes_the_next():
    """The order changes from step to step, so that none is always the first."""
    steps = []

    def work(name):
        def steps_of(pause):
            for number in range(20):
                pause()
                steps.append((number, name))
            return name

        return steps_of

    assert run_in_turns([work("this"), work("that")]) == ["this", "that"]
    assert [number for number, _ in steps] == [number for number in range(20) for _ in range(2)]
    assert {steps[at][1] for at in range(0, 40, 2)} == {"this", "that"}


def test_one_may_end_before_the_other():
    """The other goes on alone."""

    def long(pause):
        for _ in range(3):
            pause()
        return "long"

    assert run_in_turns([lambda _: "short", long]) == ["short", "long"]


def test_the_error_of_one_ends_the_other_where_it_has_paused():
    """So that servers and databases of both are cleaned up before the error is raised."""
    ended = []

    def endless(pause):
        try:
            while True:
                pause()
        except CancelledError:
            ended.append("the other")
            raise

    def failing(pause):
        pause()
        raise ValueError("a failed call")

    with pytest.raises(ValueError, match="a failed call"):
        run_in_turns([endless, failing])
    assert ended == ["the other"]
