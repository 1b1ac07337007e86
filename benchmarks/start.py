"""The time from the start of a server to its first answered call, with a running database.

Compared with a Python process that only imports grpc.aio and psycopg, which is the lower bound.
"""

import contextlib
import os
import socket
import subprocess
import sys
import time

import grpc

from benchmarks.figures import Figure
from benchmarks.service import UNLIMITED, Bench
from chat_ticket.v1.chat_session_pb2 import ListChatSessionsRequest
from chat_ticket.v1.chat_session_pb2_grpc import ChatSessionServiceStub

NAME = "start"
SECONDS = 15

TARGET_SECONDS = 1.5


def measure(bench: Bench) -> list[Figure]:
    with bench.postgres.database() as url:
        rounds = [(_first_answer(url), _bare_python()) for _ in range(2 * bench.rounds)]
    starts, imports = zip(*rounds, strict=True)
    return [
        Figure(
            part=NAME,
            name="start to the first answered call",
            unit="s",
            measured=starts,
            must=TARGET_SECONDS,
            at_most=True,
            note=f"{max(starts):.2f} s at most",
        ),
        Figure(
            part=NAME,
            name="start to the first answered call",
            unit="s",
            measured=starts,
            limit=imports,
            against="import grpc.aio, psycopg",
            at_most=True,
        ),
    ]


def _first_answer(url: str) -> float:
    """The seconds from the start of the process to the answer of a call that reads the database."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    started_at = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "chat_ticket_svc", "serve", "--port", str(port)],
        env={**os.environ, **UNLIMITED, "DATABASE_URL": url},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        # gRPC would wait a second after the first failed connection.
        while process.poll() is None:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.005)
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = ChatSessionServiceStub(channel)
            stub.ListChatSessions(
                ListChatSessionsRequest(), metadata=(("x-tenant-id", "start"),), timeout=30
            )
        return time.monotonic() - started_at
    finally:
        process.terminate()
        process.wait()


def _bare_python() -> float:
    started_at = time.monotonic()
    subprocess.run([sys.executable, "-c", "import grpc.aio, psycopg"], check=True)
    return time.monotonic() - started_at
