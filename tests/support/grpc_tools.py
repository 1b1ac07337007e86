"""grpcurl and buf curl as clients of a server, and what they print of an error."""

import abc
import base64
import contextlib
import json
import subprocess
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from google.protobuf.json_format import MessageToDict, ParseDict
from google.protobuf.message_factory import GetMessageClass
from google.rpc import error_details_pb2
from grpc import StatusCode

from chat_ticket.v1 import (
    chat_attachment_pb2,
    chat_draft_pb2,
    chat_message_pb2,
    chat_session_pb2,
    chat_ticket_pb2,
)

ROOT = Path(__file__).parents[2]
PROTOS = ROOT / "protos"
SECONDS = 60  # more than any of these programs takes


class ToolError(NamedTuple):
    """The error of a call as a tool printed it; `details` by type name."""

    code: StatusCode
    message: str
    details: dict[str, dict[str, Any]]


def code_of(number: int) -> StatusCode:
    return next(code for code in StatusCode if code.value[0] == number)


def unpacked(kind: str, value: bytes) -> dict[str, Any]:
    """An error detail as a dictionary."""
    message = getattr(error_details_pb2, kind).FromString(value)
    return MessageToDict(message, preserving_proto_field_name=True)


class Tool(abc.ABC):
    """A command-line client. `method` is short: `ChatSessionService/GetChatSession`."""

    program: Path
    schema: tuple[str, ...] = ()

    def __init__(self, address: str, tenant: str, environment: dict[str, str]):
        self.address = address
        self.tenant = tenant
        self._environment = environment

    @abc.abstractmethod
    def command(self, method: str, request: object, seconds: float) -> list[str]:
        """The arguments of a call that takes `seconds` at the most."""

    @abc.abstractmethod
    def refusal(self, status: int, errors: str) -> ToolError:
        """What an exit status and the text beside it mean."""

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self.program, *arguments],
            env=self._environment,
            capture_output=True,
            check=False,
            encoding="utf-8",
            timeout=SECONDS,
        )

    def call(self, method: str, request: object) -> list[Any]:
        """The responses of a call that succeeds."""
        done = self.run(*self.command(method, request, SECONDS))
        assert done.returncode == 0, done.stderr
        return list(responses(method, done.stdout.splitlines(keepends=True)))

    def refused(self, method: str, request: object) -> ToolError:
        """What a call that does not succeed is rejected with."""
        done = self.run(*self.command(method, request, SECONDS))
        assert done.stdout == ""
        return self.refusal(done.returncode, done.stderr)

    @contextlib.contextmanager
    def following(self, method: str, request: object) -> Iterator[tuple[Any, Iterator[Any]]]:
        """A running call: its process, and its responses as they come."""
        with subprocess.Popen(
            [self.program, *self.command(method, request, SECONDS)],
            env=self._environment,
            stdout=subprocess.PIPE,
            encoding="utf-8",
        ) as process:
            try:
                assert process.stdout is not None
                yield process, responses(method, process.stdout)
            finally:
                process.kill()


def responses(method: str, lines: Iterable[str]) -> Iterator[Any]:
    """JSON documents, one after the other, as the messages they stand for.

    A field that the real message does not have, or of another type, is an error.
    """
    service, name = method.split("/")
    descriptor = SERVICES[f"chat_ticket.v1.{service}"].methods_by_name[name].output_type
    kind = GetMessageClass(descriptor)
    text = ""
    for line in lines:
        text += line
        if line.startswith(("}", "{}")):  # the rest is indented
            yield ParseDict(json.loads(text), kind())
            text = ""
    assert text.strip() == ""


class Grpcurl(Tool):
    program = Path(sysconfig.get_path("scripts"), "grpcurl")

    def command(self, method: str, request: object, seconds: float) -> list[str]:
        tenant = ("-H", f"x-tenant-id: {self.tenant}") if self.tenant else ()
        flags = ["-plaintext", "-max-time", str(seconds), *self.schema, *tenant]
        return [*flags, "-d", json.dumps(request), self.address, f"chat_ticket.v1.{method}"]

    def refusal(self, status: int, errors: str) -> ToolError:
        lines = [line.strip() for line in errors.splitlines()]
        assert lines[0] == "ERROR:", errors
        details = {}
        if "Details:" in lines:
            for line in lines[lines.index("Details:") + 1 :]:
                detail = json.loads(line.partition("\t")[2])
                details[detail.pop("@type").rpartition(".")[2]] = detail
        code = code_of(status - 64)
        name = lines[1].removeprefix("Code: ").upper()
        assert name == code.name.replace("_", "")
        return ToolError(code, lines[2].removeprefix("Message:").strip(), details)


class BufCurl(Tool):
    program = Path(sysconfig.get_path("scripts"), "buf")

    def command(self, method: str, request: object, seconds: float) -> list[str]:
        tenant = ("-H", f"x-tenant-id: {self.tenant}") if self.tenant else ()
        flags = ["curl", "--protocol", "grpc", "--http2-prior-knowledge", *self.schema, *tenant]
        url = f"http://{self.address}/chat_ticket.v1.{method}"
        return [*flags, "--timeout", f"{seconds}s", "-d", json.dumps(request), url]

    def refusal(self, status: int, errors: str) -> ToolError:
        error = json.loads(errors)
        details = {}
        for detail in error.get("details", ()):
            kind = detail["type"].rpartition(".")[2]
            value = detail["value"]
            details[kind] = unpacked(kind, base64.b64decode(value + "=" * (-len(value) % 4)))
        code = code_of(status >> 3)
        assert error["code"] == code.name.lower()
        return ToolError(code, error["message"], details)


FILES = (
    chat_session_pb2,
    chat_message_pb2,
    chat_attachment_pb2,
    chat_ticket_pb2,
    chat_draft_pb2,
)
SERVICES = {
    service.full_name: service
    for file in FILES
    for service in file.DESCRIPTOR.services_by_name.values()
}
