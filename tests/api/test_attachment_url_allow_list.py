"""The allow-list of hosts, and the list of schemes, that an operator sets for attachment URLs."""

import pytest
from support.sites import OK, PRIVATE, PUBLIC, dns, paths, redirect, serve
from support.url_checkers import TENANT, NewChecker, checker_allowing

from chat_ticket_svc.services.attachment_url import AttachmentUrlChecker

pytestmark = pytest.mark.asyncio


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
            assert await checker_allowing(site, other).find_inaccessible(TENANT, urls) == [0]
            assert await other.visits() == 0


@pytest.mark.parametrize("host", ["localhost:{}", "127.0.0.2:{}", "u@a.test:{}", "a.test:1{}"])
async def test_allowed_host_allows_no_other_destination(host: str, internet: NewChecker) -> None:
    """Not the same host by another name, the internet, user info, or another port."""
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


WELL_FORMED = [
    "a",
    "a.test:8080",
    "A.Test.",
    "127.0.0.1:9000",
    "[::1]:9000",
    "[fc00::1]",
    "é.test",
    "proj_minio_1:9000",
]
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
