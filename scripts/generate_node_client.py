"""Generate the TypeScript of clients/node from protos/, or with --check compare it."""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import grpc_tools
from google.rpc import status_pb2
from grpc_tools import protoc

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "clients" / "node"
GENERATED = PACKAGE / "src" / "generated"
PLUGIN = PACKAGE / "node_modules" / ".bin" / "protoc-gen-ts_proto"
SERVICE_CONFIG = "chat_ticket/v1/chat_ticket_grpc_service_config.json"

OPTIONS = (
    "env=node",
    "esModuleInterop=true",
    "annotateFilesWithVersion=false",
    "importSuffix=.js",
    # The client needs the definitions, and the fake server of its tests the grpc-js services.
    "outputServices=grpc-js",
    "outputServices=generic-definitions",
    "emitImportedFiles=false",
    # An int64 does not fit a JavaScript number.
    "forceLong=bigint",
    "oneof=unions-value",
    # Enum values are their names, as in grpcurl and in proto JSON.
    "stringEnums=true",
    "enumsAsLiterals=true",
    "useExactTypes=false",
    # index.ts exports everything from every file, so names must not repeat.
    "exportCommonSymbols=false",
)

GOOGLE_PROTOS = (
    "google/protobuf/any.proto",
    "google/protobuf/duration.proto",
    "google/protobuf/field_mask.proto",
    "google/protobuf/timestamp.proto",
    "google/rpc/error_details.proto",
    "google/rpc/status.proto",
)


def generate(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    protos = sorted((ROOT / "protos" / "chat_ticket" / "v1").glob("*.proto"))
    _run_protoc(out, OPTIONS, *map(str, protos))
    # Google documents its own messages: their comments are not repeated here.
    _run_protoc(out, (*OPTIONS, "comments=false"), *GOOGLE_PROTOS)
    config = json.loads((ROOT / "protos" / SERVICE_CONFIG).read_text())
    (out / "service_config.ts").write_text(
        f"// Generated from protos/{SERVICE_CONFIG}.\n\n"
        f"export const SERVICE_CONFIG = {json.dumps(config, indent=2)}\n"
    )


def _run_protoc(out: Path, options: Sequence[str], *protos: str) -> None:
    status = protoc.main(
        [
            "protoc",
            f"-I{ROOT / 'protos'}",
            f"-I{Path(status_pb2.__file__).parents[2]}",
            f"-I{Path(grpc_tools.__file__).parent / '_proto'}",
            f"--plugin=protoc-gen-ts_proto={PLUGIN}",
            f"--ts_proto_out={out}",
            f"--ts_proto_opt={','.join(options)}",
            *protos,
        ]
    )
    if status != 0:
        sys.exit(status)


def contents(root: Path) -> dict[str, str]:
    return {str(path.relative_to(root)): path.read_text() for path in root.rglob("*.ts")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    with tempfile.TemporaryDirectory() as directory:
        generate(Path(directory))
        fresh, committed = contents(Path(directory)), contents(GENERATED)
    differing = sorted(
        name for name in fresh.keys() | committed.keys() if fresh.get(name) != committed.get(name)
    )
    if check:
        if differing:
            sys.exit(f"not what the protos generate (npm run generate): {', '.join(differing)}")
        return
    for name in differing:
        path = GENERATED / name
        if name in fresh:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(fresh[name])
        else:
            path.unlink()


if __name__ == "__main__":
    main()
