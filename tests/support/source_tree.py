"""The files of the service's source tree, and the packages that they belong to."""

from pathlib import Path

import chat_ticket_svc

ROOT = Path(chat_ticket_svc.__file__).parent
PSYCOPG = {"store", "watch"}


def room(path: Path) -> str:
    """The module or package of a file that LAYERS names."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[0]


FILES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")
