"""Attachment URLs: a URL that answers with success is accessible."""

import asyncio
import logging
import shutil
import ssl
import subprocess
from pathlib import Path

import pytest
from support.sites import OK, PRIVATE, dns, paths, redirect, serve, status
from support.url_checkers import ANOTHER, TENANT, checker_allowing

from chat_ticket_svc.services import attachment_url
from chat_ticket_svc.services.attachment_url import AttachmentUrlChecker

pytestmark = pytest.mark.asyncio


async def test_status() -> None:
    """Success alone is accessible, and the 416 with which an empty file answers."""
    good, bad = [200, 204, 206, 299, 416], [300, 304, 401, 403, 404, 410, 500, 503]
    async with serve(paths({f"/{code}": status(code) for code in good + bad})) as site:
        checker = checker_allowing(site)
        assert (
            await checker.find_inaccessible(TENANT, [f"http://{site.at}/{code}" for code in good])
            == []
        )
        urls = [f"http://{site.at}/{code}" for code in bad]
        assert await checker.find_inaccessible(TENANT, urls) == list(range(len(urls)))


async def test_asks_for_one_byte() -> None:
    """The check requests one uncompressed byte of exactly the given path and query."""
    async with serve() as site:
        assert (
            await checker_allowing(site).find_inaccessible(
                TENANT, [f"http://{site.at}/a;v=1/b%20c;w?d=;e#f"]
            )
            == []
        )
    head = site.requests[0].lower().split("\r\n")
    assert head[0] == "get /a;v=1/b%20c;w?d=;e http/1.1"
    assert {f"host: {site.at}", "range: bytes=0-0", "accept-encoding: identity"} < set(head)


async def test_ipv6() -> None:
    """An IPv6 address is asked by its proper name."""
    try:
        async with serve(host="::1") as site:
            assert (
                await checker_allowing(site).find_inaccessible(TENANT, [f"http://{site.at}/"]) == []
            )
    except OSError:
        pytest.skip("needs IPv6")
    assert f"host: {site.at}" in site.requests[0].lower().split("\r\n")


async def test_positions() -> None:
    """The positions of all inaccessible URLs, and of no others, come back in order."""
    async with serve(paths({"/yes": OK, "/no": status(404)})) as site:
        yes, no = f"http://{site.at}/yes", f"http://{site.at}/no"
        urls = [no, yes, "http://[", yes, no, "http://10.0.0.1/"]
        assert await checker_allowing(site).find_inaccessible(TENANT, urls) == [0, 2, 4, 5]
        assert await site.visits() == 2, "a repeated URL is asked once"
        assert await checker_allowing(site).find_inaccessible(TENANT, []) == []


async def test_concurrent() -> None:
    """The URLs of a request are asked at once: none waits for another's answer."""
    together = asyncio.Barrier(20)

    async def answer(request: str, writer: asyncio.StreamWriter) -> None:
        await together.wait()
        writer.write(OK)

    async with serve(answer) as site:
        urls = [f"http://{site.at}/{number}" for number in range(20)]
        assert await checker_allowing(site).find_inaccessible(TENANT, urls) == []


@pytest.mark.parametrize(("tenants", "at_once"), [([TENANT], 2), ([TENANT, ANOTHER], 3)])
async def test_concurrency_is_bounded(
    tenants: list[str], at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checks at a time are limited, for each tenant and in all, and every URL is checked."""
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
        checker = checker_allowing(site)
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
        assert await checker_allowing(site).find_inaccessible(TENANT, [f"http://{site.at}/"]) == []
        assert await proxy.visits() == 0
        assert "authorization" not in site.requests[0].lower()


async def test_logs(caplog: pytest.LogCaptureFixture) -> None:
    """No part of a URL is logged, at any level."""
    logging.getLogger("httpcore").setLevel(logging.NOTSET)
    caplog.set_level(logging.DEBUG)
    answers = {"/?canary=1": redirect("/?canary=2"), "/?canary=2": status(404)}
    async with serve(paths(answers)) as site:
        assert await checker_allowing(site).find_inaccessible(
            TENANT, [f"http://{site.at}/?canary=1"]
        ) == [0]
        assert len(site.requests) == 2
    assert "canary" not in caplog.text
    assert PRIVATE not in caplog.text
