"""Which file URLs the server may request, and which addresses they may lead to."""

from collections.abc import Collection
from ipaddress import ip_network
from typing import Any
from urllib.parse import urlsplit

from ssrfguard import DEFAULT_DENIED, AddressTable, Block, Policy, Reach, SSRFGuardError

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

HostAndPort = tuple[str, int | None]


def public_policy(schemes: Collection[str]) -> Policy:
    """The policy for all hosts that are not allowed by name: public addresses and default ports."""
    return _policy(schemes, allowed_ports=_default_ports(schemes))


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
    parts = urlsplit(f"//{entry}")
    if parts.netloc != entry or entry.endswith(":"):
        raise ValueError("not host or host:port")
    policy = _policy(
        schemes,
        allowed_ports=_default_ports(schemes) if parts.port is None else frozenset({parts.port}),
        allowed_hosts=frozenset({parts.hostname or ""}),
        allowed_networks=INTERNAL_NETWORKS,
    )
    for scheme in schemes:
        policy.check_url(f"{scheme}://{entry}")
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
