"""Generates the stubs of protos/ in src/. With --check, only compares them with those in src/."""

import argparse
import os
import sys
import sysconfig
import tempfile
from pathlib import Path

import grpc_tools
from grpc_tools import protoc

ROOT = Path(__file__).parent.parent
PACKAGE = Path("chat_ticket/v1")


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


def contents(root: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in (root / PACKAGE).glob("*_pb2*")}


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
