"""Generates in src/chat_ticket what comes from .proto files. With --check, only compares it.

These are the stubs of protos/, and the descriptors of google.rpc's error details. The client loads
the descriptors itself, so its users need no package for them.
"""

import argparse
import os
import sys
import sysconfig
import tempfile
from pathlib import Path

import grpc_tools
from google.protobuf import any_pb2, descriptor_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_tools import protoc

ROOT = Path(__file__).parent.parent
PACKAGE = Path("chat_ticket/v1")
GOOGLE_RPC = Path("chat_ticket/google_rpc.binpb")
SERVICE_CONFIG = PACKAGE / "chat_ticket_grpc_service_config.json"


def generate(out: Path) -> None:
    os.environ["PATH"] = f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ['PATH']}"
    protos = sorted(str(path) for path in (ROOT / "protos" / PACKAGE).glob("*.proto"))
    status = protoc.main(
        [
            "protoc",
            f"-I{ROOT / 'protos'}",
            f"-I{Path(grpc_tools.__file__).parent / '_proto'}",
            f"--python_out={out}",
            f"--grpc_python_out={out}",
            f"--mypy_out=quiet:{out}",
            f"--mypy_grpc_out=quiet:{out}",
            *protos,
        ]
    )
    if status != 0:
        sys.exit(status)
    (out / GOOGLE_RPC).write_bytes(google_rpc())
    # A copy, because an sdist keeps a link to a file outside of it as a broken link.
    (out / SERVICE_CONFIG).write_bytes((ROOT / "protos" / SERVICE_CONFIG).read_bytes())


def google_rpc() -> bytes:
    """The descriptors of google.rpc.Status and of its details, each file after its imports."""
    modules = (any_pb2, duration_pb2, status_pb2, error_details_pb2)
    files = [descriptor_pb2.FileDescriptorProto() for _ in modules]
    for file, module in zip(files, modules, strict=True):
        module.DESCRIPTOR.CopyToProto(file)
    descriptors = descriptor_pb2.FileDescriptorSet(file=files)
    return descriptors.SerializeToString(deterministic=True)


def contents(root: Path) -> dict[str, bytes]:
    stubs = (root / PACKAGE).glob("*_pb2*")
    paths = (*stubs, root / GOOGLE_RPC, root / SERVICE_CONFIG)
    return {path.name: path.read_bytes() for path in paths if path.exists()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    if not parser.parse_args().check:
        for stale in (ROOT / "src" / PACKAGE).glob("*_pb2*"):
            stale.unlink()
        generate(ROOT / "src")
        return
    with tempfile.TemporaryDirectory() as directory:
        generate(Path(directory))
        fresh, committed = contents(Path(directory)), contents(ROOT / "src")
    differing = sorted(
        name for name in fresh.keys() | committed.keys() if fresh.get(name) != committed.get(name)
    )
    if differing:
        sys.exit(f"out of date, run make proto: {', '.join(differing)}")


if __name__ == "__main__":
    main()
