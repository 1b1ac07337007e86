"""Sends hostile requests, and judges the answers; as a program, as many as it is told to.

What every answer is held to: a status that a request may have, with its details; no byte that is
another tenant's; and the server answers the next caller. `make fuzz` runs this file.
"""

import argparse
import asyncio
import base64
import collections
import contextlib
import itertools
import random
import sys
import time
import zlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio
import tqdm
from google.protobuf import descriptor_pool, text_format
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass
from grpc import StatusCode
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from hypothesis import strategies as st

from chat_ticket.v1 import resources_pb2 as r
from chat_ticket.v1.chat_attachment_pb2 import ListChatAttachmentsRequest
from chat_ticket.v1.chat_message_pb2 import ListChatMessagesRequest
from chat_ticket.v1.chat_session_pb2 import ListChatSessionsRequest, UpdateChatSessionRequest
from chat_ticket.v1.chat_ticket_pb2 import (
    DeleteChatTicketRequest,
    ListChatTicketsRequest,
    ListTicketsRequest,
)
from chat_ticket_svc.config import MIB
from chat_ticket_svc.server import SERVICES
from support import hostile
from support.client import Api, Refusal, a_file

# In every text that the other tenant has stored, its id included. No request contains it.
CANARY = "zqxcanaryxqz"
OTHER = f"{CANARY} tenant"

# What a request can be told. The other statuses of docs/reference/errors.md are about the state of
# the service: a request that makes a healthy service slow, full or unavailable is a finding.
EXPECTED = {
    StatusCode.OK,
    StatusCode.INVALID_ARGUMENT,
    StatusCode.NOT_FOUND,
    StatusCode.ALREADY_EXISTS,
    StatusCode.FAILED_PRECONDITION,
    StatusCode.ABORTED,
    StatusCode.OUT_OF_RANGE,
}
# Refusals that are not the service's own: they carry no details.
WITHOUT_DETAILS = {("/grpc.health.v1.Health/Check", StatusCode.NOT_FOUND)}

IN_FLIGHT = 8
MOST_SHOWN = 3
MOST_RESPONSES = 20
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


# --- The two tenants -------------------------------------------------------------------------


