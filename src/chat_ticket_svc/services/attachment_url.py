"""Is a URL accessible? Asked for callers who may be trying to reach our own network through us.

ssrfguard judges every address and connects to the very address it judged. What is ours is the
bound on time, connections, threads and bytes, and which hosts the operator has opened.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import threading
from collections.abc import Callable, Collection, Iterable, Sequence
from ipaddress import ip_network
from typing import Any
from urllib.parse import urlsplit
from weakref import WeakValueDictionary

import httpcore
import httpx
from ssrfguard import DEFAULT_DENIED, AddressTable, Block, Policy, Reach, Resolver, SSRFGuardError
from ssrfguard.httpx import AsyncSafeBackend
from ssrfguard.resolvers import UdpResolver

from chat_ticket_svc import errors

_PORTS = {"http": 80, "https": 443}

_HEADERS = {
    "Accept": "*/*",
    "Accept-Encoding": "identity",
    "Range": "bytes=0-0",
    "User-Agent": "chat-ticket-svc",
}

# What is read of one answer. Node's limit for headers; bodies are not wanted at all.
_MAX_BYTES = 16 * 1024

# Turns, per process: each has a connection or a name lookup at a time. A tenant's share holds the
# URLs of one request, and is so small that tenants who fill theirs leave room for others.
_AT_ONCE = 100
_AT_ONCE_OF_A_TENANT = 25

# ssrfguard permits what no registry lists. Outside 2000::/3 no IPv6 address is public, translated
# forms such as ::ffff:0:7f00:1 included; Azure's metadata service has a public IPv4 address.
_DENIED = AddressTable(
    (
        *DEFAULT_DENIED.blocks,
        Block(ip_network("::/0"), "Not global unicast", "RFC4291", Reach.DENIED),
        Block(ip_network("2000::/3"), "Global unicast", "RFC4291", Reach.PERMITTED),
        Block(ip_network("168.63.129.16/32"), "Azure WireServer", "", Reach.DENIED),
    )
)

# What an allowed host may resolve to. Link-local, where clouds serve credentials, stays closed.
_INTERNAL = tuple(
    ip_network(network)
    for network in (
        "10.0.0.0/8",
        "100.64.0.0/10",
        "127.0.0.0/8",
        "172.16.0.0/12",
        "192.168.0.0/16",
        "::1/128",
        "fc00::/7",
    )
)


class AttachmentUrlChecker:
    """Tells which URLs answer a GET with success, without ever reading what they serve.

    A URL must have one of `schemes`, no port but theirs and no user info, and may lead to public
    addresses only; each of up to five redirects is judged anew. Nothing is sent along: no cookies,
    no credentials, and no proxy of the environment is asked. Nothing outlives a check but a name
    lookup that hangs, so there is nothing to close.

    `allowed_hosts` opens internal stores. An entry is `host` or `host:port`, compared exactly but
    for case, and lifts the rules on port and private addresses for URLs that name it. It opens no
    way there from any other URL: a redirect to it is judged as if it were not listed, and its own
    redirects must stay on it. ValueError tells the positions, from 1, of the entries that are
    malformed or could never work.

    ServerCertificates are verified against certifi's authorities, or those of `SSL_CERT_FILE`.
    `resolver` stands in for all name lookups, in tests.
    """

    def __init__(
        self,
        *,
        schemes: Collection[str] = ("https",),
        allowed_hosts: Collection[str] = (),
        timeout: float = 3.0,
        resolver: Resolver | None = None,
    ) -> None:
        if unknown := set(schemes) - _PORTS.keys():
            raise ValueError(f"neither http nor https: {sorted(unknown)}")
        self._timeout = timeout
        self._tls = httpx.create_ssl_context()
        self._turns = asyncio.Semaphore(_AT_ONCE)
        # Of the tenants who have a check or a lookup under way; the others are forgotten.
        self._shares = WeakValueDictionary[str, asyncio.Semaphore]()

        self._public = (
            _policy(schemes, allowed_ports=frozenset(_PORTS[scheme] for scheme in schemes)),
            # getaddrinfo has no deadline, and a caller who picks the name picks the name server.
            resolver or self._query_dns,
        )
        self._opened: dict[tuple[str, int | None], tuple[Policy, Resolver]] = {}
        # The operator's names may be in /etc/hosts or need the search list.
        internal = resolver or socket.getaddrinfo
        malformed = []
        for position, entry in enumerate(allowed_hosts, 1):
            try:
                policy = _opening(entry, schemes)
            except (ValueError, SSRFGuardError):
                malformed.append(position)
                continue
            for host in policy.allowed_hosts:
                for port in policy.allowed_ports:
                    self._opened[host, port] = policy, internal
        if malformed:
            raise ValueError(f"entries that are no host or host:port to be allowed: {malformed}")

        # At DEBUG it writes response headers, and with them the query of a redirect's target.
        logging.getLogger("httpcore").setLevel(logging.INFO)

    async def inaccessible(self, tenant_id: str, urls: Sequence[str]) -> list[int]:
        """The positions of the URLs that are not accessible, judged all at once.

        Returns within the timeout, which covers all of `urls` together: what has not answered by
        then is inaccessible. Why a URL is inaccessible is not told, not even to the logs, so that
        the answer cannot be used to map a network.

        Checks take turns, of which a tenant has a share. When one of `urls` has found none in half
        of the time, ResourceExhaustedError says so, whatever the URLs are and the others answer.
        """
        deadline = asyncio.get_running_loop().time() + self._timeout
        share = self._shares.setdefault(tenant_id, asyncio.Semaphore(_AT_ONCE_OF_A_TENANT))
        async with asyncio.TaskGroup() as group:
            checks = {
                url: group.create_task(self._accessible(url, share, deadline))
                for url in dict.fromkeys(urls)
            }
        answers = {url: check.result() for url, check in checks.items()}
        if None in answers.values():
            raise errors.ResourceExhaustedError(
                "too many file URLs are being checked", reason="URL_CHECKS_BUSY"
            )
        return [position for position, url in enumerate(urls) if not answers[url]]

    async def _accessible(self, url: str, share: asyncio.Semaphore, deadline: float) -> bool | None:
        """Whether it is; None when its turn has not come in time to find out."""
        try:
            async with asyncio.timeout_at(deadline - self._timeout / 2):
                turn = await _take_turn(share, self._turns)
        except TimeoutError:
            return None
        try:
            async with asyncio.timeout_at(deadline):
                start = httpx.URL(url)
                port = start.port or _PORTS.get(start.scheme)
                host = start.raw_host.decode("ascii").rstrip(".")
                policy, resolver = self._opened.get((host, port), self._public)
                # Later it is judged as httpx reads it; this is how the caller wrote it.
                policy.check_url(url)
                return await self._answers(start, policy, turn.held_by(resolver))
        except Exception:
            return False
        finally:
            turn.leave()

    async def _answers(self, url: httpx.URL, policy: Policy, resolver: Resolver) -> bool:
        # Not httpx's client: it reads and decompresses the whole body of each redirect it follows,
        # keeps cookies and logs URLs.
        async with httpcore.AsyncConnectionPool(
            ssl_context=self._tls,
            network_backend=_CappedBackend(policy=policy, resolver=resolver),
        ) as pool:
            for _ in range(1 + policy.max_redirects):
                policy.check_url(str(url))
                async with pool.stream(
                    "GET",
                    httpcore.URL(
                        scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path
                    ),
                    # httpcore's own Host has no brackets round an IPv6 address.
                    headers=[("Host", url.netloc), *_HEADERS.items()],
                    # A dead first address must leave time for the next.
                    extensions={"timeout": {"connect": self._timeout / 2}},
                ) as response:
                    answer = httpx.Response(response.status, headers=response.headers)
                if not answer.has_redirect_location:
                    # An empty file has no first byte: it answers that there is no such range.
                    return answer.is_success or answer.status_code == 416
                url = url.join(answer.headers["Location"])
        return False

    def _query_dns(self, *query: Any) -> Iterable[Any]:
        # Made anew each time, as resolv.conf may change. IPv4 first: where there is no IPv6, a name
        # with many such addresses would use up its attempts on them.
        families = (socket.AF_INET, socket.AF_INET6)
        return UdpResolver(timeout=self._timeout, families=families)(*query)


class _Turn:
    """What a check holds; and its lookup, which cannot be cancelled and so may outlive it."""

    def __init__(self, give_back: Callable[[], object]) -> None:
        self._give_back = give_back
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._holders = 1

    def held_by(self, resolver: Resolver) -> Resolver:
        def lookup(*query: Any) -> Iterable[Any]:
            with self._lock:
                if not self._holders:
                    raise socket.gaierror(socket.EAI_AGAIN, "the check has ended")
                self._holders += 1
            try:
                return resolver(*query)
            finally:
                self.leave()

        return lookup

    def leave(self) -> None:
        with self._lock:
            self._holders -= 1
            last = not self._holders
        if last:
            self._loop.call_soon_threadsafe(self._give_back)


async def _take_turn(*semaphores: asyncio.Semaphore) -> _Turn:
    with contextlib.ExitStack() as taken:
        for semaphore in semaphores:
            await semaphore.acquire()
            taken.callback(semaphore.release)
        return _Turn(taken.pop_all().close)


class _CappedStream(httpcore.AsyncNetworkStream):
    def __init__(self, stream: httpcore.AsyncNetworkStream) -> None:
        self._stream = stream
        self._left = _MAX_BYTES

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        if not self._left:
            raise httpcore.ReadError("too much")
        data = await self._stream.read(min(max_bytes, self._left), timeout)
        self._left -= len(data)
        return data

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        await self._stream.write(buffer, timeout)

    async def aclose(self) -> None:
        await self._stream.aclose()

    async def start_tls(self, *args: Any, **kwargs: Any) -> httpcore.AsyncNetworkStream:
        try:
            return _CappedStream(await self._stream.start_tls(*args, **kwargs))
        except BaseException:
            # httpcore leaves the connection open when a handshake is cancelled.
            await self.aclose()
            raise

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


class _CappedBackend(AsyncSafeBackend):
    """Bounds what a server can make us parse: interim responses may follow one another for ever."""

    async def connect_tcp(self, *args: Any, **kwargs: Any) -> httpcore.AsyncNetworkStream:
        return _CappedStream(await super().connect_tcp(*args, **kwargs))


def _policy(schemes: Collection[str], **narrowing: Any) -> Policy:
    return Policy(
        allowed_schemes=frozenset(schemes),
        denied_networks=_DENIED,
        max_redirects=5,
        # Time is bounded as a whole; large stores have eight addresses of each family.
        max_connection_attempts=16,
        **narrowing,
    )


def _opening(entry: str, schemes: Collection[str]) -> Policy:
    """The policy that opens exactly what an allow-list entry names."""
    parts = urlsplit(f"//{entry}")
    if parts.netloc != entry or entry.endswith(":"):
        raise ValueError("more or less than host:port")
    ports = {_PORTS[scheme] for scheme in schemes} if parts.port is None else {parts.port}
    policy = _policy(
        schemes,
        allowed_ports=frozenset(ports),
        allowed_hosts=frozenset({parts.hostname or ""}),
        allowed_networks=_INTERNAL,
    )
    for scheme in schemes:
        policy.check_url(f"{scheme}://{entry}")
    return policy
