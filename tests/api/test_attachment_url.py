"""Attachment URLs: what answers is found accessible, and nothing of ours is ever reached."""

import asyncio
import contextlib
import gc
import logging
import secrets
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable
from dataclasses import dataclass, field
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import anyio
import httpcore
import pytest
from ssrfguard import AddressTable, Block, Reach, Resolver
from ssrfguard.resolvers import UdpResolver

from chat_ticket_svc.errors import ResourceExhaustedError
from chat_ticket_svc.services import attachment_url, attachment_url_policy
from chat_ticket_svc.services.attachment_url import AttachmentUrlChecker

pytestmark = pytest.mark.asyncio

TENANT, ANOTHER = "a tenant", "another tenant"

PRIVATE = "127.0.0.1"
PUBLIC = "127.0.0.2"  # where the `internet` fixture is used

OK = b"HTTP/1.1 206 Partial Content\r\nContent-Range: bytes 0-0/9\r\nContent-Length: 1\r\n\r\nx"

Answer = bytes | Callable[[str, asyncio.StreamWriter], Awaitable[None]]
NewChecker = Callable[..., AttachmentUrlChecker]


def status(code: int) -> bytes:
    return b"HTTP/1.1 %d Status\r\nContent-Length: 0\r\n\r\n" % code


def redirect(location: str, *headers: str) -> bytes:
    lines = ["HTTP/1.1 302 Found", f"Location: {location}", *headers, "Content-Length: 0", "", ""]
    return "\r\n".join(lines).encode()


def paths(answers: dict[str, bytes]) -> Answer:
    async def answer(request: str, writer: asyncio.StreamWriter) -> None:
        writer.write(answers[request.split()[1]])

    return answer


def endless(head: bytes, chunk: bytes, pause: float = 0) -> Answer:
    async def answer(request: str, writer: asyncio.StreamWriter) -> None:
        writer.write(head)
        while True:
            writer.write(chunk)
            await writer.drain()
            await asyncio.sleep(pause)

    return answer


async def silence(request: str, writer: asyncio.StreamWriter) -> None:
    """The request is read, and that is all."""


@dataclass
class Site:
    """A local server: who connected, what they asked, how much they were sent, who hung up."""

    host: str
    port: int = 0
    peers: list[Any] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    sent: int = 0
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    left: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def at(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    async def visits(self) -> int:
        """The connections so far; those still in the backlog are let in first."""
        _, writer = await asyncio.open_connection(self.host, self.port)
        own = writer.get_extra_info("sockname")
        while own not in self.peers:
            self.arrived.clear()
            await self.arrived.wait()
        writer.close()
        self.peers.remove(own)
        return len(self.peers)


def unused_port() -> int:
    """A port that is free on every address, below those that the system gives to others."""
    while True:
        port = 20_000 + secrets.randbelow(12_000)  # not by `random`, which tests seed alike
        with contextlib.suppress(OSError), socket.create_server(("", port)):
            return port


@contextlib.asynccontextmanager
async def serve(
    answer: Answer = OK, host: str = PRIVATE, port: int = 0, tls: ssl.SSLContext | None = None
) -> AsyncIterator[Site]:
    site = Site(host)
    tasks: set[asyncio.Task[Any] | None] = set()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.current_task())
        site.peers.append(writer.get_extra_info("peername"))
        site.arrived.set()
        written = writer.write

        def write(data: bytes) -> None:
            site.sent += len(data)
            written(data)

        writer.write = write  # type: ignore[method-assign, assignment]
        try:
            request = (await reader.readuntil(b"\r\n\r\n")).decode()
            site.requests.append(request)
            if isinstance(answer, bytes):
                writer.write(answer)
            else:
                await answer(request, writer)
            await reader.read()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            site.left.set()
            writer.close()

    # Not a port of the system's choice: another test may have that one on another address, where
    # the second site of a pair has to be.
    server = await asyncio.start_server(connected, host, port or unused_port(), ssl=tls)
    site.port = server.sockets[0].getsockname()[1]
    try:
        yield site
    finally:
        server.close()
        for task in filter(None, tasks):
            task.cancel()
        await asyncio.gather(*filter(None, tasks), return_exceptions=True)


