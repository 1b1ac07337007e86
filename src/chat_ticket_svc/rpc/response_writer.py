"""Writes the responses of a stream."""

import asyncio
from typing import Any, cast

from grpc._cython import cygrpc  # type: ignore[attr-defined] # has no stubs

from chat_ticket_svc.rpc.calls import CallContext
from chat_ticket_svc.rpc.instrumentation import CallRecord, Context
from chat_ticket_svc.timeouts import TimeoutQueue


class ResponseWriter:
    """Writes the responses of a stream, counts them, and bounds the time that each may take.

    A task that resumes for each response costs more than to send it. So a handler whose next
    response is the same as that of many other streams may leave it to `start_write`, while it waits
    itself. What becomes of such a response:

    - Its caller has left: the response is lost, and the handler is cancelled, as at any other time.
    - Its caller does not read it in time: the handler is cancelled, as in `write`.
    - The handler goes on, and writes: that waits until the response is sent.
    """

    __slots__ = ("_context", "_record", "_sending", "_task", "_timeouts")

    def __init__(
        self,
        context: Context,
        record: CallRecord,
        task: asyncio.Task[Any],
        timeouts: TimeoutQueue[asyncio.Task[Any]],
    ):
        """`timeouts` cancels `task`, which handles the call, if a write takes too long."""
        self._context = context
        self._record = record
        self._task = task
        self._timeouts = timeouts
        self._sending: asyncio.Future[None] | None = None  # what `start_write` has begun

    async def write(self, message: bytes) -> None:
        if self._sending is not None:
            await asyncio.wait((self._sending,))
            self._on_sent()
        self._timeouts.start(self._task)
        await self._context.write(message)
        self._timeouts.stop(self._task)
        self._record.count_response(len(message))

    def start_write(self, message: bytes) -> bool:
        """Begin to send a response. Returns False if the one before it is not sent yet.

        Only for methods with one request.
        """
        if self._sending is not None:
            return False
        try:
            self._sending = cast(CallContext, self._context).start_write(message, self._on_sent)
        except cygrpc.ExecuteBatchError:
            return True  # the caller has left
        self._timeouts.start(self._task)
        self._record.count_response(len(message))
        return True

    def _on_sent(self) -> None:
        self._sending = None
        self._timeouts.stop(self._task)
