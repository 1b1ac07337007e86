"""Runs dbmate over the migrations. The lock makes concurrent runs wait for one another."""

import os
import subprocess
import sysconfig
from pathlib import Path

from chat_ticket_svc.store.schema import MIGRATIONS


def dbmate(url: str, *command: str, quiet: bool = False) -> int:
    """Run a dbmate command on the database of `url`; returns its exit status."""
    return subprocess.run(  # noqa: S603 - our own binary
        [
            Path(sysconfig.get_path("scripts")) / "dbmate",
            "--migrations-dir",
            MIGRATIONS,
            "--migration-lock",
            "--no-dump-schema",
            *command,
        ],
        # Not as an argument: the URL holds a password, and arguments are there for all to see.
        env={**os.environ, "DATABASE_URL": url},
        stdout=subprocess.DEVNULL if quiet else None,
        check=False,
    ).returncode
