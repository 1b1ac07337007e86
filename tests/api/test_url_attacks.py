"""Attacks by attachment URL, through the API: local DNS, local HTTP, one kind after the other.

PUBLIC stands for the internet, where the attacker has a site. Everywhere else on this machine there
are traps that would answer with success; DNS points every name it does not know to one of them.
"""

import asyncio
import contextlib
import functools
import gzip
import socket
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
import pytest_asyncio
from conftest import serving
from grpc import StatusCode
from support.client import Api, a_file, an_id, refused
from test_attachment_url import (
    OK,
    PRIVATE,
    PUBLIC,
    Answer,
    Site,
    endless,
    name_server,
    open_public,
    redirect,
    serve,
    silence,
    status,
    unused_port,
)
from test_attachments import of_message, walk
from test_tickets import session_of

from chat_ticket.v1 import resources_pb2 as r
from chat_ticket_svc import server
from chat_ticket_svc.services import attachment_url_policy
from chat_ticket_svc.services.attachment_url import AttachmentUrlChecker

# The one answer to every attack that is a URL.
REFUSAL = "file_url not accessible: attachment 1 of the request"
REASON = "ATTACHMENT_URL_NOT_ACCESSIBLE"

# For cases that have to wait for it; `test_slow_urls_hold_no_connection` has the real one.
TIMEOUT = 1.0

# ---- The attacks ----

# {port} and {tls} are the ports of http and https, {other} neither's, {one} a label of its own.
Fill = Callable[[str], str]
Page = Callable[[Fill], Answer]


@dataclass(frozen=True)
class Attack:
    """A URL, what the attacker's site answers by path, and what our environment is."""

    url: str
    pages: dict[str, Page] = field(default_factory=dict)
    environment: tuple[str, ...] = ()


def to(location: str, code: int = 302) -> Page:
    return lambda fill: redirect(fill(location)).replace(b"302", b"%d" % code)


def page(answer: Answer) -> Page:
    return lambda _: answer


def visit(answer: Page, **more: Page) -> Attack:
    """The attacker's site, where `answer` waits."""
    pages = {"/first": answer, **{f"/{path}": page for path, page in more.items()}}
    return Attack(f"http://{PUBLIC}:{{port}}/first", pages)


def at(host: str, path: str = "") -> Attack:
    return Attack(f"http://{host}:{{port}}/{path}")


