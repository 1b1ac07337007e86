"""The service config that callers are given: reads are retried on UNAVAILABLE, nothing else is."""

import asyncio
import json
import signal
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from grpc import StatusCode
from support.client import Api
from support.process import ServerProcess, server_process
from support.service_config import FILE, Callers, Counts, service_config_json

from chat_ticket.v1.chat_session_pb2 import GetChatSessionRequest
from chat_ticket_svc.access.method_permissions import READ_METHODS

TESTS = Path(__file__).parents[1]
OK, UNAVAILABLE = (code.value[0] for code in (StatusCode.OK, StatusCode.UNAVAILABLE))
# Of calls, before and after one of the servers ends: at least so long, and so many from Python.
SECONDS = 0.2
ANSWERS = 20


def test_service_config_retries_exactly_the_reads() -> None:
    """A new read is to be added to it; a write never."""
    [policy] = json.loads(FILE.read_text())["methodConfig"]
    names = [f"/{name['service']}/{name['method']}" for name in policy["name"]]
    assert sorted(names) == sorted(READ_METHODS), "gRPC refuses a config that has one twice"
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
}


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


class Outcomes(NamedTuple):
    """The outcomes of calls from Python and Node while one of two servers ended."""

    python: Counts
    node: Counts
    stored: int  # how many messages the session has


@pytest.fixture
def end_one_under_load(
    servers: list[ServerProcess], node: str, tenant: str
) -> Callable[[int, str], Awaitable[Outcomes]]:
    async def end(number: int, service_config: str) -> Outcomes:
        for server in servers:
            server.wait_for("serving")
        addresses = "ipv4:" + ",".join(server.address for server in servers)
        async with Api(servers[1].address, tenant) as api:
            session = await api.session()
            arguments = (addresses, tenant, session.id, service_config)
            python, js = Callers(*arguments), NodeCallers(node, *arguments)
            await js.start()
            python.start()
            await asyncio.gather(asyncio.sleep(SECONDS), python.answered(ANSWERS))
            if number == signal.SIGKILL:
                # So that calls are in flight when it is killed: most take a millisecond.
                servers[0].popen.send_signal(signal.SIGSTOP)
                await asyncio.sleep(0.1)
            await asyncio.to_thread(servers[0].stop, number)
            await asyncio.gather(asyncio.sleep(SECONDS), python.answered(ANSWERS))
            outcomes = await python.stop(), await js.stop()
            request = GetChatSessionRequest(session_id=session.id)
            found = await api.sessions.GetChatSession(request)
        for counts in outcomes:
            assert all(of[OK] > 5 for of in counts.values()), "too few to mean anything"
        return Outcomes(*outcomes, found.session.revision)

    return end


async def test_no_call_fails_while_a_server_drains(
    end_one_under_load: Callable[[int, str], Awaitable[Outcomes]],
) -> None:
    """Also not of callers without the service config, who call again as soon as they can."""
    outcomes = await end_one_under_load(signal.SIGTERM, service_config_json(retries=False))
    for counts in (outcomes.python, outcomes.node):
        failed = sum((of - Counter({OK: of[OK]}) for of in counts.values()), Counter())
        assert not failed, counts
    assert outcomes.stored == outcomes.python["write"][OK] + outcomes.node["write"][OK]


async def test_reads_survive_a_server_that_is_killed(
    end_one_under_load: Callable[[int, str], Awaitable[Outcomes]],
) -> None:
    """Their callers never hear of it; those of writes do, which are not called again for them.

    Nor is a stream of which something was received.
    """
    outcomes = await end_one_under_load(signal.SIGKILL, service_config_json(retries=True))
    for counts in (outcomes.python, outcomes.node):
        assert counts["read"].keys() == {OK}, counts
    writes = outcomes.python["write"] + outcomes.node["write"]
    assert writes.keys() == {OK, UNAVAILABLE}
    assert writes[OK] <= outcomes.stored <= writes.total()


async def test_reads_fail_without_the_service_config(
    end_one_under_load: Callable[[int, str], Awaitable[Outcomes]],
) -> None:
    """Without the service config: it is what helps."""
    outcomes = await end_one_under_load(signal.SIGKILL, service_config_json(retries=False))
    reads = [
        counts[kind] for counts in (outcomes.python, outcomes.node) for kind in ("read", "stream")
    ]
    assert sum(reads, Counter()).keys() == {OK, UNAVAILABLE}
