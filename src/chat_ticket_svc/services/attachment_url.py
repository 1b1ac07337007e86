"""The check that file URLs are accessible, which callers cannot use to reach internal networks.

ssrfguard checks every address, and connects to the very address that it has checked. This module
limits time, connections, threads and bytes, and applies the operator's allow-list.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import threading
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any
from weakref import WeakValueDictionary

import httpcore
import httpx
from ssrfguard import Policy, Resolver
from ssrfguard.httpx import AsyncSafeBackend
from ssrfguard.resolvers import UdpResolver

from chat_ticket_svc import errors
from chat_ticket_svc.services import attachment_url_policy, web_url
from chat_ticket_svc.services.attachment_url_policy import DEFAULT_PORTS
from chat_ticket_svc.services.web_url import WebUrl

_HEADERS = {
    "Accept": "*/*",
    "Accept-Encoding": "identity",
    "Range": "bytes=0-0",
    "User-Agent": "chat-ticket-svc",
}

# Read of one connection at most. This is Node's limit for headers; no body is read.
_MAX_RESPONSE_BYTES = 16 * 1024

# Checks in progress per process. Each has one connection or one name lookup at a time. A tenant's
# limit covers the URLs of one request, and leaves room for other tenants when several reach it.
_MAX_CHECKS = 100
_MAX_TENANT_CHECKS = 25


class AttachmentUrlChecker:
    """Finds out which URLs answer a GET with success, without reading their content.

    A URL must have one of `schemes` and its default port, no user info, and a public address. Each
    of up to five redirects is checked in the same way. Requests carry neither cookies nor
    credentials, and ignore the proxies of the environment. Only a name lookup that hangs outlives
    its check, so there is nothing to close.

    `allowed_hosts` permits internal stores. An entry is `host` or `host:port`, compared with the
    host of the URL in its serialised form. It permits any port and private addresses to URLs that
    name it, and only to these: a redirect to it from another URL is checked as if it were not
    listed, and its own redirects must stay on it. ValueError names the positions, from 1, of the
    entries that are malformed or that no URL could match.

    Server certificates are verified against certifi's authorities, or those of `SSL_CERT_FILE`.
    `resolver` replaces all name lookups, in tests.
    """

    def __init__(
        self,
        *,
        schemes: Collection[str] = ("https",),
        allowed_hosts: Collection[str] = (),
        timeout: float = 3.0,
        resolver: Resolver | None = None,
    ) -> None:
        if unknown := set(schemes) - DEFAULT_PORTS.keys():
            raise ValueError(f"neither http nor https: {sorted(unknown)}")
        self._timeout = timeout
        self._tls = httpx.create_ssl_context()
        self._slots = asyncio.Semaphore(_MAX_CHECKS)
        # Weak: only tenants with a check or a lookup in progress have an entry.
        self._tenant_slots = WeakValueDictionary[str, asyncio.Semaphore]()

        self._public = (
            attachment_url_policy.public_policy(schemes),
            # Not getaddrinfo, which has no timeout: a caller who chooses the name also chooses the
            # name server that answers.
            resolver or self._query_dns,
        )
        # An operator's names may be in /etc/hosts or depend on the search list.
        self._allowed_resolver = resolver or socket.getaddrinfo
        self._allowed = attachment_url_policy.allowed_host_policies(allowed_hosts, schemes)

        # At DEBUG httpcore logs response headers, and with them the query of a redirect's target.
        logging.getLogger("httpcore").setLevel(logging.INFO)

    async def find_inaccessible(self, tenant_id: str, urls: Sequence[str]) -> list[int]:
        """Check all URLs at once, and return the positions of those that are not accessible.

        The timeout covers all of `urls` together. A URL that has not answered by then is not
        accessible. Neither the caller nor the log learns why a URL is not accessible, so nobody can
        use the result to map a network.

        Each check needs a slot, and a tenant has a limited number of them. When a URL gets none
        within half of the timeout, ResourceExhaustedError says so, whatever the other URLs answer.
        """
        deadline = asyncio.get_running_loop().time() + self._timeout
        tenant_slots = self._tenant_slots.setdefault(
            tenant_id, asyncio.Semaphore(_MAX_TENANT_CHECKS)
        )
        async with asyncio.TaskGroup() as group:
            checks = {
                url: group.create_task(self._is_accessible(url, tenant_slots, deadline))
                for url in dict.fromkeys(urls)
            }
        results = {url: check.result() for url, check in checks.items()}
        if None in results.values():
            raise errors.ResourceExhaustedError(
                "too many file_url checks in progress", reason="URL_CHECKS_BUSY"
            )
        return [position for position, url in enumerate(urls) if not results[url]]

    async def _is_accessible(
        self, url: str, tenant_slots: asyncio.Semaphore, deadline: float
    ) -> bool | None:
        """Return None when no slot was free in time."""
        try:
            async with asyncio.timeout_at(deadline - self._timeout / 2):
                slot = await _acquire_slot(tenant_slots, self._slots)
        except TimeoutError:
            return None
        try:
            async with asyncio.timeout_at(deadline):
                parsed = web_url.parse(url)
                key = (parsed.host.removesuffix("."), attachment_url_policy.port_of(parsed))
                policy, resolver = self._public
                if key in self._allowed:
                    policy, resolver = self._allowed[key], self._allowed_resolver
                return await self._responds(parsed, policy, slot.hold_during(resolver))
        except Exception:
            return False
        finally:
            slot.release()

    async def _responds(self, url: WebUrl, policy: Policy, resolver: Resolver) -> bool:
        """Return whether a GET of the URL, or of what it redirects to, succeeds."""
        # Not httpx's client: it reads and decompresses the body of each redirect it follows, keeps
        # cookies and logs URLs.
        async with httpcore.AsyncConnectionPool(
            ssl_context=self._tls,
            network_backend=_CappedBackend(policy=policy, resolver=resolver),
        ) as pool:
            for _ in range(1 + policy.max_redirects):
                attachment_url_policy.check_url(policy, url)
                async with pool.stream(
                    "GET",
                    httpcore.URL(
                        scheme=url.scheme,
                        host=url.host,
                        port=attachment_url_policy.port_of(url),
                        target=url.target,
                    ),
                    # httpcore's own Host header lacks the brackets around an IPv6 address.
                    headers=[("Host", url.authority), *_HEADERS.items()],
                    # When the first address does not answer, there is time left for the next.
                    extensions={"timeout": {"connect": self._timeout / 2}},
                ) as stream:
                    response = httpx.Response(stream.status, headers=stream.headers)
                if not response.has_redirect_location:
                    # 416 means an empty file, which does not have the range of a first byte.
                    return response.is_success or response.status_code == 416
                url = web_url.join(url, response.headers["Location"])
        return False

    def _query_dns(self, *query: Any) -> Iterable[Any]:
        # A new resolver each time, because resolv.conf may change. IPv4 first: on a host without
        # IPv6, a name with many IPv6 addresses would use up the connection attempts.
        families = (socket.AF_INET, socket.AF_INET6)
        return UdpResolver(timeout=self._timeout, families=families)(*query)


class _Slot:
    """The slot of a check and its name lookup.

    A lookup runs in a thread and cannot be cancelled. When it outlives its check, it keeps the
    slot.
    """

    def __init__(self, free: Callable[[], object]) -> None:
        self._free = free
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._holders = 1

    def hold_during(self, resolver: Resolver) -> Resolver:
        """Return `resolver` so that each of its lookups holds the slot."""

        def lookup(*query: Any) -> Iterable[Any]:
            with self._lock:
                if not self._holders:
                    raise socket.gaierror(socket.EAI_AGAIN, "the check has ended")
                self._holders += 1
            try:
                return resolver(*query)
            finally:
                self.release()

        return lookup

    def release(self) -> None:
        with self._lock:
            self._holders -= 1
            is_free = not self._holders
        if is_free:
            self._loop.call_soon_threadsafe(self._free)


async def _acquire_slot(*semaphores: asyncio.Semaphore) -> _Slot:
    with contextlib.ExitStack() as acquired:
        for semaphore in semaphores:
            await semaphore.acquire()
            acquired.callback(semaphore.release)
        return _Slot(acquired.pop_all().close)


class _CappedStream(httpcore.AsyncNetworkStream):
    def __init__(self, stream: httpcore.AsyncNetworkStream) -> None:
        self._stream = stream
        self._remaining = _MAX_RESPONSE_BYTES

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        if not self._remaining:
            raise httpcore.ReadError("response too large")
        data = await self._stream.read(min(max_bytes, self._remaining), timeout)
        self._remaining -= len(data)
        return data

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        await self._stream.write(buffer, timeout)

    async def aclose(self) -> None:
        await self._stream.aclose()

    async def start_tls(self, *args: Any, **kwargs: Any) -> httpcore.AsyncNetworkStream:
        try:
            return _CappedStream(await self._stream.start_tls(*args, **kwargs))
        except BaseException:
            # httpcore does not close the connection of a handshake that is cancelled.
            await self.aclose()
            raise

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


class _CappedBackend(AsyncSafeBackend):
    """Limits the bytes of each connection: a server may send interim responses without end."""

    async def connect_tcp(self, *args: Any, **kwargs: Any) -> httpcore.AsyncNetworkStream:
        return _CappedStream(await super().connect_tcp(*args, **kwargs))
