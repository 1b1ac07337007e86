"""Many tenants, sessions, writers and watches, and a record of all requests and responses.

Writers choose the ids of what they create. A write whose outcome is unknown is called again until
its outcome is known. One that certainly failed is not called again, and must be absent. A watch
resumes at its revision for as long as the run takes.
"""

import asyncio
import contextlib
import gc
import json
import random
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import grpc
import grpc.aio
from grpc import StatusCode
from support.client import Api

from chat_ticket.v1 import resources_pb2 as r
from chat_ticket.v1.chat_attachment_pb2 import (
    CreateChatAttachmentRequest,
    ListChatAttachmentsRequest,
)
from chat_ticket.v1.chat_message_pb2 import (
    BatchCreateChatMessagesRequest,
    CreateChatMessageRequest,
    DeleteChatMessageRequest,
    ListChatMessagesRequest,
    SearchChatMessagesRequest,
    UpdateChatMessageRequest,
)
from chat_ticket.v1.chat_session_pb2 import (
    CreateChatSessionRequest,
    GetChatSessionRequest,
    ListChatSessionsRequest,
    WatchChatSessionRequest,
)
from chat_ticket.v1.chat_ticket_pb2 import ListTicketsRequest
from faults import ticket_callers
from faults.draft_callers import DraftCallers
from faults.draft_record import SeenDrafts
from faults.feed_followers import FeedFollowers
from faults.record import Attempt, Outcome, Record, WatchRecord, Write, clock, reason_of

TENANTS = 3
SESSIONS = 4  # of a tenant, with writers and watches
WRITERS = 4  # of a tenant
WATCHERS = 2  # of a session
CALL_SECONDS = 5.0
THINK_SECONDS = 0.01
BROWSE_SECONDS = 0.2
PAUSE_SECONDS = 0.05  # before a call is made again

NEVER = {StatusCode.INTERNAL, StatusCode.UNKNOWN}

# The client reconnects soon, so that the measured outage is the service's.
CHANNEL = (
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 250),
    ("grpc.use_local_subchannel_pool", 1),
)


