"""Writers of drafts: some finish, some give up, leave, fall silent, are stopped or taken over.

A writer resumes after any break, on the next server, at the length that it is told. It keeps all
that it has produced. Its words are numbered and carry its name, so that in the content a word that
is lost, repeated, moved or of another writer shows.
"""

import asyncio
import contextlib
import random
import uuid
from collections.abc import Callable
from typing import Any

import grpc.aio
from grpc import StatusCode
from support.client import Api

from chat_ticket.v1 import resources_pb2 as r
from chat_ticket.v1.chat_draft_pb2 import (
    GetChatDraftRequest,
    StopChatDraftRequest,
    WriteChatDraftRequest,
)
from faults.draft_record import DraftRecord, Stream, Writer, wall_clock
from faults.record import Record, reason_of

WRITERS = 2  # of a tenant, at a time
# Of a writer that hears nothing: it goes to another server, before its lease is over or after.
PATIENCE_SECONDS = (0.7, 8.0)
STREAM_SECONDS = 60.0
CALL_SECONDS = 5.0
PAUSE_SECONDS = 0.05
PIECE_SECONDS = 0.02
MOST_PIECES = 40

# What becomes of a draft, and how often.
ENDS = {
    "complete": 40,
    "incomplete": 10,
    "left": 10,
    "silent": 5,
    "stopped": 15,
    "taken over": 20,
}

COMPLETE, INCOMPLETE = r.CHAT_MESSAGE_STATE_COMPLETE, r.CHAT_MESSAGE_STATE_INCOMPLETE

BREAKS = {
    StatusCode.UNAVAILABLE,
    StatusCode.DEADLINE_EXCEEDED,
    StatusCode.CANCELLED,
    StatusCode.RESOURCE_EXHAUSTED,
}
# What gRPC's client says instead of the status when it writes to a stream that the server has
# ended: https://github.com/grpc/grpc/issues/36066.
WRITE_FAILED = "Internal error from Core"


