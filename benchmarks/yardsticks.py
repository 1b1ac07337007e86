"""Servers with an empty method that have nothing of ours, to compare the empty call with."""

import contextlib
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks import ENVIRONMENT, checkout, service
from benchmarks.service import Server
from chat_ticket_svc.access import method_permissions

# Those of the service, and the empty one.
METHODS = 1 + len(
    method_permissions.METHOD_PERMISSIONS.keys() | method_permissions.UNAUTHENTICATED_METHODS
)

NODE_CLIENT = checkout.ROOT / "clients" / "node"


@contextlib.contextmanager
def stock(log: Path) -> Iterator[Server]:
    """An unmodified grpc.aio server with as many methods as ours."""
    with service.listening(
        [sys.executable, "-m", "benchmarks.stock", str(METHODS)],
        environment=ENVIRONMENT,
        directory=checkout.ROOT,
        log=log,
    ) as server:
        yield server


@contextlib.contextmanager
def grpc_js(log: Path) -> Iterator[Server | None]:
    """A server of grpc-js, or None where Node.js or the packages of clients/node are missing."""
    node = shutil.which("node")
    if node is None or not (NODE_CLIENT / "node_modules" / "@grpc" / "grpc-js").exists():
        print("grpc-js: skipped, Node.js or clients/node/node_modules is missing", file=sys.stderr)
        yield None
        return
    with service.listening(
        [node, str(Path(__file__).with_name("grpc_js.js")), str(NODE_CLIENT)],
        environment=ENVIRONMENT,
        directory=checkout.ROOT,
        log=log,
    ) as server:
        yield server
