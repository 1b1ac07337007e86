"""Limits of the attachment URL check: bytes, seconds, name lookups, and concurrent checks."""

import asyncio
import gc
import socket
import threading
from collections.abc import Collection, Iterable
from typing import Any

import anyio
import pytest
from support.sites import (
    OK,
    PRIVATE,
    PUBLIC,
    Answer,
    dns,
    endless,
    name_server,
    paths,
    serve,
    silence,
    status,
)
from support.url_checkers import ANOTHER, TENANT, NewChecker, checker_allowing

from chat_ticket_svc.errors import ResourceExhaustedError
from chat_ticket_svc.services import attachment_url
from chat_ticket_svc.services.attachment_url import AttachmentUrlChecker

pytestmark = pytest.mark.asyncio


async def test_bodies_are_not_downloaded() -> None:
    """A body without end is cut off at once, whether it is a file's or a redirect's."""
    head = b"HTTP/1.1 %s\r\nContent-Length: 1000000000000\r\n\r\n"
    file, moved = head % b"200 OK", head % b"302 Found\r\nLocation: //other.test/"
    async with (
        asyncio.timeout(10),
        serve(endless(file, bytes(65536))) as store,
        serve(endless(moved, bytes(65536))) as mover,
    ):
        checker = checker_allowing(store, mover, timeout=60)
        urls = [f"http://{store.at}/", f"http://{mover.at}/"]
        assert await checker.find_inaccessible(TENANT, urls) == [1]
        await store.left.wait()
        await mover.left.wait()
        # The server sends what the kernel buffers on both sides, even if nobody reads it.
        assert max(store.sent, mover.sent) < 32 * 2**20


@pytest.mark.parametrize(
    ("head", "chunk"),
    [
        (b"", b"HTTP/1.1 103 Early Hints\r\n\r\n" * 100),
        (b"HTTP/1.1 200 OK\r\n", b"a: b\r\n" * 100),
        (b"HTTP/1.1 200 OK\r\na: ", b"b" * 1000),
    ],
    ids=["interim responses", "headers", "header"],
)
async def test_endless_headers(head: bytes, chunk: bytes) -> None:
    """An answer that is all headers is cut off by its size, long before the timeout."""
    async with serve(endless(head, chunk)) as site, asyncio.timeout(10):
        assert await checker_allowing(site, timeout=60).find_inaccessible(
            TENANT, [f"http://{site.at}/"]
        ) == [0]


@pytest.mark.parametrize(
    ("scheme", "answer"),
    [
        ("http", silence),
        ("http", endless(b"HTTP/1.1 200 OK\r\na: ", b"b", pause=0.02)),
        ("https", silence),
    ],
    ids=["silence", "slow headers", "silent handshake"],
)
async def test_slow(scheme: str, answer: Answer) -> None:
    """What has not answered in time, all URLs together, is inaccessible; what has, is not."""
    async with serve(answer) as slow, serve() as quick, asyncio.timeout(10):
        checker = AttachmentUrlChecker(
            schemes=("http", "https"), allowed_hosts=[slow.at, quick.at], timeout=0.75
        )
        urls = [f"{scheme}://{slow.at}/{number}" for number in range(5)]
        urls.insert(2, f"http://{quick.at}/")
        assert await checker.find_inaccessible(TENANT, urls) == [0, 1, 3, 4, 5]
        await slow.left.wait()


async def test_dead_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """An address that never answers leaves time for the name's next one."""
    connect = anyio.connect_tcp

    async def connect_tcp(remote_host: Any, remote_port: int, **options: Any) -> Any:
        if str(remote_host) != PRIVATE:
            await asyncio.Event().wait()
        return await connect(remote_host, remote_port, **options)

    monkeypatch.setattr(anyio, "connect_tcp", connect_tcp)
    async with serve() as site, asyncio.timeout(10):
        host = f"a.test:{site.port}"
        resolver = dns({"a.test": ["10.0.0.1", PRIVATE]})
        checker = AttachmentUrlChecker(
            schemes=("http",), allowed_hosts=[host], timeout=1.5, resolver=resolver
        )
        assert await checker.find_inaccessible(TENANT, [f"http://{host}/"]) == []


@pytest.mark.usefixtures("attempts")
async def test_many_addresses() -> None:
    """Eight addresses without a route do not hide the ninth."""
    async with serve() as site:
        host = f"a.test:{site.port}"
        resolver = dns({"a.test": [*(f"fc00::{number}" for number in range(8)), PRIVATE]})
        checker = AttachmentUrlChecker(schemes=("http",), allowed_hosts=[host], resolver=resolver)
        assert await checker.find_inaccessible(TENANT, [f"http://{host}/"]) == []


