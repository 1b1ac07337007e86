"""What the Python client imports, and what its channel is configured with."""

import ast
import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

import chat_ticket
from chat_ticket.client import AsyncChatTicketClient, channel_options

ROOT = Path(__file__).parents[2]


class TestPackage:
    def test_needs_nothing_of_the_service(self) -> None:
        """Callers install grpcio and protobuf, and import no more than that."""
        program = """
import sys, grpc.aio
before = set(sys.modules)
import chat_ticket.client
added = sys.modules.keys() - before
print(*{name.split(".")[0] for name in added}, *{name for name in added if "google.rpc" in name})
"""
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, check=True, text=True, timeout=60
        )
        names = set(done.stdout.split()) - sys.stdlib_module_names
        assert "chat_ticket" in names
        assert names <= {"chat_ticket", "google", "grpc"}
        assert "google.rpc" not in done.stdout

    def test_functions_import_nothing_of_the_service(self) -> None:
        """Nor within a function."""
        for path in Path(chat_ticket.__file__).parent.rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                assert not (isinstance(node, ast.Import) and "svc" in node.names[0].name)
                assert not (isinstance(node, ast.ImportFrom) and "svc" in (node.module or ""))

    def test_channel_has_the_service_config(self) -> None:
        """The reads of two servers of which one is killed are in test_client_resume.py."""
        path = ROOT / "protos/chat_ticket/v1/chat_ticket_grpc_service_config.json"
        assert dict(channel_options())["grpc.service_config"] == path.read_text()

    async def test_has_to_be_made_in_an_event_loop(self) -> None:
        """Said at once: gRPC would take another loop, in which no call ends."""
        with pytest.raises(RuntimeError, match="no running event loop"):
            await asyncio.to_thread(AsyncChatTicketClient, "localhost:1")
