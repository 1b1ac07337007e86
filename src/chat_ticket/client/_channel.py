"""Channel options and call metadata, the same for both clients."""

import ipaddress
from collections.abc import Callable, Iterable, Sequence
from importlib import resources
from typing import Any, Generic, TypeVar
from urllib.parse import urlsplit

SERVICE_CONFIG = "chat_ticket_grpc_service_config.json"
MIB = 1024 * 1024

TokenResult = TypeVar("TokenResult")


def channel_options() -> list[tuple[str, Any]]:
    """gRPC channel options for the service, also for channels that you open yourself.

    gRPC retries reads on UNAVAILABLE, uses every address of the target, and detects servers that
    are gone by keepalive pings.
    """
    config = resources.files("chat_ticket.v1").joinpath(SERVICE_CONFIG).read_text()
    return [
        ("grpc.service_config", config),
        # The default, pick_first, uses one address only.
        ("grpc.lb_policy_name", "round_robin"),
        # The server allows one ping every 5 seconds. A watch sends nothing but pings.
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.http2.max_pings_without_data", 0),
        # The default is two minutes. A watch should resume soon after a long outage.
        ("grpc.max_reconnect_backoff_ms", 10_000),
        # The server accepts 4 MiB, and sends at most 3 MiB.
        ("grpc.max_send_message_length", 4 * MIB),
        ("grpc.max_receive_message_length", 4 * MIB),
    ]


def options_for(
    target: str,
    *,
    has_token: bool,
    has_credentials: bool,
    options: Sequence[tuple[str, Any]],
) -> list[tuple[str, Any]]:
    """All options of a channel; ValueError when it would send a token in plain text elsewhere."""
    local = is_local(target)
    if has_token and not has_credentials and not local:
        raise ValueError(
            f"token: cannot be sent in plain text to {target}; set credentials, "
            "such as grpc.ssl_channel_credentials()"
        )
    # A proxy must not see what stays on this machine: it would see the token.
    proxy = [("grpc.enable_http_proxy", 0)] if local else []
    # Channels with equal options would otherwise share one connection, and its limit of streams.
    own_connection = ("grpc.use_local_subchannel_pool", 1)
    return [*channel_options(), own_connection, *proxy, *options]


class CallMetadata(Generic[TokenResult]):
    """What every call of a client carries: the tenant and the token."""

    def __init__(self, tenant: str | None, token: str | Callable[[], TokenResult] | None) -> None:
        fixed: list[tuple[str, str]] = []
        self.get_token: Callable[[], TokenResult] | None = None
        """Called for each call, when the token is not a string."""
        if tenant is not None:
            fixed.append(("x-tenant-id", printable_ascii("tenant", tenant)))
        if isinstance(token, str):
            fixed.append(_authorization(token))
        else:
            self.get_token = token
        # Every call has it. Interceptors of a tracing library could add to a list or a Metadata.
        self._fixed = tuple(fixed)

    def combine(
        self, given: Iterable[tuple[str, str | bytes]] | None, token: str | None
    ) -> tuple[tuple[str, str | bytes], ...]:
        """The metadata of one call: its own, then the client's. `token` is what get_token gave."""
        if self.get_token is not None:
            return (*(given or ()), *self._fixed, _authorization(token))
        return (*given, *self._fixed) if given else self._fixed


def _authorization(token: str | None) -> tuple[str, str]:
    if not isinstance(token, str):
        raise TypeError(f"token: its function returned {type(token).__name__}, must return str")
    return "authorization", f"Bearer {printable_ascii('token', token)}"


def printable_ascii(name: str, value: str) -> str:
    """The value; ValueError when gRPC cannot send it as metadata.

    gRPC's own error does not name the value, and looks like a failure of the connection.
    """
    if not (value.isascii() and value.isprintable()):
        raise ValueError(f"{name}: not printable ASCII; it may end in a line break")
    return value


def is_local(target: str) -> bool:
    """Whether the text of a gRPC target names addresses of this machine only."""
    scheme, _, rest = target.partition(":")
    if scheme in ("unix", "unix-abstract"):
        return True
    addresses = target
    if scheme in ("dns", "ipv4", "ipv6"):
        # An authority is a DNS server, which can answer that localhost is anywhere.
        addresses = rest.removeprefix("///")
    return all(_is_loopback(address) for address in addresses.split(","))


def _is_loopback(address: str) -> bool:
    try:
        parts = urlsplit(f"//{address}")
        if parts.netloc != address or "@" in address:
            return False  # gRPC reads it in another way
        host = parts.hostname or ""
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
