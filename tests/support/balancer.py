"""nginx with docs/nginx.conf, on ports and in a directory of its own. It is Debian's nginx."""

import contextlib
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

CONF = Path(__file__).parents[2] / "docs" / "nginx.conf"
START_SECONDS = 10
MAIN = """
daemon off;
worker_processes 1;
pid {directory}/pid;
error_log {directory}/error.log;
events {{ worker_connections 4096; }}
http {{
    access_log off;
    client_body_temp_path {directory}/body;
    proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi;
    scgi_temp_path {directory}/scgi;
    include {directory}/chat_ticket.conf;
}}
"""


def program() -> str | None:
    return shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")


def configured(directory: Path, servers: Sequence[str]) -> str:
    """Write the configuration for two servers; returns the address to call."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    text = CONF.read_text()
    for port, server in zip((50051, 50052), servers, strict=True):
        text = text.replace(f"server 127.0.0.1:{port} ", f"server {server} ")
    text = re.sub(r"listen 127\.0\.0\.1:\d+", f"listen {address}", text)
    (directory / "chat_ticket.conf").write_text(text)
    (directory / "nginx.conf").write_text(MAIN.format(directory=directory))
    return address


def command(directory: Path, *arguments: str) -> list[str]:
    """Of nginx on the configuration written there."""
    name = program()
    assert name is not None, "nginx is needed: Debian's package nginx-light is enough"
    files = ["-c", str(directory / "nginx.conf"), "-e", str(directory / "error.log")]
    return [name, *files, "-p", str(directory), *arguments]


@contextlib.contextmanager
def nginx(directory: Path, servers: Sequence[str]) -> Iterator[str]:
    """Run it; yields the address to call."""
    address = configured(directory, servers)
    process = subprocess.Popen(command(directory), stdin=subprocess.DEVNULL)
    host, port = address.split(":")
    deadline = time.monotonic() + START_SECONDS
    try:
        while True:
            with contextlib.suppress(OSError), socket.create_connection((host, int(port))):
                break
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError((directory / "error.log").read_text())
            time.sleep(0.02)
        yield address
    finally:
        process.terminate()
        process.wait()
