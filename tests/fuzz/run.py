"""Batches of hostile requests, and the rules that every answer must follow.

An answer has a status that a request may provoke, with its details, and no byte of another
tenant's data. Afterwards the server answers the next caller.
"""

import asyncio
import base64
import collections
import contextlib
import itertools
import zlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio
from google.protobuf import descriptor_pool, text_format
from google.protobuf.descriptor import Descriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass
from grpc import StatusCode
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from hypothesis import strategies as st
from support.client import Api, Refusal, a_file
from support.drafts import leave_draft

from chat_ticket.v1 import resources_pb2 as r
from chat_ticket.v1.chat_attachment_pb2 import ListChatAttachmentsRequest
from chat_ticket.v1.chat_draft_pb2 import ListChatDraftsRequest
from chat_ticket.v1.chat_message_pb2 import ListChatMessagesRequest
from chat_ticket.v1.chat_session_pb2 import (
    ListChatSessionsRequest,
    UpdateChatSessionRequest,
    WatchChatSessionsResponse,
)
from chat_ticket.v1.chat_ticket_pb2 import (
    DeleteChatTicketRequest,
    ListChatTicketsRequest,
    ListTicketsRequest,
)
from chat_ticket_svc.limits import MIB
from chat_ticket_svc.server import SERVICES
from fuzz.requests import (
    corner_cases,
    decode_token,
    hostile_message,
    hostile_stream,
    stream_corner_cases,
)
from fuzz.values import FOREIGN, OWN, SECRET, draw_examples
from fuzz.wire import hostile_bytes

# In every text that the other tenant has stored, its id included. No request contains it.
CANARY = "zqxcanaryxqz"
OTHER_TENANT = f"{CANARY} tenant"

# The statuses that a request may provoke. The others of docs/reference/errors.md are about the
# service's own state: a request that makes a healthy service slow or unavailable is a finding.
EXPECTED_CODES = {
    StatusCode.OK,
    StatusCode.INVALID_ARGUMENT,
    StatusCode.NOT_FOUND,
    StatusCode.ALREADY_EXISTS,
    StatusCode.FAILED_PRECONDITION,
    StatusCode.ABORTED,
    StatusCode.OUT_OF_RANGE,
}
# Errors that the service does not raise itself carry no details.
WITHOUT_DETAILS = {("/grpc.health.v1.Health/Check", StatusCode.NOT_FOUND)}

# What a client says that has written to a stream before it read how that ended.
MADE_UP = "Internal error from Core"

IN_FLIGHT = 8
MAX_SHOWN = 3
MAX_RESPONSES = 20
ANSWER_SECONDS = 20


@dataclass(frozen=True)
class Method:
    """An RPC of the server."""

    path: str
    request: type[Message]
    response: type[Message]
    client_streaming: bool
    server_streaming: bool

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    @property
    def is_ours(self) -> bool:
        return self.path.startswith("/chat_ticket.")


def methods(*services: str) -> list[Method]:
    """Every RPC of these services, by their descriptors."""
    return [
        Method(
            f"/{service}/{method.name}",
            GetMessageClass(method.input_type),
            GetMessageClass(method.output_type),
            method.client_streaming,
            method.server_streaming,
        )
        for service in services
        for method in descriptor_pool.Default().FindServiceByName(service).methods
    ]


OURS = methods(*SERVICES)
STANDARD = methods(
    *(
        next(iter(file.DESCRIPTOR.services_by_name.values())).full_name
        for file in (health_pb2, reflection_pb2)
    )
)


async def populate(api: Api, ids: dict[str, list[str]], text: str) -> None:
    """Create sessions in every status, with messages, files, links, tickets, drafts of these ids.

    The last session has no ticket, and the last ticket has no link.
    """
    for index, session_id in enumerate(ids["session"]):
        await api.session(id=session_id)
        file = a_file(
            id=ids["attachment"][index],
            file_url=f"https://files.example/{text}",
            file_name=f"{text}.png",
            file_type=f"image/{text}",
        )
        await api.message(
            session_id,
            f"where is my order, {text}?",
            id=ids["message"][index],
            metadata_json=f'{{"{text}": "{text}"}}',
            attachments=[file],
        )
        await api.escalate(
            session_id,
            chat_ticket_id=ids["chat_ticket"][index],
            ticket=r.Ticket(id=ids["ticket"][index], title=f"help, {text}", status=index + 1),
        )
        await leave_draft(api, session_id, f"your order, {text}", ids["draft"][index])
        request = UpdateChatSessionRequest(session=r.ChatSession(id=session_id, status=index + 1))
        request.update_mask.paths.append("status")
        await api.sessions.UpdateChatSession(request)
    last = DeleteChatTicketRequest(chat_ticket_id=ids["chat_ticket"][-1])
    await api.tickets.DeleteChatTicket(last)


