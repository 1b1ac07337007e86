"""The descriptors of the protos, with their comments."""

from collections.abc import Iterator
from pathlib import Path

import grpc_tools
from google.protobuf.descriptor_pb2 import FieldDescriptorProto, FileDescriptorSet
from grpc_tools import protoc

ROOT = Path(__file__).parents[2]


def descriptors(directory: Path) -> FileDescriptorSet:
    """Those of the protos, with their comments. The directory is for a temporary file."""
    out = directory / "descriptors"
    protos = [str(path) for path in (ROOT / "protos" / "chat_ticket" / "v1").glob("*.proto")]
    includes = [ROOT / "protos", Path(grpc_tools.__file__).parent / "_proto"]
    arguments = [f"-I{include}" for include in includes]
    arguments += ["--include_source_info", f"--descriptor_set_out={out}"]
    assert protoc.main(["protoc", *arguments, *protos]) == 0
    return FileDescriptorSet.FromString(out.read_bytes())


def package_comment(files: FileDescriptorSet) -> str:
    """What holds for all methods."""
    return " ".join(
        " ".join(location.leading_comments.split())
        for file in files.file
        for location in file.source_code_info.location
        if list(location.path) == [2]  # `package` of a file
    )


def field_comments(files: FileDescriptorSet) -> Iterator[tuple[str, FieldDescriptorProto, str]]:
    """`Message.field`, the field and its comment, of all messages and those nested in them."""
    for file in files.file:
        for location in file.source_code_info.location:
            match list(location.path):
                case [4, message, 2, field]:  # `message_type` of a file, `field` of a message
                    kind = file.message_type[message]
                    name = kind.name
                case [4, message, 3, nested, 2, field]:  # `nested_type` of a message
                    kind = file.message_type[message].nested_type[nested]
                    name = f"{file.message_type[message].name}.{kind.name}"
                case _:
                    continue
            comment = " ".join(location.leading_comments.split())
            yield f"{name}.{kind.field[field].name}", kind.field[field], comment


def method_comment(files: FileDescriptorSet, name: str) -> str:
    """The comment of an RPC."""
    [comment] = [
        " ".join(location.leading_comments.split())
        for file in files.file
        for location in file.source_code_info.location
        # `service` of a file, `method` of a service
        if len(location.path) == 4
        and (location.path[0], location.path[2]) == (6, 2)
        and file.service[location.path[1]].method[location.path[3]].name == name
    ]
    return comment
