"""What has arrived from PostgreSQL is read without waiting for it."""

import socket
from collections.abc import Generator

from psycopg.waiting import READY_R, WAIT_R

from chat_ticket_svc.store.connection import _read_arrived


def test_waits_only_when_nothing_has_arrived() -> None:
    """A read of what is there follows the one before at once."""
    ours, theirs = socket.socketpair()
    read: list[bytes] = []

    def reading() -> Generator[int, int, str]:
        while len(read) < 4:
            if (yield WAIT_R) & READY_R:
                read.append(ours.recv(2))
        return "all"

    with ours, theirs:
        steps = _read_arrived(reading(), ours.fileno())  # type: ignore[arg-type]
        assert next(steps) == WAIT_R
        assert steps.send(0) == WAIT_R, "the time to wait was over"
        assert read == []
        theirs.sendall(b"abcdef")
        assert steps.send(READY_R) == WAIT_R
        assert read == [b"ab", b"cd", b"ef"]
        theirs.sendall(b"gh")
        try:
            steps.send(READY_R)
        except StopIteration as end:
            assert end.value == "all"
        else:
            raise AssertionError("it has not ended")
