"""The examples, against a running service."""

import asyncio
import contextlib
import random
import re
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from support.tools import run_program

from chat_ticket_svc.server import Server

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"

SHOWN = [
    "created a session",
    "1 USER: Where is my order?",
    "2 ASSISTANT: On its way.",
    "opened the ticket 'Where is my order?'",
    "refused: INVALID_ARGUMENT: message.content: required; "
    "message.metadata_json: not a JSON object",
    "  message.content: required",
    "  message.metadata_json: not a JSON object",
    "refused: SESSION_HAS_ACTIVE_TICKET: the session's ticket is open or pending",
    "resolved",
]
WATCHED_MESSAGES = [
    "message 1: Where is my order?",
    "message 2: On its way.",
    "message 3: For a month. Let me talk to you!",
]
WATCHED_SESSION = [
    "CHAT_SESSION_STATUS_ACTIVE, has ticket: false",
    "CHAT_SESSION_STATUS_ACTIVE, has ticket: true",
    "CHAT_SESSION_STATUS_RESOLVED, has ticket: true",
]
STREAMED = [
    "reader: 1 sheep, 2 sheep, 3 shee…",
    "reader: cut off",
    "reader: back, with all that came before: true",
    "model: closed",
    "writer: CHAT_MESSAGE_STATE_STOPPED",
    "reader: the message is that of the writer: true",
]
CUTS = 12


Command = Callable[..., list[str]]


@pytest.fixture(params=["python", "node"])
def command(request: pytest.FixtureRequest) -> Command:
    """`command(example)`: how an example is run, in one of the languages."""
    if request.param == "python":
        return lambda name: [sys.executable, str(EXAMPLES / "python" / f"{name}.py")]
    request.getfixturevalue("node_client")
    return lambda name: ["node", str(EXAMPLES / "node" / f"{name}.mjs")]


async def run(*command: str) -> str:
    """What a program prints, which succeeds."""
    output, errors = await run_program(*command)
    # The client warns of connections that break.
    lines = errors.splitlines()
    assert all("resumes after" in line or "retrying for" in line for line in lines), lines
    return output


def lowered(output: str) -> list[str]:
    """The lines, with the booleans of Python as those of JavaScript."""
    return re.sub("True|False", lambda word: word[0].lower(), output).splitlines()


def parted(output: str) -> tuple[list[str], list[str]]:
    """The lines of an example itself, and those of its watch."""
    lines, mark = lowered(output), "  [watch] "
    watched = [line.removeprefix(mark) for line in lines if line.startswith(mark)]
    return [line for line in lines if not line.startswith(mark)], watched


@contextlib.asynccontextmanager
async def cutting(port: int) -> AsyncIterator[int]:
    """The port of a proxy that cuts its first connections, each instead of passing an answer on."""
    chance, connections = random.Random(7), 0
    links: set[asyncio.Task[None]] = set()

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, chunks: int) -> None:
        while chunks and (data := await reader.read(65536)):
            chunks -= 1
            if chunks:
                writer.write(data)

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        links.add(asyncio.current_task())  # type: ignore[arg-type]
        chunks = chance.randint(3, 8) if connections <= CUTS else sys.maxsize
        upstream_reader, upstream = await asyncio.open_connection("127.0.0.1", port)
        pumps = [
            asyncio.create_task(pump(reader, upstream, sys.maxsize)),
            asyncio.create_task(pump(upstream_reader, writer, chunks)),
        ]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in pumps:
                task.cancel()
            upstream.transport.abort()
            writer.transport.abort()
            await asyncio.gather(*pumps, return_exceptions=True)

    proxy = await asyncio.start_server(connected, "127.0.0.1", 0)
    try:
        yield proxy.sockets[0].getsockname()[1]
    finally:
        proxy.close()
        for link in links:
            link.cancel()
        await asyncio.gather(*links, return_exceptions=True)
    assert connections > 3, "too few to mean anything"


async def test_example_shows_what_it_does(server: Server, command: Command) -> None:
    """And its watch delivers the same."""
    shown, watched = parted(await run(*command("support_chat"), f"localhost:{server.port}"))
    assert shown == SHOWN
    assert [line for line in watched if line.startswith("message")] == WATCHED_MESSAGES
    states = [line for line in watched if line.startswith("CHAT")]
    # The watch begins at some time, and states that pass quickly may coalesce.
    assert states == [state for state in WATCHED_SESSION if state in states]
    assert states[-1] == WATCHED_SESSION[-1]


async def test_example_does_the_same_over_a_bad_network(server: Server, command: Command) -> None:
    """Everything is delivered once, even if the connection breaks repeatedly."""
    async with cutting(server.port) as port:
        shown, watched = parted(await run(*command("support_chat"), f"localhost:{port}"))
    assert shown == SHOWN
    assert [line for line in watched if line.startswith("message")] == WATCHED_MESSAGES
    assert WATCHED_SESSION[-1] in watched


async def test_streamed_answer_is_read_and_stopped(server: Server, command: Command) -> None:
    """By a reader that is cut off, and by another process."""
    output = await run(*command("streamed_answer"), f"localhost:{server.port}")
    assert lowered(output) == STREAMED


async def test_streamed_answer_does_the_same_over_a_bad_network(
    server: Server, command: Command
) -> None:
    """Nothing is lost or doubled, for the writer and the reader alike."""
    async with cutting(server.port) as port:
        output = await run(*command("streamed_answer"), f"localhost:{port}")
    assert lowered(output) == STREAMED