async def list_everything(api: Api) -> list[bytes]:
    """Everything that a tenant has, as its lists return it."""
    sessions = await api.sessions.ListChatSessions(ListChatSessionsRequest())
    findings = [sessions, await api.tickets.ListTickets(ListTicketsRequest())]
    for session in sessions.sessions:
        request = ListChatMessagesRequest(session_id=session.id)
        findings += [
            *[batch async for batch in api.messages.ListChatMessages(request)],
            await api.attachments.ListChatAttachments(
                ListChatAttachmentsRequest(session_id=session.id)
            ),
            await api.tickets.ListChatTickets(ListChatTicketsRequest(session_id=session.id)),
            await api.drafts.ListChatDrafts(ListChatDraftsRequest(session_id=session.id)),
        ]
    return [finding.SerializeToString(deterministic=True) for finding in findings]


@contextlib.asynccontextmanager
async def bystander(address: str) -> AsyncIterator[None]:
    """Another tenant, whose ids the requests contain. None of its data may change."""
    async with Api(address, OTHER_TENANT) as other:
        for ids in (FOREIGN, SECRET):
            await populate(other, ids, CANARY)
        before = await list_everything(other)
        yield
        assert await list_everything(other) == before, "another tenant's data has changed"


@dataclass
class Answer:
    """The response to a call, as bytes. `code` is None if we cancelled an open stream."""

    code: StatusCode | None
    responses: list[bytes]
    metadata: list[tuple[str, Any]] = field(default_factory=list)
    text: str = ""
    error: grpc.aio.AioRpcError | None = None


def metadata_of(api: Api) -> list[tuple[str, str]]:
    """The metadata of this client's calls: its tenant and its credential."""
    return list(api.sessions._metadata)


async def call(
    api: Api, method: Method, *requests: bytes, metadata: Sequence[tuple[str, Any]] | None = None
) -> Answer:
    """Send bytes as they are. Read a stream until it waits for changes, then cancel it."""
    options = {
        "metadata": metadata_of(api) if metadata is None else metadata,
        "timeout": ANSWER_SECONDS,
    }
    channel, responses = api.channel, []
    try:
        if not method.server_streaming:
            one: Any = channel.unary_unary(method.path)(requests[0], **options)
            responses.append(await one)
        elif method.client_streaming:
            one = channel.stream_stream(method.path)(**options)
            await one.write(requests[0])
            response = await one.read()
            for request in requests[1:]:
                if response is not grpc.aio.EOF:
                    with contextlib.suppress(asyncio.InvalidStateError, grpc.aio.AioRpcError):
                        await one.write(request)
            await one.done_writing()
            while response is not grpc.aio.EOF:
                responses.append(response)
                response = await one.read()
        else:
            one = channel.unary_stream(method.path)(requests[0], **options)
            async for response in one:
                responses.append(response)
                if _is_last(method, response) or len(responses) >= MAX_RESPONSES:
                    one.cancel()
                    return Answer(None, responses, [*await one.initial_metadata()])
    except grpc.aio.AioRpcError as error:
        if method.client_streaming and error.details() == MADE_UP:
            return Answer(None, responses)
        metadata = [*(error.initial_metadata() or ()), *(error.trailing_metadata() or ())]
        return Answer(error.code(), responses, metadata, error.details() or "", error)
    metadata = [*await one.initial_metadata(), *await one.trailing_metadata()]
    return Answer(await one.code(), responses, metadata, await one.details() or "")


def _is_last(method: Method, response: bytes) -> bool:
    """Whether a stream sends nothing more until something changes."""
    message: Any = method.response.FromString(response)
    if isinstance(message, WatchChatSessionsResponse):
        return any(event.HasField("caught_up") for event in message.events)
    if "event" in method.response.DESCRIPTOR.oneofs_by_name:
        return message.WhichOneof("event") == "caught_up"
    return method.name == "Watch"


def violations(method: Method, requests: Sequence[bytes], answer: Answer) -> list[str]:
    """The rules that an answer breaks."""
    findings = []
    if answer.error is not None and not _is_rejected_by_grpc(requests, answer):
        if answer.code not in EXPECTED_CODES:
            findings.append(f"{answer.code}: {answer.text}")
        elif (method.path, answer.code) not in WITHOUT_DETAILS:
            refusal = Refusal()
            try:
                refusal.read(answer.error)
            except (AssertionError, DecodeError, AttributeError, KeyError) as error:
                findings.append(f"{answer.code} without proper details: {error!r}")
            findings += [
                f"a violation of {field}, which is no field"
                for field in refusal.fields
                if not _is_field(method.request.DESCRIPTOR, field)
            ]
    parts = [answer.text.encode(), *answer.responses]
    for key, value in answer.metadata:
        parts += [key.encode(), value if isinstance(value, bytes) else str(value).encode()]
    for response in answer.responses:
        try:
            message = method.response.FromString(response)
        except DecodeError:
            findings.append("the response is not one of this method")
            continue
        for place in ("next_page_token", "cursor"):
            with contextlib.suppress(AttributeError, ValueError):
                parts.append(decode_token(getattr(message, place)))
    received = b"\n".join(parts).lower()
    secrets = itertools.chain([CANARY], *SECRET.values())
    findings += [f"tells {secret}" for secret in secrets if secret.encode() in received]
    return findings