def dns(records: dict[str, Iterable[str]]) -> Resolver:
    """A resolver that knows these names, and addresses written out."""

    def resolve(host: str, port: int, *_: int) -> list[Any]:
        rows = []
        for address in records.get(host.rstrip("."), [host]):
            rows += socket.getaddrinfo(
                address, port, 0, socket.SOCK_STREAM, 0, socket.AI_NUMERICHOST
            )
        return rows

    return resolve


PATIENT = {"timeout": 60}  # however busy the machine


def opened(*sites: Site, **settings: Any) -> AttachmentUrlChecker:
    """A checker for which these sites are internal stores."""
    hosts = [site.at for site in sites]
    return AttachmentUrlChecker(schemes=("http",), allowed_hosts=hosts, **{**PATIENT, **settings})


def open_public(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes PUBLIC a public address."""
    public = Block(ip_network(PUBLIC), "Public", "", Reach.PERMITTED)
    denied = AddressTable((*attachment_url_policy.DENIED_NETWORKS.blocks, public))
    monkeypatch.setattr(attachment_url_policy, "DENIED_NETWORKS", denied)


@pytest.fixture
def internet(monkeypatch: pytest.MonkeyPatch) -> NewChecker:
    """Makes checkers to which PUBLIC is a public address, and a site's port the port of http."""
    open_public(monkeypatch)

    def checker(site: Site, **settings: Any) -> AttachmentUrlChecker:
        monkeypatch.setitem(attachment_url_policy.DEFAULT_PORTS, "http", site.port)
        return AttachmentUrlChecker(
            schemes=("http",), **{"resolver": dns({}), **PATIENT, **settings}
        )

    return checker


@pytest.fixture
def attempts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The addresses connected to, of which only PRIVATE answers."""
    attempts = []
    connect = anyio.connect_tcp

    async def connect_tcp(remote_host: Any, remote_port: int, **options: Any) -> Any:
        attempts.append(f"{remote_host} {remote_port}")
        if str(remote_host) != PRIVATE:
            raise OSError("no route to host")
        return await connect(remote_host, remote_port, **options)

    monkeypatch.setattr(anyio, "connect_tcp", connect_tcp)
    return attempts


# ---- What is accessible ----


async def test_status() -> None:
    """Success alone is accessible, and the 416 with which an empty file answers."""
    good, bad = [200, 204, 206, 299, 416], [300, 304, 401, 403, 404, 410, 500, 503]
    async with serve(paths({f"/{code}": status(code) for code in good + bad})) as site:
        checker = opened(site)
        assert (
            await checker.find_inaccessible(TENANT, [f"http://{site.at}/{code}" for code in good])
            == []
        )
        urls = [f"http://{site.at}/{code}" for code in bad]
        assert await checker.find_inaccessible(TENANT, urls) == list(range(len(urls)))


async def test_asks_for_one_byte() -> None:
    """One uncompressed byte is asked for, of exactly the path and query given."""
    async with serve() as site:
        assert (
            await opened(site).find_inaccessible(TENANT, [f"http://{site.at}/a;v=1/b%20c;w?d=;e#f"])
            == []
        )
    head = site.requests[0].lower().split("\r\n")
    assert head[0] == "get /a;v=1/b%20c;w?d=;e http/1.1"
    assert {f"host: {site.at}", "range: bytes=0-0", "accept-encoding: identity"} < set(head)


async def test_ipv6() -> None:
    """An IPv6 address is asked by its proper name."""
    try:
        async with serve(host="::1") as site:
            assert await opened(site).find_inaccessible(TENANT, [f"http://{site.at}/"]) == []
    except OSError:
        pytest.skip("needs IPv6")
    assert f"host: {site.at}" in site.requests[0].lower().split("\r\n")


async def test_positions() -> None:
    """The positions of all inaccessible URLs, and of no others, come back in order."""
    async with serve(paths({"/yes": OK, "/no": status(404)})) as site:
        yes, no = f"http://{site.at}/yes", f"http://{site.at}/no"
        urls = [no, yes, "http://[", yes, no, "http://10.0.0.1/"]
        assert await opened(site).find_inaccessible(TENANT, urls) == [0, 2, 4, 5]
        assert await site.visits() == 2, "a repeated URL is asked once"
        assert await opened(site).find_inaccessible(TENANT, []) == []


async def test_concurrent() -> None:
    """The URLs of a request are asked at once: none waits for another's answer."""
    together = asyncio.Barrier(20)

    async def answer(request: str, writer: asyncio.StreamWriter) -> None:
        await together.wait()
        writer.write(OK)

    async with serve(answer) as site:
        urls = [f"http://{site.at}/{number}" for number in range(20)]
        assert await opened(site).find_inaccessible(TENANT, urls) == []


@pytest.mark.parametrize(("tenants", "at_once"), [([TENANT], 2), ([TENANT, ANOTHER], 3)])
async def test_concurrency_is_bounded(
    tenants: list[str], at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many URLs there are, few are asked at a time, of a tenant fewer; yet all are."""
    monkeypatch.setattr(attachment_url, "_MAX_CHECKS", 3)
    monkeypatch.setattr(attachment_url, "_MAX_TENANT_CHECKS", 2)
    busy, most_busy = 0, 0

    async def answer(request: str, writer: asyncio.StreamWriter) -> None:
        nonlocal busy, most_busy
        busy += 1
        most_busy = max(busy, most_busy)
        await asyncio.sleep(0.01)
        busy -= 1
        writer.write(OK)

    async with serve(answer) as site:
        checker = opened(site)
        urls = [f"http://{site.at}/{number}" for number in range(10)]
        calls = [checker.find_inaccessible(tenant, urls) for tenant in 2 * tenants]
        assert await asyncio.gather(*calls) == [[]] * len(calls)
        assert most_busy == at_once


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A certificate for a.test with its key, in one file."""
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl")
    path = tmp_path / "certificate.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2"
    command += f" -subj /CN=x -addext subjectAltName=DNS:a.test -keyout {path} -out {path}.x509"
    subprocess.run(command.split(), check=True, capture_output=True)
    path.write_text(path.read_text() + Path(f"{path}.x509").read_text())
    return path


async def test_tls(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over https, the certificate must be trusted and name the host."""
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate)
    async with serve(tls=tls) as site:
        hosts = [f"a.test:{site.port}", f"b.test:{site.port}"]
        urls = [f"https://{host}/" for host in hosts]
        resolver = dns({"a.test": [PRIVATE], "b.test": [PRIVATE]})
        checker = AttachmentUrlChecker(allowed_hosts=hosts, resolver=resolver)
        assert await checker.find_inaccessible(TENANT, urls) == [0, 1]
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        checker = AttachmentUrlChecker(allowed_hosts=hosts, resolver=resolver)
        assert await checker.find_inaccessible(TENANT, urls) == [1]


# ---- What is never reached ----


async def test_https_only_by_default() -> None:
    """Without a setting http is refused, even to an allowed host."""
    async with serve() as site:
        checker = AttachmentUrlChecker(allowed_hosts=[site.at])
        assert await checker.find_inaccessible(TENANT, [f"http://{site.at}/"]) == [0]
        assert await site.visits() == 0


REFUSED = [
    *("127.0.0.1", "127.9.9.9", "0.0.0.0", "10.0.0.1", "100.64.0.1", "172.16.0.1", "192.168.0.1"),
    *("169.254.0.1", "192.0.2.1", "198.18.0.1", "224.0.0.1", "240.0.0.1", "255.255.255.255"),
    # Metadata services.
    *("169.254.169.254", "169.254.170.2", "100.100.100.200", "168.63.129.16", "192.0.0.192"),
    # Odd notations.
    *("127.1", "127.0.1", "0", "2130706433", "0x7f000001", "0x7f.1", "0x7F.0.0.1", "017700000001"),
    *("0177.0.0.1", "0177.1", "2852039166", "0xa9fea9fe", "0251.0376.0251.0376", "127.0.0.1."),
    *("%31%32%37.0.0.1", "①②⑦.⓪.⓪.①", "\uff11\uff12\uff17.0.0.1", "127。0。0。1", "8.8.2056"),
    # IPv6, plain and with an IPv4 address inside.
    *("[::]", "[::1]", "[0:0:0:0:0:0:0:1]", "[fe80::1]", "[fe80::1%25eth0]", "[fec0::1]"),
    *("[fc00::1]", "[fd00:ec2::254]", "[ff02::1]", "[2001:db8::1]", "[100::1]", "[4000::1]"),
    *("[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[::ffff:169.254.169.254]", "[::127.0.0.1]"),
    *("[::ffff:0:127.0.0.1]", "[64:ff9b::127.0.0.1]", "[64:ff9b::a9fe:a9fe]"),
    *("[64:ff9b:1::127.0.0.1]", "[2002:7f00:1::]", "[2002:a9fe:a9fe::1]", "[2002:a00:1::]"),
    *("[2001:0:7f00:1::]", "[2001:0:808:808::80ff:fffe]"),
]


async def test_refused_addresses(internet: NewChecker, attempts: list[str]) -> None:
    """No address that is not public is connected to, however it is written."""
    async with serve() as site:
        # The platform's resolver understands notations that no URL should have.
        checker = internet(site, resolver=socket.getaddrinfo)
        urls = [f"http://{host}:{site.port}/" for host in REFUSED]
        assert await checker.find_inaccessible(TENANT, urls) == list(range(len(urls)))
        assert attempts == []
        assert await site.visits() == 0


PUBLIC_ADDRESSES = ["8.8.8.8", "[2606:4700::1111]", "[64:ff9b::8.8.8.8]", "[::ffff:8.8.8.8]"]


async def test_public_addresses(attempts: list[str]) -> None:
    """Public addresses are not refused, nor are those that an IPv6-only network puts for them."""
    urls = [f"https://{host}/" for host in PUBLIC_ADDRESSES]
    await AttachmentUrlChecker().find_inaccessible(TENANT, urls)
    assert len(attempts) == len(urls)


@pytest.mark.parametrize(
    "addresses",
    [[PRIVATE], [PUBLIC, PRIVATE], [PRIVATE, PUBLIC], [PUBLIC, "::1"], [PUBLIC, "::ffff:10.0.0.1"]],
)
async def test_refused_names(addresses: list[str], internet: NewChecker) -> None:
    """A name is refused when any of its addresses is."""
    async with serve(host=PUBLIC) as public, serve(host=PRIVATE, port=public.port) as private:
        checker = internet(public, resolver=dns({"good.test": [PUBLIC], "bad.test": addresses}))
        urls = [f"http://{name}.test:{public.port}/" for name in ("good", "bad")]
        assert await checker.find_inaccessible(TENANT, urls) == [1]
        assert await private.visits() == 0
        assert await public.visits() == 1


async def test_rebinding(internet: NewChecker) -> None:
    """The address connected to is the one judged, though the name moves at every lookup."""
    answers = [PUBLIC]

    def resolve(host: str, *rest: int) -> Iterable[Any]:
        return dns({host: [answers.pop() if answers else PRIVATE]})(host, *rest)

    answer = paths({"/": OK, "/again": redirect("/")})
    async with (
        serve(answer, host=PUBLIC) as public,
        serve(answer, host=PRIVATE, port=public.port) as private,
    ):
        checker = internet(public, resolver=resolve)
        assert await checker.find_inaccessible(TENANT, [f"http://a.test:{public.port}/"]) == []
        answers.append(PUBLIC)
        assert await checker.find_inaccessible(TENANT, [f"http://a.test:{public.port}/again"]) == [
            0
        ]
        assert await public.visits() == 2
        assert await private.visits() == 0


async def test_ports(internet: NewChecker) -> None:
    """A public host is asked on the port of a scheme only."""
    async with serve(host=PUBLIC) as usual, serve(host=PUBLIC) as other:
        checker = internet(usual)
        urls = [f"http://{usual.at}/", f"http://{other.at}/", f"http://{PUBLIC}:0/"]
        assert await checker.find_inaccessible(TENANT, urls) == [1, 2]
        assert await other.visits() == 0


@pytest.mark.parametrize("user", ["user@", "user:secret@", ":secret@", "@", ":@"])
async def test_user_info(user: str) -> None:
    """User info is refused, even empty."""
    async with serve() as site:
        assert await opened(site).find_inaccessible(TENANT, [f"http://{user}{site.at}/"]) == [0]
        assert await site.visits() == 0


NONSENSE = [
    *("", "/", "http:", "http://", "http:///a", "//a", "http://[", "http://[::1", "http://a b/"),
    *("http://\ud800/", "http://a\0b/", "http://a/\r\nHost: b", " http://a/", "http://a:99999/"),
    *("http://a:x/", "http://xn--/", "http://-/", "http://.", "http://a..b/", "http://a\\@b/"),
    *("ftp://a/", "file:///etc/passwd", "mailto:a@b", "data:,a", "gopher://127.0.0.1/", "\\\\a"),
    *("http://" + "a." * 300, "http://" + "é." * 9000, "http://a/" + "a" * 100_000),
]


async def test_nonsense() -> None:
    """What is no URL is inaccessible, and nothing worse."""
    checker = AttachmentUrlChecker(schemes=("http", "https"), resolver=dns({}))
    assert await checker.find_inaccessible(TENANT, NONSENSE) == list(range(len(NONSENSE)))


async def test_unexpected_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure nobody thought of counts as inaccessible."""

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("a bug in a library")

    async with serve() as site:
        monkeypatch.setattr(httpcore.AsyncConnectionPool, "stream", broken)
        assert await opened(site).find_inaccessible(TENANT, [f"http://{site.at}/"]) == [0]


# ---- Redirects ----


async def test_redirects() -> None:
    """Five redirects are followed, and no sixth."""
    chain = {f"/{left}": redirect(f"/{left - 1}") for left in range(1, 7)}
    async with serve(paths({"/0": OK, **chain})) as site:
        urls = [f"http://{site.at}/5", f"http://{site.at}/6"]
        assert await opened(site).find_inaccessible(TENANT, urls) == [1]
        assert await site.visits() == 6 + 6


@pytest.mark.parametrize("host", [PRIVATE, "localhost", "[::ffff:127.0.0.1]", "0x7f.1"])
async def test_redirect_to_refused(host: str, internet: NewChecker) -> None:
    """A redirect is judged like the URL before it."""
    async with serve(host=PRIVATE) as private:
        answer = redirect(f"http://{host}:{private.port}/")
        async with serve(answer, host=PUBLIC, port=private.port) as public:
            checker = internet(public, resolver=socket.getaddrinfo)
            assert await checker.find_inaccessible(TENANT, [f"http://{public.at}/"]) == [0]
            assert await public.visits() == 1
            assert await private.visits() == 0


async def test_redirect_to_other_scheme(internet: NewChecker) -> None:
    """A redirect cannot leave the schemes that are allowed."""
    looked_up = []

    def resolve(host: str, *rest: int) -> Iterable[Any]:
        looked_up.append(host)
        return dns({})(host, *rest)

    async with serve(host=PUBLIC) as site:
        location = f"https://a.test:{site.port}/"
        async with serve(redirect(location), host=PUBLIC) as first:
            checker = internet(first, resolver=resolve)
            assert await checker.find_inaccessible(TENANT, [f"http://{first.at}/"]) == [0]
            assert looked_up == [PUBLIC]


async def test_redirect_with_user_info() -> None:
    """A redirect cannot bring in credentials."""
    async with serve() as site:
        answers = {"/": redirect(f"http://user:secret@{site.at}/b"), "/b": OK}
    async with serve(paths(answers), port=site.port) as site:
        assert await opened(site).find_inaccessible(TENANT, [f"http://{site.at}/"]) == [0]
        assert await site.visits() == 1


async def test_cookies() -> None:
    """A cookie is never sent back, in the same check or a later one."""
    answers = {"/first": redirect("/second", "Set-Cookie: a=b; Path=/"), "/second": OK}
    async with serve(paths(answers)) as site:
        checker = opened(site)
        for _ in range(2):
            assert await checker.find_inaccessible(TENANT, [f"http://{site.at}/first"]) == []
    assert len(site.requests) == 4
    assert not [request for request in site.requests if "cookie:" in request.lower()]


# ---- Allowed hosts ----


async def test_allowed_host_is_reached_by_its_name_only(internet: NewChecker) -> None:
    """An allowed host opens for the URLs that name it, not for a redirect to it."""
    async with serve(host=PRIVATE) as store:
        answer = redirect(f"http://store.test:{store.port}/")
        async with serve(answer, host=PUBLIC, port=store.port) as public:
            hosts = ["STORE.test", "store.test.", "other.test", "a.store.test", "astore.test"]
            hosts += ["store.test.a.test", PRIVATE]
            checker = internet(
                public,
                allowed_hosts=[f"Store.test:{store.port}"],
                resolver=dns({host.lower().rstrip("."): [PRIVATE] for host in hosts}),
            )
            urls = [f"http://{host}:{store.port}/" for host in hosts]
            urls.append(f"http://{public.at}/")
            assert await checker.find_inaccessible(TENANT, urls) == list(range(2, len(urls)))
            assert await public.visits() == 1
            assert await store.visits() == 2


async def test_allowed_port(attempts: list[str]) -> None:
    """An entry with a port opens that port alone; one without, the ports of the schemes."""
    resolver = dns({"a.test": ["10.0.0.1"], "b.test": ["10.0.0.2"]})
    checker = AttachmentUrlChecker(
        schemes=("http", "https"), allowed_hosts=["a.test:8080", "b.test"], resolver=resolver
    )
    for host in ("a.test", "b.test"):
        for port in ("", ":80", ":443", ":8080"):
            await checker.find_inaccessible(TENANT, [f"http://{host}{port}/"])
    assert attempts == ["10.0.0.1 8080", "10.0.0.2 80", "10.0.0.2 80", "10.0.0.2 443"]


async def test_allowed_host_redirects() -> None:
    """An allowed host's redirects stay on it, even where another is allowed too."""
    async with serve() as other:
        answers = {"/out": redirect(f"http://{other.at}/"), "/in": redirect("/"), "/": OK}
        async with serve(paths(answers)) as site:
            urls = [f"http://{site.at}/out", f"http://{site.at}/in"]
            assert await opened(site, other).find_inaccessible(TENANT, urls) == [0]
            assert await other.visits() == 0


@pytest.mark.parametrize("host", ["localhost:{}", "127.0.0.2:{}", "u@a.test:{}", "a.test:1{}"])
async def test_allowed_host_leads_nowhere_else(host: str, internet: NewChecker) -> None:
    """Not to itself by another name, to the internet, to a user or to another port of its own."""
    async with serve() as probe:
        answers = {"/": OK, "/in": redirect(f"//A.test:{probe.port}/")}
        answers["/out"] = redirect(f"http://{host.format(probe.port)}/")
    async with (
        serve(paths(answers), port=probe.port) as store,
        serve(host=PUBLIC, port=probe.port) as public,
    ):
        resolver = dns({"a.test": [PRIVATE], "localhost": [PRIVATE]})
        checker = internet(store, allowed_hosts=[f"a.test:{store.port}"], resolver=resolver)
        urls = [f"http://a.test:{store.port}/{path}" for path in ("in", "out")]
        assert await checker.find_inaccessible(TENANT, urls) == [1]
        assert await public.visits() == 0
        assert [request.split()[1] for request in store.requests].count("/") == 1


@pytest.mark.parametrize("address", ["169.254.169.254", "fe80::1", "0.0.0.0", "224.0.0.1"])
async def test_allowed_name_to_metadata(address: str, attempts: list[str]) -> None:
    """An allowed name may lead to private addresses, not to link-local and stranger ones."""
    resolver = dns({"a.test": ["10.0.0.1"], "b.test": [address]})
    checker = AttachmentUrlChecker(allowed_hosts=["a.test", "b.test"], resolver=resolver)
    assert await checker.find_inaccessible(TENANT, ["https://a.test/", "https://b.test/"]) == [0, 1]
    assert attempts == ["10.0.0.1 443"]


WELL_FORMED = ["a", "a.test:8080", "A.Test.", "127.0.0.1:9000", "[::1]:9000", "[fc00::1]", "é.test"]
MALFORMED = [
    *("", ":", ":80", "a:", "a:0", "a:65536", "a:x", "a:1:2", "*", "*.a", "a b", " a", "a\n"),
    *("http://a", "a/b", "a?b", "a#b", "u@a", "u:p@a", "@a", "[::1", "::1", "a..b", "é" * 70),
    *("127.1", "2130706433", "169.254.169.254", "[fe80::1]", "[64:ff9b::7f00:1]", "0.0.0.0"),
]


async def test_malformed_allowed_hosts() -> None:
    """Every entry that is malformed or could never work is counted at once, and no good one."""
    AttachmentUrlChecker(allowed_hosts=WELL_FORMED)
    with pytest.raises(ValueError) as raised:
        AttachmentUrlChecker(allowed_hosts=[*WELL_FORMED, *MALFORMED])
    positions = range(len(WELL_FORMED) + 1, len(WELL_FORMED) + len(MALFORMED) + 1)
    assert str(raised.value).endswith(f": {list(positions)}")


async def test_unknown_schemes() -> None:
    """Only http and https can be allowed."""
    with pytest.raises(ValueError, match=r"\['file', 'ftp'\]"):
        AttachmentUrlChecker(schemes=("https", "ftp", "file"))


# ---- The environment ----


async def test_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither a proxy nor a password is taken from the environment."""
    netrc = tmp_path / "netrc"
    netrc.write_text(f"machine {PRIVATE} login user password secret")
    netrc.chmod(0o600)
    async with serve() as proxy, serve() as site:
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "all_proxy"):
            monkeypatch.setenv(name, f"http://{proxy.at}")
        monkeypatch.delenv("NO_PROXY", raising=False)
        monkeypatch.setenv("NETRC", str(netrc))
        assert await opened(site).find_inaccessible(TENANT, [f"http://{site.at}/"]) == []
        assert await proxy.visits() == 0
        assert "authorization" not in site.requests[0].lower()


async def test_logs(caplog: pytest.LogCaptureFixture) -> None:
    """No part of a URL is logged, at any level."""
    logging.getLogger("httpcore").setLevel(logging.NOTSET)
    caplog.set_level(logging.DEBUG)
    answers = {"/?canary=1": redirect("/?canary=2"), "/?canary=2": status(404)}
    async with serve(paths(answers)) as site:
        assert await opened(site).find_inaccessible(TENANT, [f"http://{site.at}/?canary=1"]) == [0]
        assert len(site.requests) == 2
    assert "canary" not in caplog.text
    assert PRIVATE not in caplog.text


# ---- Slow, endless and abandoned ----


async def test_bodies_are_not_downloaded() -> None:
    """A body without end is cut off at once, whether it is a file's or a redirect's."""
    head = b"HTTP/1.1 %s\r\nContent-Length: 1000000000000\r\n\r\n"
    file, moved = head % b"200 OK", head % b"302 Found\r\nLocation: //other.test/"
    async with (
        asyncio.timeout(10),
        serve(endless(file, bytes(65536))) as store,
        serve(endless(moved, bytes(65536))) as mover,
    ):
        checker = opened(store, mover, timeout=60)
        urls = [f"http://{store.at}/", f"http://{mover.at}/"]
        assert await checker.find_inaccessible(TENANT, urls) == [1]
        await store.left.wait()
        await mover.left.wait()
        # What the kernel buffers on both sides was sent, whoever reads it.
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
        assert await opened(site, timeout=60).find_inaccessible(TENANT, [f"http://{site.at}/"]) == [
            0
        ]


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


class NameServer(asyncio.DatagramProtocol):
    """Answers for a name and a type of record with these records, or not at all."""

    def __init__(self, find: Callable[[str, int], Collection[bytes] | None]) -> None:
        self.find = find

    def connection_made(self, transport: asyncio.DatagramTransport) -> None:  # type: ignore[override]
        self.transport = transport

    def datagram_received(self, query: bytes, client: Any) -> None:
        labels, rest = [], query[12:]
        while size := rest[0]:
            labels.append(rest[1 : 1 + size].decode())
            rest = rest[1 + size :]
        records = self.find(".".join(labels).lower(), query[-3])
        if records is None:
            return
        reply = query[:2] + b"\x81\x80\0\1" + bytes([0, len(records), 0, 0, 0, 0]) + query[12:]
        for data in records:
            reply += b"\xc0\x0c" + query[-4:] + bytes([0, 0, 0, 0, 0, len(data)]) + data
        self.transport.sendto(reply, client)


@contextlib.asynccontextmanager
async def name_server(
    monkeypatch: pytest.MonkeyPatch, find: Callable[[str, int], Collection[bytes] | None]
) -> AsyncIterator[threading.Event]:
    """Serves the lookups of public names; the event is set when one has ended."""
    transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(
        lambda: NameServer(find), (PRIVATE, 0)
    )
    port = transport.get_extra_info("sockname")[1]
    ended = threading.Event()

    def resolver(**options: Any) -> Resolver:
        def resolve(*query: Any) -> Iterable[Any]:
            try:
                return UdpResolver(
                    nameservers=(PRIVATE,), nameserver_port=port, attempts=100, **options
                )(*query)
            finally:
                ended.set()

        return resolve

    monkeypatch.setattr(attachment_url, "UdpResolver", resolver)
    yield ended
    transport.close()


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
    """A caller who gives up is let go, and the connection is closed, even in a handshake."""
    async with serve(silence) as site, asyncio.timeout(10):
        checker = AttachmentUrlChecker(schemes=(scheme,), allowed_hosts=[site.at], timeout=60)
        check = asyncio.create_task(checker.find_inaccessible(TENANT, [f"{scheme}://{site.at}/"]))
        await site.arrived.wait()
        await asyncio.sleep(0.05)
        check.cancel()
        with pytest.raises(asyncio.CancelledError):
            await check
        await site.left.wait()


# ---- Turns ----


def flood(host: str) -> list[str]:
    """What a tenant asks for in one request, over and over."""
    return [f"http://{host}/{number}" for number in range(20)]


async def test_tenants_take_turns() -> None:
    """A tenant who floods us with slow URLs is told to wait; another's URL is looked at."""
    async with serve(silence) as slow, serve() as quick:
        checker = opened(slow, quick, timeout=1)
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
    """Busy is the one answer when a URL found no turn, whatever it is and the others answer."""
    monkeypatch.setattr(attachment_url, "_MAX_TENANT_CHECKS", 2)
    async with serve(silence) as slow, serve(paths({"/": OK, "/gone": status(404)})) as site:
        checker = opened(slow, site, timeout=1)
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
        checker = opened(site)
        for number in range(5):
            assert await checker.find_inaccessible(f"tenant {number}", [f"http://{site.at}/"]) == []
        gc.collect()
        assert not checker._tenant_slots
