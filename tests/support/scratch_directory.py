"""A directory for the data of a PostgreSQL, which is removed afterwards."""

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MEMORY = Path("/dev/shm")
ROOM_BYTES = 2 * 1024**3  # a container has 64 MiB there, unless it asks for more


@contextmanager
def scratch_directory() -> Iterator[Path]:
    """In memory where there is room: a database is created there in a tenth of the time.

    PostgreSQL can reach it also where it has to run as another user.
    """
    has_room = MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > ROOM_BYTES
    with tempfile.TemporaryDirectory(
        prefix="chat-ticket-tests-", dir=MEMORY if has_room else None, ignore_cleanup_errors=True
    ) as name:
        directory = Path(name)
        directory.chmod(0o711)
        yield directory


@contextmanager
def copied_data(data: Path) -> Iterator[Path]:
    """A copy of the data directory of a PostgreSQL that was stopped."""
    with scratch_directory() as directory:
        subprocess.run(["cp", "-a", data, directory / "data"], check=True)
        yield directory / "data"
