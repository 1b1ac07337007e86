"""The addresses that a server listens on, as text, and the error for one that is not free."""


class ListenError(Exception):
    """The server cannot listen on the address."""

    def __init__(self, address: str):
        super().__init__(
            f"cannot listen on {address}: the port is in use, or this machine lacks the address"
        )


def format_address(host: str, port: int) -> str:
    """`host:port`, with an IPv6 address in brackets."""
    if ":" in host and not host.startswith("["):
        host = f"[{host}]"
    return f"{host}:{port}"
