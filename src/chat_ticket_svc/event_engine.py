"""gRPC's EventEngine, which does not read the connections of a server.

By default its threads read them, and hand what they have read to the thread that takes completed
operations to the event loop. With the listener off, that thread reads the connections itself: a
create costs 4 % less CPU time, a read 8 %, and an empty call a fifth.

gRPC calls the switch an experiment, and is to remove it one day. The server then runs as before,
at the higher cost, and says so when it starts.
"""

from collections.abc import Iterator, MutableMapping
from pathlib import Path

VARIABLE = "GRPC_EXPERIMENTS"
WITHOUT_LISTENER = "-event_engine_listener"


def disable_listener(environment: MutableMapping[str, str]) -> None:
    """Turn the listener off, unless the environment turns it on.

    It has an effect only before gRPC is imported.
    """
    # The last mention of an experiment counts.
    environment[VARIABLE] = ",".join(filter(None, (WITHOUT_LISTENER, environment.get(VARIABLE))))


def is_listening() -> bool:
    """Whether the EventEngine waits for the connections of a server in this process.

    gRPC does not tell. So this looks for a thread of the EventEngine that waits for a socket, and
    returns False where the kernel does not show it.
    """
    try:
        return any(
            _target(descriptor).startswith("socket:")
            for poller in _pollers("event_engine")
            for descriptor in _watched(poller)
        )
    except OSError:
        return False


def _pollers(thread_name: str) -> Iterator[int]:
    """The epoll descriptors for which threads of this name wait."""
    for thread in Path("/proc/self/task").iterdir():
        if (thread / "comm").read_text().strip() == thread_name:
            # The number of a system call and its arguments, or one word for a thread that runs.
            _, *arguments = (thread / "syscall").read_text().split()
            if arguments and _target(int(arguments[0], 16)) == "anon_inode:[eventpoll]":
                yield int(arguments[0], 16)


def _watched(poller: int) -> Iterator[int]:
    """The descriptors that an epoll descriptor watches."""
    for line in Path(f"/proc/self/fdinfo/{poller}").read_text().splitlines():
        if line.startswith("tfd:"):
            yield int(line.split()[1])


def _target(descriptor: int) -> str:
    """What a descriptor refers to; empty if it is not open."""
    try:
        return str(Path(f"/proc/self/fd/{descriptor}").readlink())
    except FileNotFoundError:
        return ""