async def populate(api: Api, ids: dict[str, list[str]], text: str) -> None:
    """Sessions in every status, messages, files, links and tickets, all by these ids.

    Of the tickets the last has no link, of the sessions the last no ticket.
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
        request = UpdateChatSessionRequest(session=r.ChatSession(id=session_id, status=index + 1))
        request.update_mask.paths.append("status")
        await api.sessions.UpdateChatSession(request)
    last = DeleteChatTicketRequest(chat_ticket_id=ids["chat_ticket"][-1])
    await api.tickets.DeleteChatTicket(last)


async def everything(api: Api) -> list[bytes]:
    """What a tenant has, as its lists say."""
    sessions = await api.sessions.ListChatSessions(ListChatSessionsRequest())
    found = [sessions, await api.tickets.ListTickets(ListTicketsRequest())]
    for session in sessions.sessions:
        request = ListChatMessagesRequest(session_id=session.id)
        found += [
            *[batch async for batch in api.messages.ListChatMessages(request)],
            await api.attachments.ListChatAttachments(
                ListChatAttachmentsRequest(session_id=session.id)
            ),
            await api.tickets.ListChatTickets(ListChatTicketsRequest(session_id=session.id)),
        ]
    return [each.SerializeToString(deterministic=True) for each in found]


@contextlib.asynccontextmanager
async def bystander(address: str) -> AsyncIterator[None]:
    """The other tenant, whose ids the requests name: nothing of what it has changes."""
    async with Api(address, OTHER) as other:
        for ids in (hostile.FOREIGN, hostile.SECRET):
            await populate(other, ids, CANARY)
        before = await everything(other)
        yield
        assert await everything(other) == before, "another tenant's data has changed"


# --- A call and its answer -------------------------------------------------------------------


@dataclass
class Answer:
    """What came back, as bytes. `code` is None when we left a stream that went on."""

    code: StatusCode | None
    responses: list[bytes]
    metadata: list[tuple[str, Any]] = field(default_factory=list)
    text: str = ""
    error: grpc.aio.AioRpcError | None = None


def metadata_of(api: Api) -> list[tuple[str, str]]:
    """What the calls of this client carry: its tenant, and whatever else lets it in."""
    return list(api.sessions._metadata)


async def call(
    api: Api, method: Method, *requests: bytes, metadata: Sequence[tuple[str, Any]] | None = None
) -> Answer:
    """Send bytes as they are; of a stream take what comes, and leave when it only waits."""
    given = {
        "metadata": metadata_of(api) if metadata is None else metadata,
        "timeout": ANSWER_SECONDS,
    }
    channel, responses = api.channel, []
    try:
        if not method.server_streaming:
            one: Any = channel.unary_unary(method.path)(requests[0], **given)
            responses.append(await one)
        elif method.client_streaming:
            one = channel.stream_stream(method.path)(**given)
            # In turns: a client that writes to a stream that has ended invents a status.
            for request in requests:
                await one.write(request)
                response = await one.read()
                if response is grpc.aio.EOF:
                    break
                responses.append(response)
            await one.done_writing()
            while response is not grpc.aio.EOF:
                response = await one.read()
        else:
            one = channel.unary_stream(method.path)(requests[0], **given)
            async for response in one:
                responses.append(response)
                if _is_last(method, response) or len(responses) >= MOST_RESPONSES:
                    one.cancel()
                    return Answer(None, responses, [*await one.initial_metadata()])
    except grpc.aio.AioRpcError as error:
        metadata = [*(error.initial_metadata() or ()), *(error.trailing_metadata() or ())]
        return Answer(error.code(), responses, metadata, error.details() or "", error)
    metadata = [*await one.initial_metadata(), *await one.trailing_metadata()]
    return Answer(await one.code(), responses, metadata, await one.details() or "")


def _is_last(method: Method, response: bytes) -> bool:
    """Whether a stream has nothing more to say until something happens."""
    message = method.response.FromString(response)
    if "event" in method.response.DESCRIPTOR.oneofs_by_name:
        return message.WhichOneof("event") == "caught_up"
    return method.name == "Watch"


def complaints(method: Method, requests: Sequence[bytes], answer: Answer) -> list[str]:
    """What is wrong with an answer."""
    found = []
    if answer.error is not None and not _is_of_the_core(requests, answer):
        if answer.code not in EXPECTED:
            found.append(f"{answer.code}: {answer.text}")
        elif (method.path, answer.code) not in WITHOUT_DETAILS:
            try:
                Refusal().read(answer.error)
            except (AssertionError, DecodeError, AttributeError, KeyError) as error:
                found.append(f"{answer.code} without proper details: {error!r}")
    parts = [answer.text.encode(), *answer.responses]
    for key, value in answer.metadata:
        parts += [key.encode(), value if isinstance(value, bytes) else str(value).encode()]
    for response in answer.responses:
        try:
            message = method.response.FromString(response)
        except DecodeError:
            found.append("the response is not one of this method")
            continue
        with contextlib.suppress(AttributeError, ValueError):
            parts.append(hostile.decoded(message.next_page_token))
    told = b"\n".join(parts).lower()
    secrets = itertools.chain([CANARY], *hostile.SECRET.values())
    found += [f"tells {secret}" for secret in secrets if secret.encode() in told]
    return found


def _is_of_the_core(requests: Sequence[bytes], answer: Answer) -> bool:
    """A message over 4 MiB is refused by gRPC itself, before any code of ours runs."""
    too_large = any(len(request) > 4 * MIB for request in requests)
    return too_large and answer.code is StatusCode.RESOURCE_EXHAUSTED and "larger" in answer.text


def reproduction(method: Method, requests: Sequence[bytes], tenant: str) -> str:
    """How to send the same again."""
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


# --- Batches ---------------------------------------------------------------------------------


@dataclass
class Report:
    """What has been sent and what came back."""

    counts: collections.Counter[tuple[str, str]] = field(default_factory=collections.Counter)
    # By method and status, the first few of each: one bug makes thousands.
    findings: dict[tuple[str, str], list[str]] = field(
        default_factory=lambda: collections.defaultdict(list)
    )

    # Where what is found is told at once.
    write: Callable[[str], object] = str

    @property
    def found(self) -> str:
        return "\n\n".join(
            f"{method} {code}, {len(texts)} times:\n" + "\n".join(texts[:MOST_SHOWN])
            for (method, code), texts in self.findings.items()
        )


def requests_of(
    method: Method, *, as_bytes: bool, count: int, seed: int, tenant: str
) -> list[list[bytes]]:
    """Hostile requests of a method: of each a list, which but for reflection holds one."""
    kind = hostile.raw if as_bytes else hostile.message
    strategy = kind(method.request, tenant, OTHER)
    if method.client_streaming:
        strategy = st.lists(strategy, min_size=1, max_size=4)
    drawn = hostile.draw(strategy, count, seed)
    lists = drawn if method.client_streaming else [[each] for each in drawn]
    return [
        [each if isinstance(each, bytes) else each.SerializeToString() for each in requests]
        for requests in lists
    ]


async def run_batch(
    address: str, method: Method, *, as_bytes: bool, count: int, seed: int, report: Report
) -> int:
    """Send up to `count` different hostile requests of a method; returns how many there were."""
    tenant = f"hostile {method.name} {'bytes' if as_bytes else 'values'} {seed}"
    drawn = requests_of(method, as_bytes=as_bytes, count=count, seed=seed, tenant=tenant)
    await send_all(address, method, drawn, tenant, f"seed {seed}", report)
    return len(drawn)


async def run_corners(address: str, method: Method, report: Report) -> None:
    """Send the values that once broke something."""
    tenant = f"hostile {method.name} corners"
    drawn = [[each.SerializeToString()] for each in hostile.corners(method.request, tenant)]
    await send_all(address, method, drawn, tenant, "corners", report)


async def send_all(
    address: str,
    method: Method,
    requests: Sequence[list[bytes]],
    tenant: str,
    origin: str,
    report: Report,
) -> None:
    """Send them for a tenant that has what their ids name; then it is still served."""
    turn = asyncio.Semaphore(IN_FLIGHT)
    async with Api(address, tenant) as api:
        await populate(api, hostile.OWN, "order")

        async def one(each: list[bytes]) -> None:
            async with turn:
                answer = await call(api, method, *each)
            code = "left" if answer.code is None else answer.code.name
            report.counts[method.name, code] += 1
            found = complaints(method, each, answer)
            if found:
                how = reproduction(method, each, tenant)
                texts = report.findings[method.path, code]
                texts.append("\n".join([*found, f"{origin}: {how}"]))
                if len(texts) <= MOST_SHOWN:
                    report.write(texts[-1])

        await asyncio.gather(*(one(each) for each in requests))
        await api.session()


# --- The full run ----------------------------------------------------------------------------

BATCH = 200
# What a server says when all is well.
QUIET = {"listening", "serving", "not serving", "draining"}


async def run(address: str, count: int, seed: int, report: Report) -> None:
    """Send `count` values and as many bytes, in batches of all methods in turn."""
    every = [*OURS, *STANDARD]
    most = min(BATCH, -(-count // len(every)))
    async with bystander(address):
        with tqdm.tqdm(total=2 * count, unit="call", smoothing=0.05) as progress:
            report.write = progress.write
            for as_bytes in (False, True):
                left = count
                for number, method in enumerate(itertools.cycle(every)):
                    if not left:
                        break
                    left -= (
                        sent := await run_batch(
                            address,
                            method,
                            as_bytes=as_bytes,
                            count=min(most, left),
                            seed=seed + number,
                            report=report,
                        )
                    )
                    progress.update(sent)
                    progress.set_postfix(findings=sum(map(len, report.findings.values())))


def table(report: Report) -> str:
    """The answers, RPC by status."""
    codes = sorted({code for _, code in report.counts})
    names = sorted({name for name, _ in report.counts})
    rows = [["", *codes, "all"]]
    for name in names:
        counts = [report.counts[name, code] for code in codes]
        rows.append([name, *(str(count or "") for count in counts), str(sum(counts))])
    totals = [sum(report.counts[name, code] for name in names) for code in codes]
    rows.append(["all", *map(str, totals), str(sum(totals))])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def main() -> None:
    from support.cluster import Cluster, Run
    from support.process import server_process

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100_000, help="of values, and of bytes")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**9))
    options = parser.parse_args()
    print(f"SEED={options.seed}", flush=True)
    began = time.monotonic()
    report = Report()
    postgres = Run()
    try:
        database = Cluster(postgres.url).create()
        settings = {
            "CHAT_TICKET_ATTACHMENT_URL_CHECK": "false",
            "CHAT_TICKET_ACCESS_LOG": "false",
            "CHAT_TICKET_QUOTAS__TENANT_CALLS_PER_SECOND": "100000",
        }
        with server_process(database, **settings) as server:
            with contextlib.suppress(KeyboardInterrupt):  # what it has found so far
                asyncio.run(run(server.address, options.count, options.seed, report))
            for line in server.log:
                if line["event"] not in QUIET:
                    report.findings["the log", line["event"]].append(str(line))
            if server.popen.poll() is not None:
                report.findings["the process", str(server.popen.returncode)].append("has died")
    finally:
        postgres.close()
    print(table(report), report.found, sep="\n\n")
    print(
        f"\nSEED={options.seed}: {sum(report.counts.values())} calls in "
        f"{time.monotonic() - began:.0f} s, {len(report.findings)} kinds of findings"
    )
    sys.exit(bool(report.findings))


if __name__ == "__main__":
    main()
