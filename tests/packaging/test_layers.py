"""The structure of the code: imports point downward, and each library has its room."""

import ast
from pathlib import Path
from typing import Any

import pytest
from support.source_tree import FILES, PSYCOPG, ROOT, room

from chat_ticket.v1 import resources_pb2 as r
from chat_ticket_svc.services import convert

# From the top: a module may import those below it. One row holds what may not import each other,
# but for the modules of a package among themselves.
LAYERS = [
    ["__main__"],
    ["cli"],
    ["commands"],
    ["server"],
    ["rpc"],
    ["services"],
    ["watch"],
    ["store"],
    ["access"],
    ["shutdown", "workers"],
    ["embedded", "telemetry"],
    ["errors"],
    ["addresses", "config", "event_engine", "reasons", "timeouts"],
    ["limits", "search_language", "tasks"],
]
SERVICERS = {"attachment_access", "attachments", "drafts", "messages", "sessions", "tickets"}
GRPC = {"access", "commands", "rpc", "server", "services"}


def layer(module: str) -> int:
    return next(index for index, row in enumerate(LAYERS) if module in row)


def imports(path: Path) -> set[str]:
    """The dotted names of everything a file imports, also inside of functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_downward(path: Path) -> None:
    """cli → server → services → store → errors, and never back."""
    here = room(path)
    for name in imports(path):
        if name.startswith("chat_ticket_svc."):
            there = name.split(".")[1]
            assert there == here or layer(there) > layer(here), f"{here} imports {there}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_drivers_stay_in_their_rooms(path: Path) -> None:
    """psycopg is imported by the store and by watch; gRPC by neither of them."""
    names = {name.split(".")[0] for name in imports(path)}
    if names & {"psycopg", "psycopg_pool"}:
        assert room(path) in PSYCOPG
    if names & {"grpc", "grpc_status", "grpc_health", "grpc_reflection"}:
        assert room(path) in GRPC
    if names & {"chat_ticket"}:
        assert room(path) not in {"store", "watch", "errors"}


def test_services_have_no_sql_and_no_try() -> None:
    """A servicer is a request, store calls, and a response; errors pass through."""
    for path in (ROOT / "services").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            # A finally may release what was taken; an except would hide an error's status.
            if path.stem in SERVICERS:
                assert not (isinstance(node, ast.Try) and node.handlers), path.name
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert "SELECT " not in node.value, path.name


@pytest.mark.parametrize(
    ("names", "enum"),
    [
        (convert.SESSION_STATUS, r.ChatSessionStatus),
        (convert.MESSAGE_ROLE, r.ChatMessageRole),
        (convert.TICKET_STATUS, r.TicketStatus),
    ],
)
def test_database_has_the_names_of_the_enums(names: dict[str, int], enum: Any) -> None:
    """What is stored means the same to who reads the database as to who reads the API."""
    prefix = enum.Name(0).removesuffix("UNSPECIFIED")
    assert names == {
        name.removeprefix(prefix).lower(): value for name, value in enum.items() if value
    }
