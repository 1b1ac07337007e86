"""Attachment URLs that are never requested: private addresses, and what leads to them."""

import socket
from collections.abc import Iterable
from typing import Any

import httpcore
import pytest
from support.sites import OK, PRIVATE, PUBLIC, dns, paths, redirect, serve
from support.url_checkers import TENANT, NewChecker, checker_allowing

from chat_ticket_svc.services.attachment_url import AttachmentUrlChecker

pytestmark = pytest.mark.asyncio


async def test_https_only_by_default() -> None:
    """Without a setting http is rejected, even to an allowed host."""
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
    *("%31%32%37.0.0.1", "①②⑦.⓪.⓪.①", "\uff11\uff12\uff17.0.0.1", "127。0。0。1"),
    # IPv6, plain and with an IPv4 address inside.
    *("[::]", "[::1]", "[0:0:0:0:0:0:0:1]", "[fe80::1]", "[fe80::1%25eth0]", "[fec0::1]"),
    *("[fc00::1]", "[fd00:ec2::254]", "[ff02::1]", "[2001:db8::1]", "[100::1]", "[4000::1]"),
    *("[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[::ffff:169.254.169.254]", "[::127.0.0.1]"),
    *("[::ffff:0:127.0.0.1]", "[64:ff9b::127.0.0.1]", "[64:ff9b::a9fe:a9fe]"),
    *("[64:ff9b:1::127.0.0.1]", "[2002:7f00:1::]", "[2002:a9fe:a9fe::1]", "[2002:a00:1::]"),
    *("[2001:0:7f00:1::]", "[2001:0:808:808::80ff:fffe]"),
]


async def test_rejected_addresses(internet: NewChecker, attempts: list[str]) -> None:
    """Addresses that are not public are never contacted, in any notation."""
    async with serve() as site:
        # The platform's resolver understands notations that no URL should have.
        checker = internet(site, resolver=socket.getaddrinfo)
        urls = [f"http://{host}:{site.port}/" for host in REFUSED]
        assert await checker.find_inaccessible(TENANT, urls) == list(range(len(urls)))
        assert attempts == []
        assert await site.visits() == 0


PUBLIC_ADDRESSES = [
    "8.8.8.8",
    "8.8.2056",
    "[2606:4700::1111]",
    "[64:ff9b::8.8.8.8]",
    "[::ffff:8.8.8.8]",
]


async def test_public_addresses(attempts: list[str]) -> None:
    """Public addresses are accepted, also as the NAT64 addresses of IPv6-only networks."""
    urls = [f"https://{host}/" for host in PUBLIC_ADDRESSES]
    await AttachmentUrlChecker().find_inaccessible(TENANT, urls)
    assert len(attempts) == len(urls)


@pytest.mark.parametrize(
    "addresses",
    [[PRIVATE], [PUBLIC, PRIVATE], [PRIVATE, PUBLIC], [PUBLIC, "::1"], [PUBLIC, "::ffff:10.0.0.1"]],
)
async def test_rejected_names(addresses: list[str], internet: NewChecker) -> None:
    """A name is rejected when any of its addresses is."""
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
    """User info is rejected, even empty."""
    async with serve() as site:
        assert await checker_allowing(site).find_inaccessible(
            TENANT, [f"http://{user}{site.at}/"]
        ) == [0]
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
    """An unexpected failure counts as inaccessible."""

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("a bug in a library")

    async with serve() as site:
        monkeypatch.setattr(httpcore.AsyncConnectionPool, "stream", broken)
        assert await checker_allowing(site).find_inaccessible(TENANT, [f"http://{site.at}/"]) == [0]


async def test_redirects() -> None:
    """Five redirects are followed, and no sixth."""
    chain = {f"/{left}": redirect(f"/{left - 1}") for left in range(1, 7)}
    async with serve(paths({"/0": OK, **chain})) as site:
        urls = [f"http://{site.at}/5", f"http://{site.at}/6"]
        assert await checker_allowing(site).find_inaccessible(TENANT, urls) == [1]
        assert await site.visits() == 6 + 6


@pytest.mark.parametrize("host", [PRIVATE, "localhost", "[::ffff:127.0.0.1]", "0x7f.1"])
async def test_redirect_to_rejected(host: str, internet: NewChecker) -> None:
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
        assert await checker_allowing(site).find_inaccessible(TENANT, [f"http://{site.at}/"]) == [0]
        assert await site.visits() == 1


async def test_cookies() -> None:
    """A cookie is never sent back, in the same check or a later one."""
    answers = {"/first": redirect("/second", "Set-Cookie: a=b; Path=/"), "/second": OK}
    async with serve(paths(answers)) as site:
        checker = checker_allowing(site)
        for _ in range(2):
            assert await checker.find_inaccessible(TENANT, [f"http://{site.at}/first"]) == []
    assert len(site.requests) == 4
    assert not [request for request in site.requests if "cookie:" in request.lower()]