class Workload:
    """The callers of a run. `addresses` are servers of one database, used in turn."""

    def __init__(
        self,
        addresses: Callable[[], Sequence[str]],
        seed: int,
        name: str,
        think_seconds: float,
        *,
        drafts: bool = False,
        audited_database: str = "",
    ):
        """With `drafts`, some callers write drafts, and half of the watches show them.

        With the URL of a database that has the audit (see `feed_audit`), some follow the feed.
        """
        self.record = Record()
        self._think_seconds = think_seconds  # of a writer, between two writes
        self._random = random.Random(seed)
        self._addresses = addresses
        self.tenants = [f"{name}-{number}-{uuid.uuid4().hex[:8]}" for number in range(TENANTS)]
        self.sessions: dict[str, list[str]] = {tenant: [] for tenant in self.tenants}
        self._apis: dict[tuple[str, str], Api] = {}
        self._writing = True
        self._is_watching = True
        self._writers: list[asyncio.Task[None]] = []
        self._watch_tasks: list[asyncio.Task[None]] = []
        self._draft_callers: DraftCallers | None = None
        if drafts:
            self._draft_callers = DraftCallers(
                self.record, self.api, self._check_response, random.Random(seed)
            )
        self._feed_followers: FeedFollowers | None = None
        if audited_database:
            self._feed_followers = FeedFollowers(
                self.api,
                audited_database,
                self._check_response,
                random.Random(seed),
                self.record.findings,
            )

    async def start(self) -> None:
        if self._feed_followers is not None:
            for tenant in self.tenants:
                self.record.feeds += self._feed_followers.start_all(tenant)
            await self._feed_followers.wait_until_begun()
        for tenant in self.tenants:
            for _ in range(SESSIONS):
                self.sessions[tenant].append(await self.create_session(tenant))
        for number, tenant in enumerate(self.tenants * WRITERS):
            chance = random.Random(self._random.random())
            self._writers.append(asyncio.create_task(self._write(tenant, chance, number)))
        for tenant in self.tenants:
            for work in (self._use_tickets, self._browse, self._pry):
                chance = random.Random(self._random.random())
                self._writers.append(asyncio.create_task(work(tenant, chance)))
            for number, session_id in enumerate(self.sessions[tenant] * WATCHERS):
                watch = WatchRecord(tenant=tenant, session_id=session_id)
                if self._draft_callers is not None and number >= SESSIONS:
                    watch.drafts = SeenDrafts()
                self.record.watches.append(watch)
                self._watch_tasks.append(asyncio.create_task(self._watch(watch, number)))
        if self._draft_callers is not None:
            self._draft_callers.start(self.sessions)

    async def settle(self, seconds: float) -> None:
        """Stop the writers, find out unknown outcomes, and wait for the watches to catch up."""
        self._writing = False
        async with asyncio.timeout(seconds):
            await asyncio.gather(*self._writers)
            if self._draft_callers is not None:
                await self._draft_callers.settle()
            await asyncio.gather(
                *(self._converge(w) for w in self.record.writes if w.outcome is Outcome.UNKNOWN)
            )
            ends = {
                session_id: await self._revision(tenant, session_id)
                for tenant, sessions in self.sessions.items()
                for session_id in sessions
            }
            while any(
                watch.revision < ends[watch.session_id] or (watch.drafts and watch.drafts.open)
                for watch in self.record.watches
            ):
                if any(task.done() for task in self._watch_tasks):
                    break  # by an error, which `close` raises
                await asyncio.sleep(0.02)
            if self._feed_followers is not None:
                await self._feed_followers.settle(seconds / 2)

    async def stop_watching(self) -> None:
        """End the watches. What they have seen stays in the record."""
        self._is_watching = False
        for task in self._watch_tasks:
            task.cancel()
        await asyncio.gather(*self._watch_tasks, return_exceptions=True)

    async def close(self) -> None:
        self._writing = self._is_watching = False
        tasks = self._writers + self._watch_tasks
        if self._draft_callers is not None:
            tasks += self._draft_callers.tasks
        if self._feed_followers is not None:
            tasks += self._feed_followers.tasks
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        if self._feed_followers is not None:
            await self._feed_followers.close()
        for api in self._apis.values():
            await api.channel.close()
        self._apis.clear()
        gc.collect()  # calls that were cancelled hold their connections, and refer to themselves
        errors = [result for result in results if isinstance(result, Exception)]
        if errors:
            raise errors[0]

    def address(self, number: int) -> str:
        addresses = self._addresses()
        return addresses[number % len(addresses)]

    def api(self, tenant: str, number: int) -> Api:
        address = self.address(number)
        if (tenant, address) not in self._apis:
            self._apis[tenant, address] = Api(address, tenant, options=CHANNEL)
        return self._apis[tenant, address]

    # ---- Writes ----

    async def create_session(self, tenant: str) -> str:
        session_id = str(uuid.uuid4())
        request = CreateChatSessionRequest(session=r.ChatSession(id=session_id))
        await self.done("CreateChatSession", tenant, session_id, request, 0)
        return session_id

    async def _write(self, tenant: str, chance: random.Random, number: int) -> None:
        stored: list[tuple[str, str]] = []  # messages of this writer's own: session and id
        while self._writing:
            session_id = chance.choice(self.sessions[tenant])
            kind = chance.choices(
                ("one", "many", "metadata", "attach", "delete"), (70, 10, 8, 6, 6)
            )[0]
            if not stored and kind not in ("one", "many"):
                continue
            match kind:
                case "one":
                    message = self.message(tenant, chance)
                    method, request = (
                        "CreateChatMessage",
                        CreateChatMessageRequest(session_id=session_id, message=message),
                    )
                    new = [message.id]
                case "many":
                    messages = [self.message(tenant, chance) for _ in range(chance.randint(2, 5))]
                    method, request = (
                        "BatchCreateChatMessages",
                        BatchCreateChatMessagesRequest(session_id=session_id, messages=messages),
                    )
                    new = [message.id for message in messages]
                case "metadata":
                    session_id, message_id = chance.choice(stored)
                    request = UpdateChatMessageRequest(
                        message=r.ChatMessage(
                            id=message_id,
                            metadata_json=json.dumps({"set": chance.randrange(10**9)}),
                        )
                    )
                    request.update_mask.paths.append("metadata_json")
                    method, new = "UpdateChatMessage", []
                case "attach":
                    session_id, message_id = chance.choice(stored)
                    request = CreateChatAttachmentRequest(
                        message_id=message_id,
                        attachment=r.ChatAttachment(
                            id=str(uuid.uuid4()),
                            file_url=f"https://files.example/{tenant}",
                            file_name="a.png",
                            file_type="image/png",
                        ),
                    )
                    method, new = "CreateChatAttachment", []
                case _:
                    session_id, message_id = stored.pop(chance.randrange(len(stored)))
                    request = DeleteChatMessageRequest(message_id=message_id)
                    method, new = "DeleteChatMessage", []
            write = await self.done(method, tenant, session_id, request, number)
            if write.outcome is Outcome.ACKNOWLEDGED:
                stored += [(session_id, message_id) for message_id in new]
            await asyncio.sleep(self._think_seconds)

    async def _use_tickets(self, tenant: str, chance: random.Random) -> None:
        """Of sessions of their own."""
        while self._writing:
            session_id = await self.create_session(tenant)
            use = chance.choice((ticket_callers.race, ticket_callers.change))
            await use(self.done, tenant, session_id, chance)
            await asyncio.sleep(PAUSE_SECONDS)

    async def _browse(self, tenant: str, chance: random.Random) -> None:
        """Call every list, and search."""
        while self._writing:
            session_id = chance.choice(self.sessions[tenant])
            api = self.api(tenant, chance.randrange(2))
            with contextlib.suppress(grpc.aio.AioRpcError):
                last = 0
                async for page in api.messages.ListChatMessages(
                    ListChatMessagesRequest(session_id=session_id)
                ):
                    self._check_response(tenant, "ListChatMessages", page.SerializeToString())
                    for message in page.messages:
                        if message.sequence <= last:
                            self.record.findings.append(f"ListChatMessages: {last} twice or late")
                        last = message.sequence
            for method, request in (
                (api.sessions.ListChatSessions, ListChatSessionsRequest()),
                (api.tickets.ListTickets, ListTicketsRequest()),
                (api.attachments.ListChatAttachments, ListChatAttachmentsRequest(
                    session_id=session_id)),
                (api.messages.SearchChatMessages, SearchChatMessagesRequest(
                    query=str(chance.randrange(100)))),
            ):  # fmt: skip
                with contextlib.suppress(grpc.aio.AioRpcError):
                    found = await method(request)
                    self._check_response(tenant, type(request).__name__, found.SerializeToString())
            await asyncio.sleep(BROWSE_SECONDS)

    async def _pry(self, tenant: str, chance: random.Random) -> None:
        """Read another tenant's session, which must be NOT_FOUND."""
        while self._writing:
            other = chance.choice([each for each in self.tenants if each != tenant])
            request = GetChatSessionRequest(session_id=chance.choice(self.sessions[other]))
            with contextlib.suppress(grpc.aio.AioRpcError):
                await self.api(tenant, chance.randrange(2)).sessions.GetChatSession(request)
                self.record.findings.append(f"GetChatSession tells {tenant} of {other}")
            await asyncio.sleep(PAUSE_SECONDS)

    def message(self, tenant: str, chance: random.Random) -> r.ChatMessage:
        return r.ChatMessage(
            id=str(uuid.uuid4()),
            role=chance.choice((r.CHAT_MESSAGE_ROLE_USER, r.CHAT_MESSAGE_ROLE_ASSISTANT)),
            content=f"of {tenant}: {chance.randrange(10**12)} " + "x" * chance.randrange(200),
        )

    async def done(
        self,
        kind: str,
        tenant: str,
        session_id: str,
        request: Any,
        number: int,
        *,
        leave_after: float | None = None,
    ) -> Write:
        """Call a write, and again while its outcome is unknown and there are writers.

        The caller leaves its first call after so many seconds.
        """
        write = self.begin(kind, tenant, session_id, request)
        while True:
            await self.attempt(write, number, leave_after)
            leave_after = None
            if write.attempts[-1].outcome is Outcome.REFUSED:
                await asyncio.sleep(PAUSE_SECONDS)
            if write.outcome is not Outcome.UNKNOWN or not self._writing:
                return write
            if write.attempts[-1].outcome is Outcome.REFUSED and _is_final(write.attempts[-1]):
                return write
            await asyncio.sleep(PAUSE_SECONDS)

    def begin(self, kind: str, tenant: str, session_id: str, request: Any) -> Write:
        """A write that is recorded, and not yet called."""
        write = Write(kind=kind, tenant=tenant, session_id=session_id, request=request)
        self.record.writes.append(write)
        return write

    async def _converge(self, write: Write) -> None:
        """Call it again until its outcome is known."""
        while not (write.outcome is Outcome.ACKNOWLEDGED or _is_final(write.attempts[-1])):
            await self.attempt(write, 0)
            await asyncio.sleep(PAUSE_SECONDS)

    async def attempt(self, write: Write, number: int, leave_after: float | None = None) -> Any:
        """Call it once, perhaps only for some seconds; returns what was answered, if anything."""
        began = clock()
        api = self.api(write.tenant, number)
        code, reason, text, response = StatusCode.OK, "", "", None
        call = _STUB[write.kind](api)(
            write.request, metadata=[("x-tenant-id", write.tenant)], timeout=CALL_SECONDS
        )
        if leave_after is not None:
            asyncio.get_running_loop().call_later(leave_after, call.cancel)
        try:
            response = await call
        except grpc.aio.AioRpcError as error:
            code, reason, text = error.code(), reason_of(error), error.details() or ""
            self._check_response(write.tenant, write.kind, repr(error).encode())
            if code in NEVER:
                self.record.findings.append(f"{write.kind}: {code.name}: {text}")
        except asyncio.CancelledError:
            if leave_after is None or not call.cancelled():
                raise
            code = StatusCode.CANCELLED
        else:
            write.response = response
            self.record.acknowledged.append(clock())
            self._check_response(write.tenant, write.kind, response.SerializeToString())
        write.attempts.append(
            Attempt(began=began, ended=clock(), code=code, reason=reason, text=text)
        )
        return response

    async def _revision(self, tenant: str, session_id: str) -> int:
        while True:
            with contextlib.suppress(grpc.aio.AioRpcError):
                found = await self.api(tenant, 0).sessions.GetChatSession(
                    GetChatSessionRequest(session_id=session_id)
                )
                return int(found.session.revision)
            await asyncio.sleep(PAUSE_SECONDS)

    # ---- Following ----

    async def _watch(self, watch: WatchRecord, number: int) -> None:
        while self._is_watching and not watch.deleted:
            number += 1  # the next stream may be of another server
            watch.streams += 1
            request = WatchChatSessionRequest(
                session_id=watch.session_id,
                after_revision=watch.revision,
                include_drafts=watch.drafts is not None,
            )
            if watch.drafts is not None:
                watch.drafts.begin_stream()
            try:
                async for event in self.api(watch.tenant, number).sessions.WatchChatSession(
                    request, timeout=3600
                ):
                    self._check_response(
                        watch.tenant, "WatchChatSession", event.SerializeToString()
                    )
                    watch.apply(event)
            except grpc.aio.AioRpcError as error:
                self._check_response(watch.tenant, "WatchChatSession", repr(error).encode())
                if error.code() in NEVER or error.code() is StatusCode.OUT_OF_RANGE:
                    text = f"WatchChatSession: {error.code().name}: {error.details()}"
                    self.record.findings.append(text)
            await asyncio.sleep(PAUSE_SECONDS)

    def _check_response(self, tenant: str, kind: str, data: bytes) -> None:
        """Record a finding if a response contains another tenant's data."""
        for other in self.tenants:
            if other != tenant and other.encode() in data:
                self.record.findings.append(f"{kind} tells {tenant} of {other}")


