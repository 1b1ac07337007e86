"""The service config that callers are given: reads are retried on UNAVAILABLE, nothing else is."""

import asyncio
import json
import signal
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import grpc.aio
import pytest
from grpc import StatusCode
from support.client import Api
from support.process import ServerProcess, server_process

from chat_ticket.v1 import resources_pb2 as r
from chat_ticket.v1.chat_message_pb2 import CreateChatMessageRequest, ListChatMessagesRequest
from chat_ticket.v1.chat_session_pb2 import GetChatSessionRequest
from chat_ticket_svc.access.method_permissions import READ_METHODS

TESTS = Path(__file__).parents[1]
FILE = TESTS.parent / "protos/chat_ticket/v1/chat_ticket_grpc_service_config.json"
OK, UNAVAILABLE = (code.value[0] for code in (StatusCode.OK, StatusCode.UNAVAILABLE))
CALLERS = 8  # of each kind, in each language
SECONDS = 0.5  # of calls, before and after one of the servers ends

Counts = dict[str, Counter[int]]


def config(*, retries: bool) -> str:
    """The file as it is, or without what it says of retries; over all servers in turn."""
    shipped = json.loads(FILE.read_text()) if retries else {}
    return json.dumps({"loadBalancingConfig": [{"round_robin": {}}], **shipped})


def test_it_names_exactly_the_reads() -> None:
    """A new read is to be added to it; a write never."""
    [policy] = json.loads(FILE.read_text())["methodConfig"]
    assert {f"/{name['service']}/{name['method']}" for name in policy["name"]} == READ_METHODS
    assert policy["retryPolicy"]["retryableStatusCodes"] == ["UNAVAILABLE"]


@pytest.fixture
def servers(database: str) -> Iterator[list[ServerProcess]]:
    with (
        server_process(database, **SETTINGS) as one,
        server_process(database, **SETTINGS) as other,
    ):
        yield [one, other]


SETTINGS = {
    "CHAT_TICKET_QUOTAS__TENANT_CALLS_PER_SECOND": "100000",
    "CHAT_TICKET_ATTACHMENT_URL_CHECK": "false",
}


class Callers:
    """Python callers of reads, streams and writes, until they are to stop."""

    def __init__(self, addresses: str, tenant: str, session_id: str, service_config: str):
        self._api = Api(
            addresses,
            tenant,
            options=[
                ("grpc.service_config", service_config),
                ("grpc.use_local_subchannel_pool", 1),
            ],
        )
        self._session_id = session_id
        self._stopped = False
        self._counts: Counts = {"read": Counter(), "stream": Counter(), "write": Counter()}
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        kinds = (("read", self._read), ("stream", self._stream), ("write", self._write))
        self._tasks = [
            asyncio.create_task(self._repeat(kind, call))
            for kind, call in kinds
            for _ in range(CALLERS)
        ]

    async def stop(self) -> Counts:
        self._stopped = True
        await asyncio.gather(*self._tasks)
        await self._api.channel.close()
        return self._counts

    async def _repeat(self, kind: str, call: Any) -> None:
        while not self._stopped:
            code = StatusCode.OK
            try:
                await call()
            except grpc.aio.AioRpcError as error:
                code = error.code()
            self._counts[kind][code.value[0]] += 1

    async def _read(self) -> None:
        await self._api.sessions.GetChatSession(GetChatSessionRequest(session_id=self._session_id))

    async def _stream(self) -> None:
        async for _ in self._api.messages.ListChatMessages(
            ListChatMessagesRequest(session_id=self._session_id, limit=1)
        ):
            pass

    async def _write(self) -> None:
        message = r.ChatMessage(role=r.CHAT_MESSAGE_ROLE_USER, content="once")
        request = CreateChatMessageRequest(session_id=self._session_id, message=message)
        await self._api.messages.CreateChatMessage(request)


class NodeCallers:
    """The same from Node."""

    def __init__(self, node: str, *arguments: str):
        self._command = [node, str(TESTS / "support" / "node" / "reader.mjs"), *arguments]

    async def start(self) -> None:
        pipe = asyncio.subprocess.PIPE
        self._process = await asyncio.create_subprocess_exec(
            *self._command, stdin=pipe, stdout=pipe
        )
        assert self._process.stdout is not None
        assert await self._process.stdout.readline() == b"reading\n"

    async def stop(self) -> Counts:
        output, _ = await self._process.communicate(b"")
        counts: dict[str, dict[str, int]] = json.loads(output)
        return {
            kind: Counter({int(code): count for code, count in of.items()})
            for kind, of in counts.items()
        }


class Told(NamedTuple):
    """What callers in Python and in Node were told while one of two servers ended."""

    python: Counts
    node: Counts
    stored: int  # how many messages the session has


@pytest.fixture
def end_one_under_load(
    servers: list[ServerProcess], node: str, tenant: str
) -> Callable[[int, str], Awaitable[Told]]:
    async def end(number: int, service_config: str) -> Told:
        for server in servers:
            server.wait_for("serving")
        addresses = "ipv4:" + ",".join(server.address for server in servers)
        async with Api(servers[1].address, tenant) as api:
            session = await api.session()
            arguments = (addresses, tenant, session.id, service_config)
            python, js = Callers(*arguments), NodeCallers(node, *arguments)
            await js.start()
            python.start()
            await asyncio.sleep(SECONDS)
            await asyncio.to_thread(servers[0].stop, number)
            await asyncio.sleep(SECONDS)
            told = await python.stop(), await js.stop()
            request = GetChatSessionRequest(session_id=session.id)
            found = await api.sessions.GetChatSession(request)
        for counts in told:
            assert all(of[OK] > 5 for of in counts.values()), "too few to mean anything"
        return Told(*told, found.session.revision)

    return end


async def test_no_call_fails_while_a_server_drains(
    end_one_under_load: Callable[[int, str], Awaitable[Told]],
) -> None:
    """Also not of callers without the service config, who call again as soon as they can."""
    told = await end_one_under_load(signal.SIGTERM, config(retries=False))
    for counts in (told.python, told.node):
        failed = sum((of - Counter({OK: of[OK]}) for of in counts.values()), Counter())
        assert not failed, counts
    assert told.stored == told.python["write"][OK] + told.node["write"][OK]


async def test_reads_survive_a_server_that_is_killed(
    end_one_under_load: Callable[[int, str], Awaitable[Told]],
) -> None:
    """Their callers never hear of it; those of writes do, which are not called again for them.

    Nor is a stream of which something was received.
    """
    told = await end_one_under_load(signal.SIGKILL, config(retries=True))
    for counts in (told.python, told.node):
        assert counts["read"].keys() == {OK}, counts
    writes = told.python["write"] + told.node["write"]
    assert writes.keys() == {OK, UNAVAILABLE}
    assert writes[OK] <= told.stored <= writes.total()


async def test_reads_fail_with_it_when_nothing_retries_them(
    end_one_under_load: Callable[[int, str], Awaitable[Told]],
) -> None:
    """Without the service config: it is what helps."""
    told = await end_one_under_load(signal.SIGKILL, config(retries=False))
    reads = [counts[kind] for counts in (told.python, told.node) for kind in ("read", "stream")]
    assert sum(reads, Counter()).keys() == {OK, UNAVAILABLE}