@pytest.mark.parametrize("host", [PRIVATE, PUBLIC], ids=["allowed", "public"])
async def test_hung_lookups(
    host: str, internet: NewChecker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lookups that hang hold up no other work; abandoned ones count as their tenant's checks."""
    monkeypatch.setattr(attachment_url, "_MAX_CHECKS", 60)
    monkeypatch.setattr(attachment_url, "_MAX_TENANT_CHECKS", 50)
    loop, hung, release = asyncio.get_running_loop(), asyncio.Queue[str](), threading.Event()

    def resolve(name: str, *rest: int) -> Iterable[Any]:
        if name == "slow.test":
            loop.call_soon_threadsafe(hung.put_nowait, name)
            release.wait()
        return dns({name: [host]})(name, *rest)

    async with serve(host=host) as site, asyncio.timeout(10), asyncio.TaskGroup() as group:
        slow, quick = (f"{name}.test:{site.port}" for name in ("slow", "quick"))
        allowed = [slow, quick] if host == PRIVATE else []
        checker = internet(site, allowed_hosts=allowed, timeout=2, resolver=resolve)
        urls = [f"http://{slow}/{number}" for number in range(45)]
        try:
            for hanging in (45, 5):
                check = group.create_task(checker.find_inaccessible(TENANT, urls[:hanging]))
                for _ in range(hanging):
                    await hung.get()
                assert await checker.find_inaccessible(ANOTHER, [f"http://{quick}/"]) == []
                assert await asyncio.to_thread(int) == await anyio.to_thread.run_sync(int) == 0
                check.cancel()
                await asyncio.wait([check])
            with pytest.raises(ResourceExhaustedError):
                await checker.find_inaccessible(TENANT, [f"http://{quick}/"])
            assert hung.empty()
        finally:
            release.set()
        assert await checker.find_inaccessible(TENANT, [f"http://{quick}/"]) == []
        del check  # its error holds the frames that it went through
        while checker._tenant_slots:
            gc.collect()
            await asyncio.sleep(0.01)


async def test_silent_name_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lookup of a public name ends by itself when the time is up."""
    async with name_server(monkeypatch, lambda *_: None) as ended:
        assert await AttachmentUrlChecker(timeout=0.3).find_inaccessible(
            TENANT, ["https://a.test/"]
        ) == [0]
        assert await asyncio.to_thread(ended.wait, 5)


@pytest.mark.parametrize("other", ["", "::1", "::ffff:127.0.0.1", "64:ff9b::7f00:1"])
async def test_name_server(
    other: str, internet: NewChecker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A public name is looked up in both families, and a bad address in either is enough."""
    records = {1: [socket.inet_aton(PUBLIC)], 28: []}
    if other:
        records[28].append(socket.inet_pton(socket.AF_INET6, other))

    def find(name: str, kind: int) -> Collection[bytes]:
        return records[kind]

    async with serve(host=PUBLIC) as site, name_server(monkeypatch, find):
        checker = internet(site, resolver=None)
        url = f"http://a.test:{site.port}/"
        assert await checker.find_inaccessible(TENANT, [url]) == ([0] if other else [])
        assert await site.visits() == (0 if other else 1)


async def test_families(attempts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Both families of a public name are tried, IPv4 first."""
    records = {1: socket.inet_aton("8.8.8.8"), 28: socket.inet_pton(socket.AF_INET6, "2600::1")}
    async with name_server(monkeypatch, lambda _, kind: [records[kind]]):
        assert await AttachmentUrlChecker().find_inaccessible(TENANT, ["https://a.test/"]) == [0]
        assert attempts == ["8.8.8.8 443", "2600::1 443"]


@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_cancellation(scheme: str) -> None:
    """Cancelling a call closes its connection, even during a TLS handshake."""
    async with serve(silence) as site, asyncio.timeout(10):
        checker = AttachmentUrlChecker(schemes=(scheme,), allowed_hosts=[site.at], timeout=60)
        check = asyncio.create_task(checker.find_inaccessible(TENANT, [f"{scheme}://{site.at}/"]))
        await site.arrived.wait()
        await asyncio.sleep(0.05)
        check.cancel()
        with pytest.raises(asyncio.CancelledError):
            await check
        await site.left.wait()


def flood(host: str) -> list[str]:
    """What a tenant asks for in one request, over and over."""
    return [f"http://{host}/{number}" for number in range(20)]


async def test_tenants_take_turns() -> None:
    """A tenant with many slow URLs must wait, and another tenant's URL is checked."""
    async with serve(silence) as slow, serve() as quick:
        checker = checker_allowing(slow, quick, timeout=1)
        calls = [checker.find_inaccessible(TENANT, flood(slow.at)) for _ in range(5)]
        flooding = asyncio.gather(*calls, return_exceptions=True)
        while len(slow.requests) < 25:
            await asyncio.sleep(0.01)
        assert await checker.find_inaccessible(ANOTHER, [f"http://{quick.at}/"]) == []
        assert not flooding.done()
        found, *busy = await flooding
        assert found == list(range(20))
        assert [type(error) for error in busy] == [ResourceExhaustedError] * 4
        assert {error.reason for error in busy} == {"URL_CHECKS_BUSY"}
        assert await slow.visits() == 25, "the others were never asked"


async def test_no_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """If any URL was not checked for lack of capacity, the call fails as busy."""
    monkeypatch.setattr(attachment_url, "_MAX_TENANT_CHECKS", 2)
    async with serve(silence) as slow, serve(paths({"/": OK, "/gone": status(404)})) as site:
        checker = checker_allowing(slow, site, timeout=1)
        good, gone = f"http://{site.at}/", f"http://{site.at}/gone"
        hanging = flood(slow.at)
        calls = [
            [hanging[0]],
            [gone, hanging[1], good],
            *([url] for url in (good, gone, hanging[2], "http://127.0.0.1/", "ftp://a/", "[")),
        ]
        answers = await asyncio.gather(
            *(checker.find_inaccessible(TENANT, urls) for urls in calls), return_exceptions=True
        )
        assert answers[0] == [0], "two had their turn and took it up"
        assert await slow.visits() == 2
        assert len({repr(answer) for answer in answers[1:]}) == 1
        assert isinstance(answers[1], ResourceExhaustedError)


async def test_tenants_are_forgotten() -> None:
    """Nothing is kept of a tenant whose checks are over."""
    async with serve() as site:
        checker = checker_allowing(site)
        for number in range(5):
            assert await checker.find_inaccessible(f"tenant {number}", [f"http://{site.at}/"]) == []
        gc.collect()
        assert not checker._tenant_slots