class DraftCallers:
    """Writes drafts into the sessions of each tenant until `stop`."""

    def __init__(
        self,
        record: Record,
        api: Callable[[str, int], Api],
        check_response: Callable[[str, str, bytes], None],
        chance: random.Random,
    ):
        self._record = record
        self._api = api
        self._check_response = check_response
        self._chance = chance
        self._is_writing = True
        self.tasks: list[asyncio.Task[None]] = []

    def start(self, sessions: dict[str, list[str]]) -> None:
        for number, tenant in enumerate(list(sessions) * WRITERS):
            chance = random.Random(self._chance.random())
            work = self._write_drafts(tenant, sessions[tenant], chance, number)
            self.tasks.append(asyncio.create_task(work))

    async def settle(self) -> None:
        """Let the writers end, and wait until no draft is open."""
        self._is_writing = False
        await asyncio.gather(*self.tasks)
        await asyncio.gather(*(self._ended(draft) for draft in self._record.drafts))

    async def _write_drafts(
        self, tenant: str, sessions: list[str], chance: random.Random, number: int
    ) -> None:
        while self._is_writing:
            draft = DraftRecord(
                tenant=tenant, session_id=chance.choice(sessions), id=str(uuid.uuid4())
            )
            self._record.drafts.append(draft)
            [end] = chance.choices(list(ENDS), list(ENDS.values()))
            works = [self._write(draft, self._new_writer(draft), end, chance, number)]
            if end == "stopped":
                works.append(self._stop(draft, chance, number + 1))
            if end == "taken over":
                # On another server, or on the same one, where both share its statements.
                works.append(self._take_over(draft, chance, number + chance.randrange(2)))
            await asyncio.gather(*works)
            await asyncio.sleep(PAUSE_SECONDS)

    def _new_writer(self, draft: DraftRecord) -> Writer:
        """One that takes over: the one before stops as soon as it hears of it."""
        writer = Writer(name=uuid.uuid4().hex[:8])
        draft.writers.append(writer)
        return writer

    async def _take_over(self, draft: DraftRecord, chance: random.Random, number: int) -> None:
        await asyncio.sleep(chance.random() * MOST_PIECES * PIECE_SECONDS)
        await self._write(draft, self._new_writer(draft), "complete", chance, number)

    async def _stop(self, draft: DraftRecord, chance: random.Random, number: int) -> None:
        await asyncio.sleep(chance.random() * MOST_PIECES * PIECE_SECONDS)
        draft.has_stop = True
        while True:
            is_begun = draft.writers[0].base is not None
            try:
                response = await self._api(draft.tenant, number).drafts.StopChatDraft(
                    StopChatDraftRequest(draft_id=draft.id), timeout=CALL_SECONDS
                )
            except grpc.aio.AioRpcError as error:
                self._check_error(draft, "StopChatDraft", error)
                if error.code() is StatusCode.NOT_FOUND and (is_begun or not self._is_writing):
                    return  # it was empty, and is dropped
            else:
                self._take_message(draft, "StopChatDraft", response)
                return
            number += 1
            await asyncio.sleep(PAUSE_SECONDS)

    async def _ended(self, draft: DraftRecord) -> None:
        """Return when the draft is not open any more."""
        number = 0
        while True:
            try:
                await self._api(draft.tenant, number).drafts.GetChatDraft(
                    GetChatDraftRequest(draft_id=draft.id), timeout=CALL_SECONDS
                )
            except grpc.aio.AioRpcError as error:
                if error.code() is StatusCode.NOT_FOUND:
                    return
            number += 1
            await asyncio.sleep(PAUSE_SECONDS)

    # ---- Writing ----

    async def _write(
        self, draft: DraftRecord, writer: Writer, end: str, chance: random.Random, number: int
    ) -> None:
        """Write the draft to its end, over as many streams as it takes."""
        writing = _Writing(draft, writer, end, chance, lambda: not self._is_writing)
        while draft.writers[-1] is writer and not writing.is_done:
            await self._write_once(writing, number)
            number += 1  # the next stream may be of another server
            await asyncio.sleep(PAUSE_SECONDS)

    async def _write_once(self, writing: "_Writing", number: int) -> None:
        draft, writer = writing.draft, writing.writer
        stream = Stream(began=wall_clock())
        writer.streams.append(stream)
        call = self._api(draft.tenant, number).drafts.WriteChatDraft(timeout=STREAM_SECONDS)
        started: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        reading = asyncio.create_task(self._read(call, writing, stream, started))
        sending = asyncio.create_task(writing.send(call, started, leave=reading.cancel))
        try:
            await reading
        except TimeoutError:
            stream.reason = "no response in time"
        except asyncio.CancelledError:
            if not writing.is_done:
                raise
        except grpc.aio.AioRpcError as error:
            stream.code, stream.reason = error.code(), reason_of(error)
            self._check_error(draft, "WriteChatDraft", error)
            if stream.reason != "DRAFT_TAKEN_OVER" and not _is_break(error):
                writing.is_done = True
        finally:
            reading.cancel()
            sending.cancel()
            await asyncio.gather(reading, sending, return_exceptions=True)
            call.cancel()
        if sending.done() and not sending.cancelled() and (failure := sending.exception()):
            raise failure

    async def _read(
        self, call: Any, writing: "_Writing", stream: Stream, started: "asyncio.Future[int]"
    ) -> None:
        """Read all responses of a stream. Raises the error that it ends with."""
        draft, writer = writing.draft, writing.writer
        acknowledged = draft.acknowledged  # before the stream began, so it begins with no less
        while True:
            async with asyncio.timeout(writing.patience_seconds):
                response = await call.read()
            if response is grpc.aio.EOF:
                if not writing.is_done:
                    draft.violations.append("a stream ended with OK before its last response")
                return
            self._check_response(draft.tenant, "WriteChatDraft", response.SerializeToString())
            match response.WhichOneof("response"):
                case "started":
                    stream.started, stream.code = wall_clock(), None
                    length = response.started.length
                    if draft.writers[-1] is not writer:
                        return  # the other one goes on from here or from later
                    if length < acknowledged:
                        draft.violations.append(
                            f"acknowledged text is lost, {length} < {acknowledged}"
                        )
                    if writer.base is None:
                        writer.base = length
                    writer.acknowledged = max(writer.acknowledged, length)
                    started.set_result(length)
                case "written":
                    length = response.written.length
                    if length < writer.acknowledged:  # a repeat is answered with the same length
                        draft.violations.append(f"{length} was acknowledged late")
                    writer.acknowledged = max(writer.acknowledged, length)
                case "finished" | "stopped" as kind:
                    self._take_message(draft, kind, getattr(response, kind))
                    writing.is_done = True

    def _take_message(self, draft: DraftRecord, kind: str, response: Any) -> None:
        self._check_response(draft.tenant, kind, response.SerializeToString())
        if response.HasField("message"):
            draft.messages.append((kind, response.message))

    def _check_error(self, draft: DraftRecord, kind: str, error: grpc.aio.AioRpcError) -> None:
        """Record a finding if a caller that does nothing wrong got this error."""
        self._check_response(draft.tenant, kind, repr(error).encode())
        expected = {"DRAFT_TAKEN_OVER", "TOO_MANY_DRAFTS", "CHAT_DRAFT_NOT_FOUND"}
        if not _is_break(error) and reason_of(error) not in expected:
            text = f"{kind}: {error.code().name} {reason_of(error)}: {error.details()}"
            draft.violations.append(text)