def _is_field(descriptor: Descriptor | None, path: str) -> bool:
    """Whether `path` leads to a field of the message. Empty, it stands for the message."""
    for part in path.split(".") if path else ():
        name, bracket, _ = part.partition("[")
        field = descriptor.fields_by_name.get(name) if descriptor is not None else None
        if field is None or (bracket and not field.is_repeated):
            return False
        descriptor = field.message_type
    return True


def _is_rejected_by_grpc(requests: Sequence[bytes], answer: Answer) -> bool:
    """gRPC itself rejects a message over 4 MiB before the service sees it."""
    too_large = any(len(request) > 4 * MIB for request in requests)
    return too_large and answer.code is StatusCode.RESOURCE_EXHAUSTED and "larger" in answer.text


def reproduction(method: Method, requests: Sequence[bytes], tenant: str) -> str:
    """Python that sends the same requests again."""
    lines = [f"{method.path} as the tenant {tenant!r}"]
    for request in requests:
        packed = base64.b64encode(zlib.compress(request)).decode()
        lines.append(f'  zlib.decompress(base64.b64decode("{packed}"))  # {len(request)} bytes')
        try:
            message = method.request.FromString(request)
        except (DecodeError, ValueError):
            continue
        text = text_format.MessageToString(message, as_one_line=True)
        lines.append(f"  # {text[:1000]}")
    return "\n".join(lines)


@dataclass
class Report:
    """The requests that were sent, counted, and the findings."""

    counts: collections.Counter[tuple[str, str]] = field(default_factory=collections.Counter)
    # By method and status: one bug causes thousands of findings.
    findings: dict[tuple[str, str], list[str]] = field(
        default_factory=lambda: collections.defaultdict(list)
    )

    # Prints a finding at once.
    write: Callable[[str], object] = str

    @property
    def summary(self) -> str:
        return "\n\n".join(
            f"{method} {code}, {len(texts)} times:\n" + "\n".join(texts[:MAX_SHOWN])
            for (method, code), texts in self.findings.items()
        )


def requests_of(
    method: Method, *, as_bytes: bool, count: int, seed: int, tenant: str
) -> list[list[bytes]]:
    """Hostile requests, a list for each call: reflection and drafts take more than one request."""
    kind = hostile_bytes if as_bytes else hostile_message
    strategy = kind(method.request, tenant, OTHER_TENANT)
    if method.client_streaming:
        strategy = st.lists(strategy, min_size=1, max_size=4)
        if method.is_ours and not as_bytes:
            strategy = hostile_stream(method.request)
    drawn = draw_examples(strategy, count, seed)
    lists = drawn if method.client_streaming else [[each] for each in drawn]
    return [
        [
            request if isinstance(request, bytes) else request.SerializeToString()
            for request in requests
        ]
        for requests in lists
    ]


async def run_batch(
    address: str, method: Method, *, as_bytes: bool, count: int, seed: int, report: Report
) -> int:
    """Send up to `count` different hostile requests of a method, and return their number."""
    tenant = f"hostile {method.name} {'bytes' if as_bytes else 'values'} {seed}"
    drawn = requests_of(method, as_bytes=as_bytes, count=count, seed=seed, tenant=tenant)
    await send_all(address, method, drawn, tenant, f"seed {seed}", report)
    return len(drawn)


async def run_corners(address: str, method: Method, report: Report) -> None:
    """Send the values that have broken something before."""
    tenant = f"hostile {method.name} corners"
    if method.client_streaming:
        streams = stream_corner_cases(method.request, tenant)
        drawn = [[each.SerializeToString() for each in stream] for stream in streams]
    else:
        drawn = [[each.SerializeToString()] for each in corner_cases(method.request, tenant)]
    await send_all(address, method, drawn, tenant, "corners", report)


async def send_all(
    address: str,
    method: Method,
    requests: Sequence[list[bytes]],
    tenant: str,
    origin: str,
    report: Report,
) -> None:
    """Send requests for a tenant that has data of these ids; then check that it is still served."""
    turn = asyncio.Semaphore(IN_FLIGHT)
    async with Api(address, tenant) as api:
        await populate(api, OWN, "order")

        async def one(each: list[bytes]) -> None:
            async with turn:
                answer = await call(api, method, *each)
            code = "left" if answer.code is None else answer.code.name
            report.counts[method.name, code] += 1
            findings = violations(method, each, answer)
            if findings:
                how = reproduction(method, each, tenant)
                texts = report.findings[method.path, code]
                texts.append("\n".join([*findings, f"{origin}: {how}"]))
                if len(texts) <= MAX_SHOWN:
                    report.write(texts[-1])

        await asyncio.gather(*(one(request) for request in requests))
        await api.session()