def slowly(seconds: float, answer: bytes) -> Answer:
    async def slow(_: str, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(seconds)
        writer.write(answer)

    return slow


async def hang_up(_: str, writer: asyncio.StreamWriter) -> None:
    writer.close()


def body(head: str, *, chunked: bool = False) -> Answer:
    """An answer whose body has no end."""
    length = "Transfer-Encoding: chunked" if chunked else "Content-Length: 1000000000000"
    chunk = b"10000\r\n" + bytes(65536) + b"\r\n" if chunked else bytes(65536)
    return endless(f"HTTP/1.1 {head}\r\n{length}\r\n\r\n".encode(), chunk)


def bomb(head: str) -> bytes:
    """64 MiB of zeros, well packed."""
    data = gzip.compress(bytes(64 << 20), 1)
    headers = f"Content-Encoding: gzip\r\nContent-Length: {len(data)}"
    return f"HTTP/1.1 {head}\r\n{headers}\r\n\r\n".encode() + data


TRAP = f"http://{PRIVATE}:{{port}}/"
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy")

# What DNS says: addresses, or names of functions of `Names`. All names below these say the same.
ZONE: dict[str, list[str]] = {
    "public.test": [PUBLIC],
    "mixed.test": [PUBLIC, PRIVATE],
    "mixed-backwards.test": [PRIVATE, PUBLIC],
    "mixed-families.test": [PUBLIC, "::1"],
    "mixed-mapped.test": [PUBLIC, "::ffff:127.0.0.1"],
    "many.test": [*[PUBLIC] * 20, PRIVATE],
    "ipv6.test": ["::1"],
    "unspecified.test": ["0.0.0.0", "::"],
    "mapped.test": ["::ffff:127.0.0.1"],
    "compatible.test": ["::127.0.0.1"],
    "nat64.test": ["64:ff9b::7f00:1"],
    "6to4.test": ["2002:7f00:1::"],
    "teredo.test": ["2001:0:7f00:1::"],
    "link-local.test": ["fe80::1"],
    "metadata.test": ["169.254.169.254"],
    "metadata.google.internal": ["169.254.169.254"],
    "azure.test": ["168.63.129.16"],
    "rebind.test": ["rebind"],
    "silent.test": ["silent"],
    "half.test": ["half"],
}

# What is a URL, and well formed: the check has to refuse it.
CHECKED: dict[str, Attack] = {
    # The address itself.
    "loopback": at(PRIVATE),
    "loopback elsewhere": at("127.9.9.9"),
    "unspecified": at("0.0.0.0"),
    "private 10": at("10.0.0.1"),
    "private 172.16": at("172.16.0.1"),
    "private 192.168": at("192.168.0.1"),
    "shared 100.64": at("100.64.0.1"),
    "link-local": at("169.254.0.1"),
    "multicast": at("224.0.0.1"),
    "broadcast": at("255.255.255.255"),
    "metadata": at("169.254.169.254"),
    "metadata of containers": at("169.254.170.2"),
    "metadata of Azure": at("168.63.129.16"),
    "metadata of Alibaba": at("100.100.100.200"),
    "metadata of Oracle": at("192.0.0.192"),
    "metadata over IPv6": at("[fd00:ec2::254]"),
    "metadata by name": at("metadata.google.internal"),
    "IPv6 loopback": at("[::1]"),
    "IPv6 loopback in full": at("[0:0:0:0:0:0:0:1]"),
    "IPv6 unspecified": at("[::]"),
    "IPv6 unique local": at("[fc00::1]"),
    "IPv6 link-local": at("[fe80::1]"),
    "IPv6 multicast": at("[ff02::1]"),
    "IPv6 zone": at("[fe80::1%25lo]"),
    "IPv6 zone on loopback": at("[::1%25lo]"),
    "IPv4-mapped": at("[::ffff:127.0.0.1]"),
    "IPv4-mapped in hex": at("[::ffff:7f00:1]"),
    "IPv4-mapped metadata": at("[::ffff:169.254.169.254]"),
    "IPv4-compatible": at("[::127.0.0.1]"),
    "IPv4-translated": at("[::ffff:0:127.0.0.1]"),
    "NAT64": at("[64:ff9b::127.0.0.1]"),
    "NAT64 metadata": at("[64:ff9b::a9fe:a9fe]"),
    "NAT64 local": at("[64:ff9b:1::127.0.0.1]"),
    "6to4": at("[2002:7f00:1::]"),
    "6to4 metadata": at("[2002:a9fe:a9fe::1]"),
    "Teredo": at("[2001:0:7f00:1::]"),
    "Teredo client": at("[2001:0:808:808::80ff:fffe]"),
    "ISATAP": at("[fe80::5efe:127.0.0.1]"),
    # How it is written.
    "decimal": at("2130706433"),
    "decimal metadata": at("2852039166"),
    "hex": at("0x7f000001"),
    "hex in capitals": at("0X7F000001"),
    "hex parts": at("0x7f.0.0.1"),
    "octal": at("017700000001"),
    "octal parts": at("0177.0.0.1"),
    "octal padded": at("0000177.0.0.01"),
    "short": at("127.1"),
    "shorter": at("0"),
    "mixed notations": at("0x7f.0.1"),
    "overflowing": at("4425673729"),
    "five parts": at("127.0.0.1.0"),
    "dot behind": at("127.0.0.1."),
    "dots behind": at("127.0.0.1.."),
    "percent digits": at("%31%32%37.0.0.1"),
    "percent dots": at("127%2e0%2e0%2e1"),
    "percent fullwidth": at("%EF%BC%91%EF%BC%92%EF%BC%97.0.0.1"),
    "percent slash": at(f"{PRIVATE}%2fpublic.test"),
    "percent at": at(f"public.test%40{PRIVATE}"),
    "percent NUL": at(f"{PRIVATE}%00public.test"),
    # Names.
    "localhost": at("localhost"),
    "localhost with a dot": at("LOCALHOST."),
    "name": at("private.test"),
    "name over IPv6": at("ipv6.test"),
    "name of nothing": at("unspecified.test"),
    "name of a mapped address": at("mapped.test"),
    "name of a compatible address": at("compatible.test"),
    "name in NAT64": at("nat64.test"),
    "name in 6to4": at("6to4.test"),
    "name in Teredo": at("teredo.test"),
    "name of a link-local address": at("link-local.test"),
    "name of metadata": at("metadata.test"),
    "name of Azure": at("azure.test"),
    "name like an address": at("127.0.0.1.nip.test"),
    "name in punycode": at("xn--bcher-kva.test"),
    "name in bad punycode": at("xn--a-.test"),
    "single label": at("intranet"),
    "mixed records": at("mixed.test", "ok"),
    "mixed records backwards": at("mixed-backwards.test", "ok"),
    "mixed families": at("mixed-families.test", "ok"),
    "mixed with a mapped address": at("mixed-mapped.test", "ok"),
    "mixed at the end of many": at("many.test", "ok"),
    "rebinding": at("{one}.rebind.test"),
    "rebinding between redirects": Attack(
        "http://{one}.rebind.test:{port}/first", {"/first": to("/first")}
    ),
    "lookup that half fails": at("half.test", "ok"),
    # Scheme and port.
    "https": Attack(f"https://{PRIVATE}:{{tls}}/"),
    "https on the port of http": Attack(f"https://{PRIVATE}:{{port}}/"),
    "other port": Attack(f"http://{PUBLIC}:{{other}}/"),
    "other private port": Attack(f"http://{PRIVATE}:{{other}}/"),
    "padded port": Attack(f"http://{PRIVATE}:00000{{port}}/"),
    # Where one parser sees another host.
    "at in a fragment": Attack(f"http://public.test:{{port}}#@{PRIVATE}:{{port}}/"),
    "at in a query": Attack(f"http://public.test:{{port}}?@{PRIVATE}:{{port}}/"),
    "at in a path": Attack(f"http://public.test:{{port}}/@{PRIVATE}:{{port}}/"),
    "at behind": Attack(f"http://{PRIVATE}:{{port}}/@public.test"),
    "fragment as host": Attack(f"http://{PRIVATE}:{{port}}#@public.test:{{port}}/"),
    "query as host": Attack(f"http://{PRIVATE}:{{port}}?@public.test:{{port}}/"),
    "slashes": Attack(f"http://public.test:{{port}}//{PRIVATE}:{{port}}/"),
    "URL in the path": Attack(f"http://public.test:{{port}}/http://{PRIVATE}:{{port}}/"),
    "request in the path": Attack("http://public.test:{port}/%0d%0aHost:%20127.0.0.1"),
    "commas": at(f"public.test,{PRIVATE}"),
    "semicolons": at(f"public.test;{PRIVATE}"),
    "ampersands": at(f"public.test&{PRIVATE}"),
    # Redirects.
    **{f"redirect {code}": visit(to(TRAP, code)) for code in (301, 302, 303, 307, 308)},
    "redirect chain": visit(to("/b"), b=to("/c"), c=to("/d"), d=to(TRAP)),
    "redirect to a name": visit(to("http://private.test:{port}/")),
    "redirect to localhost": visit(to("http://localhost:{port}/")),
    "redirect to mixed records": visit(to("http://mixed.test:{port}/ok")),
    "redirect to metadata": visit(to("http://169.254.169.254:{port}/latest/meta-data/")),
    "redirect to IPv6": visit(to("http://[::1]:{port}/")),
    "redirect to a zone": visit(to("http://[fe80::1%25lo]:{port}/")),
    "redirect to a mapped address": visit(to("http://[::ffff:127.0.0.1]:{port}/")),
    "redirect to NAT64": visit(to("http://[64:ff9b::7f00:1]:{port}/")),
    "redirect to 6to4": visit(to("http://[2002:7f00:1::]:{port}/")),
    "redirect to decimal": visit(to("http://2130706433:{port}/")),
    "redirect to hex": visit(to("http://0x7f.1:{port}/")),
    "redirect to octal": visit(to("http://0177.0.0.1:{port}/")),
    "redirect to fullwidth digits": visit(to("http://\uff11\uff12\uff17.0.0.1:{port}/")),
    "redirect to circled digits": visit(to("http://①②⑦.⓪.⓪.①:{port}/")),
    "redirect to ideographic dots": visit(to("http://127。0。0。1:{port}/")),
    "redirect to https": visit(to(f"https://{PRIVATE}:{{tls}}/")),
    "redirect to another port": visit(to(f"http://{PUBLIC}:{{other}}/")),
    "redirect to ftp": visit(to(f"ftp://{PRIVATE}:{{port}}/")),
    "redirect to gopher": visit(to(f"gopher://{PRIVATE}:{{port}}/_GET%20/")),
    "redirect to file": visit(to("file:///etc/passwd")),
    "redirect to data": visit(to("data:text/plain,a")),
    "redirect with user info": visit(to(f"http://user:secret@{PUBLIC}:{{port}}/ok")),
    "redirect with a false user": visit(to(f"http://public.test:80@{PRIVATE}:{{port}}/")),
    "redirect without a scheme": visit(to(f"//{PRIVATE}:{{port}}/")),
    "redirect with slashes": visit(to(f"///{PRIVATE}:{{port}}/")),
    "redirect without slashes": visit(to(f"http:{PRIVATE}:{{port}}/")),
    "redirect with one slash": visit(to(f"http:/{PRIVATE}:{{port}}/")),
    "redirect with backslashes": visit(to(f"http:\\\\{PRIVATE}:{{port}}/")),
    "redirect with a backslash": visit(to(f"http://{PRIVATE}:{{port}}\\@public.test:{{port}}/")),
    "redirect with a tab": visit(to(f"ht\ttp://{PRIVATE}:{{port}}/")),
    "redirect with an empty host": visit(to("http://:{port}/")),
    "redirect to nonsense": visit(to("http://[")),
    "redirect to a long name": visit(to("http://" + "é." * 5000 + "test:{port}/")),
    "redirect to nowhere": visit(page(status(302))),
    "redirects in two ways": visit(page(redirect("/ok", f"Location: http://{PRIVATE}/"))),
    "redirect in a refusal": visit(
        lambda fill: redirect(fill(TRAP)).replace(b"302 Found", b"404 Not Found")
    ),
    "redirect by refreshing": visit(
        lambda fill: (
            f"HTTP/1.1 404 No\r\nRefresh: 0; url={fill(TRAP)}\r\nContent-Length: 0\r\n\r\n"
        ).encode()
    ),
    "redirect loop": visit(to("/first")),
    "redirect loop of two": visit(to("/b"), b=to("/first")),
    "too many redirects": visit(
        to("/r1"), **{f"r{n}": to(f"/r{n + 1}") for n in range(1, 5)}, r5=to("/ok")
    ),
    # Time.
    "silence": visit(page(silence)),
    "silent handshake": Attack(f"https://{PUBLIC}:{{tls}}/"),
    "silent name server": at("silent.test"),
    "redirect to a silent name server": visit(to("http://silent.test:{port}/")),
    "slow headers": visit(page(endless(b"HTTP/1.1 200 OK\r\na: ", b"b", pause=0.05))),
    "slow status": visit(page(endless(b"", b"H", pause=0.05))),
    "slow redirects": visit(page(slowly(3, redirect("/first")))),
    "slow interim responses": visit(
        page(endless(b"", b"HTTP/1.1 103 Early Hints\r\n\r\n", pause=0.05))
    ),
    "slow body": visit(
        page(endless(b"HTTP/1.1 404 No\r\nContent-Length: 1000\r\n\r\n", b"a", pause=0.05))
    ),
    "slow body of a redirect": visit(
        page(
            endless(
                b"HTTP/1.1 302 Found\r\nLocation: /b\r\nContent-Length: 1000\r\n\r\n", b"a", 0.05
            )
        ),
        b=page(status(404)),
    ),
    # Size.
    "endless header": visit(page(endless(b"HTTP/1.1 200 OK\r\na: ", b"b" * 1000))),
    "endless headers": visit(page(endless(b"HTTP/1.1 200 OK\r\n", b"a: b\r\n" * 100))),
    "endless status": visit(page(endless(b"HTTP/1.1 200 ", b"b" * 1000))),
    "endless interim responses": visit(
        page(endless(b"", b"HTTP/1.1 103 Early Hints\r\n\r\n" * 100))
    ),
    "endless body": visit(page(body("404 No"))),
    "endless body in chunks": visit(page(body("404 No", chunked=True))),
    "endless body of a redirect": visit(
        page(body("302 Found\r\nLocation: /b")), b=page(status(404))
    ),
    "zip bomb": visit(page(bomb("404 No"))),
    "zip bomb in a redirect": visit(
        lambda fill: bomb(f"302 Found\r\nLocation: {fill(TRAP)}"),
    ),
    # Other than HTTP.
    "hang up": visit(page(hang_up)),
    "no HTTP": visit(page(b"SSH-2.0-OpenSSH_9.9\r\n")),
    "HTTP 0.9": visit(page(b"<html>fine</html>")),
    "two lengths": visit(
        page(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\naa")
    ),
    "negative length": visit(page(b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n")),
    "switching protocols": visit(
        page(b"HTTP/1.1 101 Switching\r\nUpgrade: h2c\r\nConnection: Upgrade\r\n\r\n")
    ),
    # The environment.
    "proxies": Attack(f"http://{PUBLIC}:{{port}}/gone", environment=PROXIES),
    "proxies for a name": Attack("http://public.test:{port}/gone", environment=PROXIES),
    "proxies for a trap": Attack(TRAP, environment=PROXIES),
    "no proxy for a trap": Attack(TRAP, environment=(*PROXIES, "NO_PROXY", "no_proxy")),
    "netrc": Attack(f"http://{PUBLIC}:{{port}}/gone", environment=("NETRC",)),
}

# What is no URL, or none that can be stored: refused before anything is asked.
MALFORMED: dict[str, str] = {
    "user info": "http://user:secret@public.test:{port}/",
    "empty user info": f"http://@{PRIVATE}:{{port}}/",
    "false user": f"http://public.test:80@{PRIVATE}:{{port}}/",
    "fragment in user info": f"http://public.test%23@{PRIVATE}:{{port}}/",
    "two ats": f"http://a@public.test:80@{PRIVATE}:{{port}}/",
    "ftp": f"ftp://{PRIVATE}:{{port}}/",
    "file": "file:///etc/passwd",
    "file with a host": "file://localhost/etc/passwd",
    "gopher": f"gopher://{PRIVATE}:{{port}}/_GET%20/",
    "dict": f"dict://{PRIVATE}:{{port}}/info",
    "ldap": f"ldap://{PRIVATE}:{{port}}/",
    "ws": f"ws://{PRIVATE}:{{port}}/",
    "jar": f"jar:http://{PRIVATE}:{{port}}/!/",
    "view-source": f"view-source:http://{PRIVATE}:{{port}}/",
    "url": f"url:http://{PRIVATE}:{{port}}/",
    "data": "data:text/plain,a",
    "javascript": "javascript:alert(1)",
    "no scheme": f"//{PRIVATE}:{{port}}/",
    "no slashes": f"http:{PRIVATE}:{{port}}/",
    "one slash": f"http:/{PRIVATE}:{{port}}/",
    "three slashes": f"http:///{PRIVATE}:{{port}}/",
    "no host": "http://:{port}/",
    "port of a host of no use": "http://public.test:0/",
    "high port": "http://public.test:99999/",
    "port in letters": "http://public.test:http/",
    "two ports": f"http://{PRIVATE}:{{port}}:80/",
    "circled digits": "http://①②⑦.⓪.⓪.①:{port}/",
    "fullwidth digits": "http://\uff11\uff12\uff17.0.0.1:{port}/",
    "ideographic dots": "http://127。0。0。1:{port}/",
    "fullwidth slash": f"http://{PRIVATE}:{{port}}\uff0f.public.test/",
    "zero-width space": "http://127.0.0.1\u200b:{port}/",
    "soft hyphen": "http://127.0.0.1\xad:{port}/",
    "backslash": f"http://{PRIVATE}:{{port}}\\@public.test:{{port}}/",
    "backslashes": f"http:\\\\{PRIVATE}:{{port}}\\",
    "line break": f"http://public.test:{{port}}/\r\nHost: {PRIVATE}",
    "line break in the host": f"http://{PRIVATE}\r\n.public.test:{{port}}/",
    "tab": f"ht\ttp://{PRIVATE}:{{port}}/",
    "NUL": f"http://{PRIVATE}:{{port}}\0.public.test/",
    "space before": f" http://{PRIVATE}:{{port}}/",
    "space in the host": f"http://{PRIVATE} .public.test:{{port}}/",
    "quotes": f'http://"{PRIVATE}":{{port}}/',
    "open bracket": "http://[::1:{port}/",
    "no address in brackets": f"http://[{PRIVATE}]:{{port}}/",
}

# ---- The world ----

_connects: list[str] | None = None


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    """Sees each connection that Python code of this process asks the system for."""
    if event != "socket.connect" or _connects is None:
        return
    sock, address = arguments
    if sock.type == socket.SOCK_STREAM and sock.family in (socket.AF_INET, socket.AF_INET6):
        _connects.append(f"{address[0]}:{address[1]}")
        if not ip_address(address[0].partition("%")[0]).is_loopback:
            raise OSError("no packet leaves this machine")


@contextlib.contextmanager
def watched() -> Iterator[list[str]]:
    """The addresses that are connected to meanwhile, whether they answer or not."""
    global _connects
    _connects = connects = []
    try:
        yield connects
    finally:
        _connects = None


class Names:
    """What DNS says, and what it was asked."""

    def __init__(self) -> None:
        self.asked: Counter[tuple[str, int]] = Counter()

    def find(self, name: str, kind: int) -> Collection[bytes] | None:
        self.asked[name, kind] += 1
        below = name.partition(".")[2]
        addresses = ZONE.get(name, ZONE.get(below, [PRIVATE]))
        match addresses:
            case ["silent"]:
                return None
            case ["half"]:  # the family that has the good address answers
                addresses = [PUBLIC]
                if kind == 28:
                    return None
            case ["rebind"]:  # public when judged, then not any more
                addresses = [PUBLIC if self.asked[name, kind] == 1 else PRIVATE]
        family, version = {1: (socket.AF_INET, 4), 28: (socket.AF_INET6, 6)}[kind]
        return [
            socket.inet_pton(family, address)
            for address in addresses
            if ip_address(address).version == version
        ]


def fill(ports: dict[str, int], template: str) -> str:
    return template.format(**ports, one=an_id()[:8])


@dataclass
class World:
    """A server with a message to attach to, the attacker's site, and the traps."""

    api: Api
    message: r.ChatMessage
    uniform: tuple[Any, ...]
    database: str
    public: Site
    handshakes: Site
    traps: list[Site]
    ports: dict[str, int]
    names: Names
    pages: dict[str, Page]

    def fill(self, template: str) -> str:
        return fill(self.ports, template)

    def attach(self, template: str) -> list[Awaitable[tuple[Any, ...]]]:
        """Both ways to attach a URL, both refused; each has a name of its own for `one`."""
        alone, with_message = self.fill(template), a_file(file_url=self.fill(template))
        return [
            refusal(self.api.attachment(self.message.id, file_url=alone)),
            refusal(self.api.message(self.message.session_id, attachments=[with_message])),
        ]

    def expect(self, pages: dict[str, Page]) -> None:
        """The attacker's site has these pages, and nothing has happened yet."""
        self.pages.clear()
        self.pages.update(pages)
        self.public.requests.clear()
        self.public.sent = 0
        self.names.asked.clear()
        for trap in self.traps:
            trap.peers.clear()

    async def sprung(self) -> list[str]:
        """The traps that somebody connected to."""
        return [trap.at for trap in self.traps if await trap.visits()]

    @property
    def open(self) -> set[str]:
        """What may be connected to."""
        return {self.public.at, self.handshakes.at}


async def refusal(call: Awaitable[Any]) -> tuple[Any, ...]:
    """Everything that a refused call tells its caller, byte for byte."""
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    error = raised.value
    return error.code(), error.details(), tuple(error.trailing_metadata() or ())


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def world(database: str) -> AsyncIterator[World]:
    sys.addaudithook(_audit)
    names = Names()
    ports = {name: unused_port() for name in ("port", "tls", "other", "proxy")}
    pages: dict[str, Page] = {}

    async def visited(request: str, writer: asyncio.StreamWriter) -> None:
        path = request.split()[1].partition("?")[0]
        found = {"/ok": page(OK), **pages}.get(path, page(status(404)))
        content = found(functools.partial(fill, ports))
        if isinstance(content, bytes):
            writer.write(content)
        else:
            await content(request, writer)

    async with contextlib.AsyncExitStack() as stack:
        patches = stack.enter_context(pytest.MonkeyPatch.context())
        open_public(patches)
        patches.setitem(attachment_url_policy.DEFAULT_PORTS, "http", ports["port"])
        patches.setitem(attachment_url_policy.DEFAULT_PORTS, "https", ports["tls"])
        checker = functools.partial(AttachmentUrlChecker, timeout=TIMEOUT)
        patches.setattr(server, "AttachmentUrlChecker", checker)
        await stack.enter_async_context(name_server(patches, names.find))

        async def site(answer: Answer, host: str, port: str) -> Site:
            return await stack.enter_async_context(serve(answer, host, ports[port]))

        public = await site(visited, PUBLIC, "port")
        handshakes = await site(silence, PUBLIC, "tls")
        traps = [await site(OK, PRIVATE, port) for port in ports]
        traps.append(await site(OK, PUBLIC, "other"))
        with contextlib.suppress(OSError):  # without IPv6
            traps.append(await site(OK, "::1", "port"))
        served = await stack.enter_async_context(
            serving(database, attachment_url_check=True, attachment_url_schemes="http,https")
        )
        api = await stack.enter_async_context(
            Api(f"127.0.0.1:{served.port}", f"attacker {an_id()}")
        )
        message = await api.message((await api.session()).id)
        uniform = await refusal(api.attachment(message.id, file_url=f"http://{public.at}/gone"))
        yield World(api, message, uniform, database, public, handshakes, traps, ports, names, pages)


async def state(api: Api, message: r.ChatMessage) -> tuple[Any, ...]:
    """All that an attachment could have changed."""
    return (
        await session_of(api, message.session_id),
        await of_message(api, message.id),
        await walk(api, session_id=message.session_id),
    )


async def test_uniform_refusal(world: World) -> None:
    """What a file that is gone is refused with, which every attack is held against."""
    with refused(StatusCode.FAILED_PRECONDITION, REASON) as gone:
        await world.api.attachment(world.message.id, file_url=f"http://{world.public.at}/gone")
    assert gone.text == REFUSAL == world.uniform[1]
    assert gone.details["PreconditionFailure"].violations[0].subject == "file_url"


# ---- Each attack ----


@pytest.fixture
def environment(
    world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., None]:
    """Sets variables of these names to what would lead an HTTP client astray."""
    proxy = f"http://{PRIVATE}:{world.ports['proxy']}"
    netrc = tmp_path / "netrc"
    netrc.write_text(f"machine {PUBLIC} login user password secret\n")
    netrc.chmod(0o600)
    values = {"NETRC": str(netrc), "NO_PROXY": "*", "no_proxy": "*"}

    def set_up(names: Collection[str]) -> None:
        monkeypatch.setenv("no_grpc_proxy", "*")
        for name in ("NO_PROXY", "no_proxy", *PROXIES, "NETRC"):
            monkeypatch.delenv(name, raising=False)
        for name in names:
            monkeypatch.setenv(name, values.get(name, proxy))

    return set_up


@pytest.mark.parametrize("kind", CHECKED)
async def test_attack_is_refused(world: World, environment: Callable[..., None], kind: str) -> None:
    """The refusal does not tell the kinds apart; no trap is sprung, and nothing is stored."""
    attack = CHECKED[kind]
    environment(attack.environment)
    before = await state(world.api, world.message)
    world.expect(attack.pages)
    with watched() as connects:
        refusals = await asyncio.gather(*world.attach(attack.url))

    assert refusals == [world.uniform, world.uniform]
    assert set(connects) <= world.open
    assert await world.sprung() == []
    assert await state(world.api, world.message) == before
    asked = [request.split()[1] for request in world.public.requests]
    assert set(attack.pages) <= set(asked), "the attack has come to where it was to begin"
    assert "/ok" not in asked
    ours = ("authorization:", "cookie:", world.api.tenant)
    assert not [each for each in ours if each in "".join(world.public.requests).lower()]
    # What the kernel buffers on both sides was sent, whoever reads it.
    assert world.public.sent < 64 << 20


@pytest.mark.parametrize("kind", MALFORMED)
async def test_malformed_attack_is_refused(world: World, kind: str) -> None:
    """What is no URL, or has another scheme or a user, is named as such, and nobody is asked."""
    before = await state(world.api, world.message)
    world.expect({})
    with watched() as connects:
        refusals = await asyncio.gather(*world.attach(MALFORMED[kind]))
    assert [code for code, *_ in refusals] == [StatusCode.INVALID_ARGUMENT] * 2
    alone, with_message = [text for _, text, _ in refusals]
    assert alone.startswith("attachment.file_url: ")
    assert with_message == alone.replace("attachment.", "message.attachments[0].")
    assert "secret" not in repr(refusals)
    assert connects == []
    assert not world.names.asked
    assert await world.sprung() == []
    assert await state(world.api, world.message) == before


@pytest.mark.parametrize("host", [PUBLIC, "public.test"])
async def test_what_is_no_attack_is_stored(world: World, host: str) -> None:
    """In the same world, a URL that answers is accessible, straight or by a redirect."""
    world.expect({"/first": to("http://public.test:{port}/ok")})
    for path in ("ok", "first"):
        url = f"http://{host}:{world.ports['port']}/{path}"
        assert (await world.api.attachment(world.message.id, file_url=url)).file_url == url


# ---- Time ----


async def test_slow_urls_hold_no_connection(world: World, start_server: Any) -> None:
    """URLs that hang in every way take 3 seconds; the one connection is free meanwhile."""
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(server, "AttachmentUrlChecker", AttachmentUrlChecker)
        api = await start_server(
            world.database,
            attachment_url_check=True,
            attachment_url_schemes="http,https",
            pool_size=1,
            unary_timeout_seconds=6,
        )
    message = await api.message((await api.session()).id)
    before = await state(api, message)
    world.expect(
        {
            "/silence": page(silence),
            "/drip": page(endless(b"HTTP/1.1 200 OK\r\na: ", b"b", pause=0.05)),
        }
    )
    kinds = [
        f"http://{PUBLIC}:{{port}}/silence",
        f"http://{PUBLIC}:{{port}}/drip",
        f"https://{PUBLIC}:{{tls}}/",
        "http://{one}.silent.test:{port}/",
    ]
    urls = [f"{world.fill(url)}?{number}" for number in range(5) for url in kinds]
    calls = [
        asyncio.create_task(refusal(call))
        for call in (
            api.message(message.session_id, attachments=[a_file(file_url=url) for url in urls]),
            *(api.attachment(message.id, file_url=url) for url in urls[:4]),
        )
    ]
    while len(world.public.requests) < 12 or world.names.asked.total() < 6:
        await asyncio.sleep(0.01)
    assert await state(api, message) == before
    await api.message((await api.session()).id)
    assert not any(call.done() for call in calls)

    together, *alone = await asyncio.gather(*calls)
    positions = ", ".join(map(str, range(1, 21)))
    assert together[0] is StatusCode.FAILED_PRECONDITION
    assert together[1] == REFUSAL.replace("attachment 1", f"attachment {positions}")
    assert [each[:2] for each in alone] == [(StatusCode.FAILED_PRECONDITION, REFUSAL)] * 4
    assert await state(api, message) == before


async def test_flood_of_one_tenant(world: World) -> None:
    """Its slow URLs that find no turn are refused as our lack, and another's URL is accepted."""
    world.expect({"/slow": page(silence)})
    good, slow = (f"http://{world.public.at}/{path}" for path in ("ok", "slow"))
    flood = [a_file(file_url=f"{slow}?{number}") for number in range(20)]
    session = await session_of(world.api, world.message.session_id)
    async with Api(world.api.address, f"other {an_id()}") as other:
        message = await other.message((await other.session()).id)
        flooding = [
            asyncio.create_task(refusal(world.api.message(session.id, attachments=flood)))
            for _ in range(5)
        ]
        while len(world.public.requests) < 25:
            await asyncio.sleep(0.01)
        assert (await other.attachment(message.id, file_url=good)).file_url == good
        assert not all(call.done() for call in flooding)

    answers = Counter(await asyncio.gather(*flooding))
    assert sorted(answers.values()) == [1, 4], "the four are byte for byte the same"
    (busy, _), (looked_at, _) = answers.most_common()
    assert looked_at[0] is StatusCode.FAILED_PRECONDITION
    assert busy[:2] == (StatusCode.RESOURCE_EXHAUSTED, "too many file_url checks in progress")
    assert b"URL_CHECKS_BUSY" in dict(busy[2])["grpc-status-details-bin"]
    assert await session_of(world.api, session.id) == session
    with_one = await world.api.message(session.id, attachments=[a_file(file_url=good)])
    assert len(with_one.attachments) == 1, "it has its turns again"


# ---- The allow-list ----


@dataclass(frozen=True)
class Opened:
    """An allow-list, and what it opens; everything else in OTHERS stays shut."""

    entry: str
    urls: tuple[str, ...]
    tried: str = ""  # is connected to, and does not speak https


STORE = ("http://localhost:{port}/", "http://LocalHost:{port}/b?c#d")
OTHERS = (
    *STORE,
    "http://localhost:{other}/",
    "http://localhost:{proxy}/",
    f"http://{PRIVATE}:{{port}}/",
    "http://[::1]:{port}/",
    "http://[::ffff:127.0.0.1]:{port}/",
    "http://2130706433:{port}/",
    "http://a.localhost:{port}/",
    "http://alocalhost:{port}/",
    "http://localhost.test:{port}/",
    "http://localhos:{port}/",
    "http://%6cocalhost:{port}/",
    "http://private.test:{port}/",
    f"http://{PUBLIC}:{{port}}/to-store",
    f"http://{PUBLIC}:{{port}}/to-address",
    "https://localhost:{other}/",
)
ALLOWED = {
    "name": Opened("localhost:{port}", STORE),
    "name in capitals": Opened("LOCALHOST:{port}", STORE),
    "name and other port": Opened(
        "localhost:{other}", ("http://localhost:{other}/",), tried="https://localhost:{other}/"
    ),
    "address": Opened(f"{PRIVATE}:{{port}}", (f"http://{PRIVATE}:{{port}}/",)),
    "IPv6 address": Opened("[::1]:{port}", ("http://[::1]:{port}/",)),
    "another name": Opened("store.test:{port}", ()),
}


@pytest.mark.parametrize("kind", ALLOWED)
async def test_allow_list_opens_what_it_names(world: World, start_server: Any, kind: str) -> None:
    """One spelling of a host and port, for URLs that name it, whatever else leads there."""
    opened = ALLOWED[kind]
    if "[" in opened.entry and not any(":" in trap.host for trap in world.traps):
        pytest.skip("needs IPv6")
    pages = {
        "/to-store": to("http://localhost:{port}/"),
        "/to-address": to(f"http://{PRIVATE}:{{port}}/"),
    }
    api = await start_server(
        world.database,
        attachment_url_check=True,
        attachment_url_schemes="http,https",
        attachment_url_allowed_hosts=world.fill(opened.entry),
    )
    message = await api.message((await api.session()).id)
    accepted = []
    for url in OTHERS:
        world.expect(pages)
        with watched() as connects:
            try:
                await api.attachment(message.id, file_url=world.fill(url))
            except grpc.aio.AioRpcError as error:
                assert (error.code(), error.details()) == (StatusCode.FAILED_PRECONDITION, REFUSAL)
            else:
                accepted.append(url)
        if url not in (*accepted, opened.tried):
            assert set(connects) <= world.open, url
            assert await world.sprung() == [], url
    assert tuple(accepted) == opened.urls