def _is_break(error: grpc.aio.AioRpcError) -> bool:
    """Whether the service is away or busy: the writer resumes."""
    return (
        error.code() in BREAKS
        or reason_of(error) == "CONTENTION"
        or (error.code() is StatusCode.INTERNAL and error.details() == WRITE_FAILED)
    )


class _Writing:
    """What a writer is to write, and how far it has come."""

    def __init__(
        self,
        draft: DraftRecord,
        writer: Writer,
        end: str,
        chance: random.Random,
        is_over: Callable[[], bool],
    ):
        self.draft = draft
        self.writer = writer
        self.is_done = False  # it heard how the draft ended, or has left it
        self.patience_seconds: float | None = chance.choice(PATIENCE_SECONDS)
        self._end = end
        self._chance = chance
        self._is_over = is_over
        # Those who are stopped or taken over are then still at it.
        is_endless = end in ("stopped", "taken over")
        self._pieces = 100 * MOST_PIECES if is_endless else chance.randint(1, MOST_PIECES)
        self._words = 0

    async def send(
        self, call: Any, started: "asyncio.Future[int]", leave: Callable[[], object]
    ) -> None:
        """All requests of a stream. That it has ended is for who reads to find."""
        with contextlib.suppress(asyncio.InvalidStateError, grpc.aio.AioRpcError):
            await self._send(call, started)
            if self._end == "left":
                self.is_done = True
                leave()

    async def _send(self, call: Any, started: "asyncio.Future[int]") -> None:
        draft, writer = self.draft, self.writer
        start = WriteChatDraftRequest.Start(
            session_id=draft.session_id,
            draft=r.ChatDraft(id=draft.id, role=r.CHAT_MESSAGE_ROLE_ASSISTANT),
        )
        await call.write(WriteChatDraftRequest(start=start))
        length = await started
        assert writer.base is not None
        if unwritten := writer.text[max(0, length - writer.base) :]:
            await self._append(call, length, unwritten)
        # A model that goes on from a text takes its time: then another's late words would show.
        elif len(draft.writers) > 1 and self._chance.random() < 0.5:
            await asyncio.sleep(self._chance.random() * 0.2)
        while self._words < self._pieces and not self._is_over():
            await self._append_piece(call)
            await asyncio.sleep(PIECE_SECONDS * 2 * self._chance.random())
        match self._end:
            case "silent":
                self.patience_seconds = None
            case "complete" | "incomplete" | "stopped" | "taken over":
                writer.finish_state = INCOMPLETE if self._end == "incomplete" else COMPLETE
                finish = WriteChatDraftRequest.Finish(state=writer.finish_state)
                await call.write(WriteChatDraftRequest(finish=finish))
                await call.done_writing()

    async def _append_piece(self, call: Any) -> None:
        """Produce and send the next words, now and then twice."""
        writer = self.writer
        assert writer.base is not None
        piece = b""
        for _ in range(self._chance.randint(1, 3)):
            filler = self._chance.choice(("", "é", "漢字", "😀", "xyz"))
            piece += f"{writer.name}:{self._words}{filler} ".encode()
            self._words += 1
        offset = writer.base + len(writer.text)
        writer.text += piece
        writer.sent.append((offset + len(piece), wall_clock()))
        await self._append(call, offset, piece)
        if self._chance.random() < 0.03:
            await self._append(call, offset, piece)

    async def _append(self, call: Any, offset: int, text: bytes) -> None:
        append = WriteChatDraftRequest.Append(offset=offset, text=text.decode())
        await call.write(WriteChatDraftRequest(append=append))
