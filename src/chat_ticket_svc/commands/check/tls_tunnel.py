"""A tunnel through TLS to the server that has one known certificate.

gRPC verifies the name in a certificate, but knows no URIs, such as SPIFFE ids, and hides why a
handshake fails. Here the certificate itself is compared, whatever its names are.
"""

import asyncio
import contextlib
import ssl
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from chat_ticket_svc.commands.check.line import CheckFailed

CHUNK_BYTES = 65536
SHUTDOWN_SECONDS = 1


@contextlib.asynccontextmanager
async def open_tunnel(
    host: str, port: int, own: x509.Certificate, context: ssl.SSLContext
) -> AsyncIterator[str]:
    """Yield the gRPC target of a private Unix socket, which leads to the server.

    Raises CheckFailed if the server cannot be reached, or does not present `own`. Carries one
    connection.
    """
    reader, writer = await _connect(host, port, context)
    try:
        if writer.get_extra_info("ssl_object").getpeercert(True) != own.public_bytes(Encoding.DER):
            raise CheckFailed(
                "presents another certificate than the one in CHAT_TICKET_TLS_CERTIFICATE"
            )

        async def carry(local_reader: asyncio.StreamReader, local: asyncio.StreamWriter) -> None:
            await asyncio.gather(_copy(local_reader, writer), _copy(reader, local))

        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "tunnel"
            async with await asyncio.start_unix_server(carry, path):
                yield f"unix:{path}"
    finally:
        writer.close()


def client_context() -> ssl.SSLContext:
    """A context without trust: `open_tunnel` compares the certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    return context


async def _connect(
    host: str, port: int, context: ssl.SSLContext
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    try:
        return await asyncio.open_connection(
            host, port, ssl=context, ssl_shutdown_timeout=SHUTDOWN_SECONDS
        )
    except ssl.SSLError as error:
        raise CheckFailed(f"does not complete the TLS handshake: {error.reason}") from error
    except OSError as error:
        raise CheckFailed("does not respond: UNAVAILABLE") from error


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):  # the other end sees that the connection has ended
        while data := await reader.read(CHUNK_BYTES):
            writer.write(data)
            await writer.drain()
    writer.close()