def _is_final(attempt: Attempt) -> bool:
    """The error is about the write, not about the state of the service."""
    return attempt.code in {
        StatusCode.OK,
        StatusCode.ALREADY_EXISTS,
        StatusCode.FAILED_PRECONDITION,
        StatusCode.INVALID_ARGUMENT,
        StatusCode.NOT_FOUND,
    }


_STUB: dict[str, Callable[[Api], Any]] = {
    "CreateChatSession": lambda api: api.sessions._stub.CreateChatSession,
    "UpdateChatSession": lambda api: api.sessions._stub.UpdateChatSession,
    "DeleteChatSession": lambda api: api.sessions._stub.DeleteChatSession,
    "CreateChatMessage": lambda api: api.messages._stub.CreateChatMessage,
    "BatchCreateChatMessages": lambda api: api.messages._stub.BatchCreateChatMessages,
    "UpdateChatMessage": lambda api: api.messages._stub.UpdateChatMessage,
    "DeleteChatMessage": lambda api: api.messages._stub.DeleteChatMessage,
    "CreateChatAttachment": lambda api: api.attachments._stub.CreateChatAttachment,
    "CreateChatTicket": lambda api: api.tickets._stub.CreateChatTicket,
    "DeleteChatTicket": lambda api: api.tickets._stub.DeleteChatTicket,
    "UpdateTicket": lambda api: api.tickets._stub.UpdateTicket,
    "DeleteTicket": lambda api: api.tickets._stub.DeleteTicket,
}
