"""The messages of google.rpc that a failed call carries, without a package that has them.

googleapis-common-protos has these messages too. Two packages cannot register the same message in
protobuf's default pool, so this module uses a pool of its own.
"""

from importlib import resources
from typing import Any

from google.protobuf import any_pb2, message_factory
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import DecodeError, Message

DESCRIPTORS = "google_rpc.binpb"  # generated (make proto)


def _load() -> DescriptorPool:
    pool = DescriptorPool()
    data = resources.files("chat_ticket").joinpath(DESCRIPTORS).read_bytes()
    for file in FileDescriptorSet.FromString(data).file:
        pool.AddSerializedFile(file.SerializeToString())
    return pool


_pool = _load()
_Status: Any = message_factory.GetMessageClass(_pool.FindMessageTypeByName("google.rpc.Status"))
_details = {
    descriptor.full_name: message_factory.GetMessageClass(descriptor)
    for descriptor in _pool.FindFileByName(
        "google/rpc/error_details.proto"
    ).message_types_by_name.values()
}


def parse_status(data: bytes) -> tuple[int, str, tuple[Message, ...]]:
    """The code, the message and the details of a serialized google.rpc.Status, or DecodeError."""
    status = _Status.FromString(data)
    return status.code, status.message, tuple(_unpacked(packed) for packed in status.details)


def serialize_details(details: tuple[Message, ...]) -> bytes:
    """A google.rpc.Status with these details, for parse_status."""
    status = _Status()
    for detail in details:
        if isinstance(detail, any_pb2.Any):
            status.details.add(type_url=detail.type_url, value=detail.value)
        else:
            status.details.add().Pack(detail)
    data: bytes = status.SerializeToString()
    return data


def _unpacked(packed: any_pb2.Any) -> Message:
    """The message in an Any, or the Any itself when it holds none of google.rpc's details."""
    message_class = _details.get(packed.TypeName())
    if message_class is not None:
        try:
            return message_class.FromString(packed.value)
        except DecodeError:
            pass
    return any_pb2.Any(type_url=packed.type_url, value=packed.value)
