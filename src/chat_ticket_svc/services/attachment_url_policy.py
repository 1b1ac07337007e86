"""Which file URLs the server may request, and which addresses they may lead to."""

import re
from collections.abc import Collection
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import Any

from ssrfguard import DEFAULT_DENIED, AddressTable, Block, Policy, Reach, SSRFGuardError

from chat_ticket_svc.services import web_url
from chat_ticket_svc.services.web_url import WebUrl

DEFAULT_PORTS = {"http": 80, "https": 443}

MAX_REDIRECTS = 5

# Large stores have eight addresses of each family. The time limit of a check bounds the attempts.
MAX_CONNECTION_ATTEMPTS = 16

# ssrfguard permits addresses that no registry lists. No IPv6 address outside of 2000::/3 is public,
# translated forms such as ::ffff:0:7f00:1 included. Azure's metadata service has a public address.
DENIED_NETWORKS = AddressTable(
    (
        *DEFAULT_DENIED.blocks,
        Block(ip_network("::/0"), "Not global unicast", "RFC4291", Reach.DENIED),
        Block(ip_network("2000::/3"), "Global unicast", "RFC4291", Reach.PERMITTED),
        Block(ip_network("168.63.129.16/32"), "Azure WireServer", "", Reach.DENIED),
    )
)

# The private networks that an allowed host may be in. The link-local networks stay denied: clouds
# serve credentials there.
INTERNAL_NETWORKS = tuple(
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

# Names of Compose services and of Windows machines have underscores, which ssrfguard refuses.
MAX_HOST_NAME = 253
HOST_NAME = re.compile(r"([a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?\.)*[a-z0-9_-]{1,63}\.?")

ALLOWED_HOST = re.compile(r"(\[[^\[\]@]+\]|[^\s:/?#\\@\[\]]+)(?::([0-9]+))?")

HostAndPort = tuple[str, int | None]


def public_policy(schemes: Collection[str]) -> Policy:
    """The policy for all hosts that are not allowed by name: public addresses and default ports."""
    return _policy(schemes, allowed_ports=_default_ports(schemes))


def check_url(policy: Policy, url: WebUrl) -> None:
    """Raise ValueError or SSRFGuardError unless the policy permits a request of the URL.

    A name may still lead to an address that the policy denies. ssrfguard checks each address when
    it connects.
    """
    if url.scheme not in policy.allowed_schemes or url.has_user_info:
        raise ValueError("scheme or user info")
    if port_of(url) not in policy.allowed_ports:
        raise ValueError("port")
    address = _address(url.host)
    if address is not None:
        policy.check_address(address)
    elif len(url.host) > MAX_HOST_NAME or not HOST_NAME.fullmatch(url.host):
        raise ValueError("no name of a host")
    policy.check_host(url.host)


def port_of(url: WebUrl) -> int:
    return url.port or DEFAULT_PORTS[url.scheme]


def _address(host: str) -> IPv4Address | IPv6Address | None:
    try:
        return ip_address(host)
    except ValueError:
        return None


def allowed_host_policies(
    entries: Collection[str], schemes: Collection[str]
) -> dict[HostAndPort, Policy]:
    """The policies for the hosts of the allow-list.

    An entry is `host` or `host:port`. ValueError names the positions, from 1, of the entries that
    are malformed or that no URL could match.
    """
    policies: dict[HostAndPort, Policy] = {}
    malformed = []
    for position, entry in enumerate(entries, 1):
        try:
            policy = _allowed_host_policy(entry, schemes)
        except (ValueError, SSRFGuardError):
            malformed.append(position)
            continue
        for host in policy.allowed_hosts:
            for port in policy.allowed_ports:
                policies[host, port] = policy
    if malformed:
        raise ValueError(f"entries that are not a host or host:port: {malformed}")
    return policies


def _allowed_host_policy(entry: str, schemes: Collection[str]) -> Policy:
    found = ALLOWED_HOST.fullmatch(entry)
    if found is None:
        raise ValueError("not host or host:port")
    host, port = found[1], found[2]
    urls = [web_url.parse(f"{scheme}://{entry}") for scheme in schemes]
    serialised = urls[0].host
    if isinstance(_address(serialised), IPv4Address) and serialised != host:
        raise ValueError("an address in another notation than 127.0.0.1")
    policy = _policy(
        schemes,
        allowed_ports=frozenset({int(port)}) if port else _default_ports(schemes),
        allowed_hosts=frozenset({serialised}),
        allowed_networks=INTERNAL_NETWORKS,
    )
    for url in urls:
        check_url(policy, url)
    return policy


def _default_ports(schemes: Collection[str]) -> frozenset[int]:
    return frozenset(DEFAULT_PORTS[scheme] for scheme in schemes)


def _policy(schemes: Collection[str], **restrictions: Any) -> Policy:
    return Policy(
        allowed_schemes=frozenset(schemes),
        denied_networks=DENIED_NETWORKS,
        max_redirects=MAX_REDIRECTS,
        max_connection_attempts=MAX_CONNECTION_ATTEMPTS,
        **restrictions,
    )
