"""Attacks by attachment URL, through the API: local DNS, local HTTP, one kind after the other.

PUBLIC stands for the internet, where the attacker has a site. Everywhere else on this machine there
are traps that would answer with success; DNS points every name it does not know to one of them.
"""

import asyncio
import contextlib
import functools
import socket
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
import pytest_asyncio
from grpc import StatusCode
from support.attachments import list_all_attachments, update_attachment
from support.client import Api, a_file, an_id, refused
from support.messages import get_message
from support.server import serving
from support.sessions import get_session
from support.sites import (
    OK,
    PRIVATE,
    PUBLIC,
    Answer,
    Site,
    endless,
    name_server,
    serve,
    silence,
    status,
    unused_port,
)
from support.url_attacks import CHECKED, MALFORMED, PROXIES, ZONE, Page, page, to
from support.url_checkers import open_public

from chat_ticket.v1 import resources_pb2 as r
from chat_ticket_svc.services import attachment_url, attachment_url_policy
from chat_ticket_svc.services.attachment_url import AttachmentUrlChecker

# The one answer to every attack that is a URL.
REFUSAL = "file_url not accessible: attachment 1 of the request"
REASON = "ATTACHMENT_URL_NOT_ACCESSIBLE"

# For cases that have to wait for it; `test_slow_urls_use_no_connection` has the real one.
# Of a check, in seconds.
TIMEOUT = 1.0
# Of one that must end before: longer than it takes on a busy machine.
LONG_TIMEOUT = 5.0
# Attacks that only the timeout ends.
HANGING = {
    "HTTP 0.9",
    "lookup that half fails",
    "no HTTP",
    "redirect to a silent name server",
    "silence",
    "silent handshake",
    "silent name server",
    "slow headers",
    "slow interim responses",
    "slow redirects",
    "slow status",
}


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
    """The answers of DNS, and a count of its questions."""

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
    """A server with a message and its attachment, the attacker's site, and the traps."""

    api: Api
    message: r.ChatMessage
    file: r.ChatAttachment
    uniform: tuple[Any, ...]
    database: str
    public: Site
    handshakes: Site
    traps: list[Site]
    ports: dict[str, int]
    names: Names
    pages: dict[str, Page]
    checker: AttachmentUrlChecker

    def fill(self, template: str) -> str:
        return fill(self.ports, template)

    def attach(self, template: str) -> list[Awaitable[tuple[Any, ...]]]:
        """Set a URL in each way; all fail. Each has its own name for `one`.

        Alone, with a message, and as the new one of an attachment.
        """
        alone, with_message = self.fill(template), a_file(file_url=self.fill(template))
        return [
            refusal(self.api.attachment(self.message.id, file_url=alone)),
            refusal(self.api.message(self.message.session_id, attachments=[with_message])),
            refusal(update_attachment(self.api, self.file.id, self.fill(template))),
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
    """Everything that the caller of a failed call receives, byte for byte."""
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
        checkers: list[AttachmentUrlChecker] = []

        def new_checker(*arguments: Any, **keywords: Any) -> AttachmentUrlChecker:
            checkers.append(AttachmentUrlChecker(*arguments, **keywords, timeout=TIMEOUT))
            return checkers[-1]

        patches.setattr(attachment_url, "AttachmentUrlChecker", new_checker)
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
        file = await api.attachment(message.id, file_url=f"http://{public.at}/ok")
        uniform = await refusal(api.attachment(message.id, file_url=f"http://{public.at}/gone"))
        yield World(
            *(api, message, file, uniform, database, public, handshakes, traps, ports, names),
            *(pages, *checkers),
        )


async def state(api: Api, message: r.ChatMessage) -> tuple[Any, ...]:
    """All that an attachment could have changed."""
    return (
        await get_session(api, message.session_id),
        await get_message(api, message.id),
        await list_all_attachments(api, session_id=message.session_id),
    )


async def test_uniform_error(world: World) -> None:
    """The error for a missing file, which must equal the error for every attack."""
    with refused(StatusCode.FAILED_PRECONDITION, REASON) as gone:
        await world.api.attachment(world.message.id, file_url=f"http://{world.public.at}/gone")
    assert gone.text == REFUSAL == world.uniform[1]
    assert gone.details["PreconditionFailure"].violations[0].subject == "file_url"


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
async def test_attack_is_rejected(
    world: World,
    environment: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    """The error is the same for every kind, no trap is contacted, and nothing is stored."""
    attack = CHECKED[kind]
    if kind not in HANGING:
        monkeypatch.setattr(world.checker, "_timeout", LONG_TIMEOUT)
    environment(attack.environment)
    before = await state(world.api, world.message)
    world.expect(attack.pages)
    with watched() as connects:
        refusals = await asyncio.gather(*world.attach(attack.url))

    assert refusals == [world.uniform] * 3
    assert set(connects) <= world.open
    assert await world.sprung() == []
    assert await state(world.api, world.message) == before
    asked = [request.split()[1] for request in world.public.requests]
    assert set(attack.pages) <= set(asked), "the attack has come to where it was to begin"
    assert "/ok" not in asked
    ours = ("authorization:", "cookie:", world.api.tenant)
    assert not [header for header in ours if header in "".join(world.public.requests).lower()]
    # The server sends what the kernel buffers on both sides, even if nobody reads it.
    assert world.public.sent < 64 << 20


@pytest.mark.parametrize("kind", MALFORMED)
async def test_malformed_attack_is_rejected(world: World, kind: str) -> None:
    """A malformed URL, another scheme or user info is a violation; no host is contacted."""
    before = await state(world.api, world.message)
    world.expect({})
    with watched() as connects:
        refusals = await asyncio.gather(*world.attach(MALFORMED[kind]))
    assert [code for code, *_ in refusals] == [StatusCode.INVALID_ARGUMENT] * 3
    alone, with_message, updated = [text for _, text, _ in refusals]
    assert alone.startswith("attachment.file_url: ")
    assert updated == alone
    assert with_message == alone.replace("attachment.", "message.attachments[0].")
    assert "secret" not in repr(refusals)
    assert connects == []
    assert not world.names.asked
    assert await world.sprung() == []
    assert await state(world.api, world.message) == before


@pytest.mark.parametrize("host", [PUBLIC, "public.test"])
async def test_accessible_url_is_stored(world: World, host: str) -> None:
    """In the same world, a URL that answers is accessible, straight or by a redirect."""
    world.expect({"/first": to("http://public.test:{port}/ok")})
    for path in ("ok", "first"):
        url = f"http://{host}:{world.ports['port']}/{path}"
        file = await world.api.attachment(world.message.id, file_url=url)
        assert file.file_url == url
        assert (await update_attachment(world.api, file.id, f"{url}?")).file_url == f"{url}?"


async def test_slow_urls_use_no_connection(world: World, start_server: Any) -> None:
    """URLs that hang in every way take 3 seconds; the one connection is free meanwhile."""
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(attachment_url, "AttachmentUrlChecker", AttachmentUrlChecker)
        api = await start_server(
            world.database,
            attachment_url_check=True,
            attachment_url_schemes="http,https",
            pool_size=1,
            unary_timeout_seconds=6,
        )
    message = await api.message((await api.session()).id)
    world.expect({})
    file = await api.attachment(message.id, file_url=f"http://{world.public.at}/ok")
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
            *(api.attachment(message.id, file_url=url) for url in urls[:2]),
            *(update_attachment(api, file.id, url) for url in urls[2:4]),
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
    """Too many slow URLs are RESOURCE_EXHAUSTED, and another tenant's URL is accepted."""
    world.expect({"/slow": page(silence)})
    good, slow = (f"http://{world.public.at}/{path}" for path in ("ok", "slow"))
    flood = [a_file(file_url=f"{slow}?{number}") for number in range(20)]
    session = await get_session(world.api, world.message.session_id)
    async with Api(world.api.address, f"other {an_id()}") as other:
        message = await other.message((await other.session()).id)
        flooding = [
            asyncio.create_task(refusal(world.api.message(session.id, attachments=flood)))
            for _ in range(5)
        ]
        while len(world.public.requests) < 25:
            await asyncio.sleep(0.01)
        file = await other.attachment(message.id, file_url=good)
        assert file.file_url == good
        updated = await update_attachment(other, file.id, f"{good}?new")
        assert updated.file_url == f"{good}?new"
        with refused(StatusCode.RESOURCE_EXHAUSTED, "URL_CHECKS_BUSY"):
            await update_attachment(world.api, world.file.id, f"{slow}?new")
        assert not all(call.done() for call in flooding)

    answers = Counter(await asyncio.gather(*flooding))
    assert sorted(answers.values()) == [1, 4], "the four are byte for byte the same"
    (busy, _), (looked_at, _) = answers.most_common()
    assert looked_at[0] is StatusCode.FAILED_PRECONDITION
    assert busy[:2] == (StatusCode.RESOURCE_EXHAUSTED, "too many file_url checks in progress")
    assert b"URL_CHECKS_BUSY" in dict(busy[2])["grpc-status-details-bin"]
    assert await get_session(world.api, session.id) == session
    with_one = await world.api.message(session.id, attachments=[a_file(file_url=good)])
    assert len(with_one.attachments) == 1, "it has its turns again"


@dataclass(frozen=True)
class AllowListCase:
    """An allow-list, and what it opens; everything else in OTHERS stays shut."""

    entry: str
    urls: tuple[str, ...]
    tried: str = ""  # is connected to, and does not speak https


# An allowed address is one in each of its notations.
ADDRESS = (f"http://{PRIVATE}:{{port}}/", "http://2130706433:{port}/")
STORE = (
    "http://localhost:{port}/",
    "http://LocalHost:{port}/b?c#d",
    "http://%6cocalhost:{port}/",
    "http://\uff4cocalhost:{port}/",
)
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
    "http://private.test:{port}/",
    f"http://{PUBLIC}:{{port}}/to-store",
    f"http://{PUBLIC}:{{port}}/to-address",
    "https://localhost:{other}/",
)
ALLOWED = {
    "name": AllowListCase("localhost:{port}", STORE),
    "name in capitals": AllowListCase("LOCALHOST:{port}", STORE),
    "name and other port": AllowListCase(
        "localhost:{other}", ("http://localhost:{other}/",), tried="https://localhost:{other}/"
    ),
    "address": AllowListCase(f"{PRIVATE}:{{port}}", ADDRESS),
    "IPv6 address": AllowListCase("[::1]:{port}", ("http://[::1]:{port}/",)),
    "another name": AllowListCase("store.test:{port}", ()),
}


@pytest.mark.parametrize("kind", ALLOWED)
async def test_allow_list_allows_only_what_it_names(
    world: World, start_server: Any, kind: str
) -> None:
    """An entry allows URLs with exactly its host and port, and no other URL that leads there."""
    case = ALLOWED[kind]
    if "[" in case.entry and not any(":" in trap.host for trap in world.traps):
        pytest.skip("needs IPv6")
    pages = {
        "/to-store": to("http://localhost:{port}/"),
        "/to-address": to(f"http://{PRIVATE}:{{port}}/"),
    }
    api = await start_server(
        world.database,
        attachment_url_check=True,
        attachment_url_schemes="http,https",
        attachment_url_allowed_hosts=world.fill(case.entry),
    )
    message = await api.message((await api.session()).id)
    file = await api.attachment(message.id, file_url=f"http://{world.public.at}/ok")
    accepted = []
    for url in OTHERS:
        world.expect(pages)
        with watched() as connects:
            file_url = world.fill(url)
            outcomes = await asyncio.gather(
                api.attachment(message.id, file_url=file_url),
                update_attachment(api, file.id, file_url),
                return_exceptions=True,
            )
            if isinstance(outcomes[0], r.ChatAttachment):
                assert [outcome.file_url for outcome in outcomes] == [file_url] * 2
                accepted.append(url)
            else:
                assert [(error.code(), error.details()) for error in outcomes] == [
                    (StatusCode.FAILED_PRECONDITION, REFUSAL)
                ] * 2
        if url not in (*accepted, case.tried):
            assert set(connects) <= world.open, url
            assert await world.sprung() == [], url
    assert tuple(accepted) == case.urls
