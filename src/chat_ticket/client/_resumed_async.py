"""Streams that do not break, for asyncio. The synchronous ones are generated (make proto)."""

import logging
import time
from collections.abc import AsyncGenerator, Callable
from typing import Any, TypeVar

import grpc

from chat_ticket import errors
from chat_ticket.client import _runtime_asyncio as runtime
from chat_ticket.client._resume import Resumable
from chat_ticket.client._retry import backoff_seconds, is_retryable
from chat_ticket.errors import ChatTicketError

log = logging.getLogger("chat_ticket.client")

Item = TypeVar("Item")

# A token may expire on its way to the server, so the watch asks for a new one. More expired tokens
# in a row than this are an error of their source.
MAX_EXPIRED_TOKENS = 3


class ResumedStreams:
    """The streams of a client. `renews_token` is whether it has a function for its token."""

    def __init__(self, closing: runtime.Closing, *, renews_token: bool):
        self._closing = closing
        self._renews_token = renews_token

    async def items(
        self,
        start: Callable[[], Any],
        progress: Resumable[Any, Item],
        name: str,
        *,
        silence_seconds: float,
        timeout: float | None = None,
    ) -> AsyncGenerator[Item, None]:
        """What a stream delivers, and those that replace it when it breaks.

        `timeout` limits the time without an item; None is no limit.
        """
        failures = expired_tokens = 0
        last_item = time.monotonic()
        while True:
            try:
                call = start()
            except ValueError:  # as gRPC calls a closed channel
                if self._closing.has_begun:
                    raise errors.client_closed() from None
                raise
            responses: runtime.ResponseReader[Any] = runtime.ResponseReader(call, silence_seconds)
            error: ChatTicketError | None = None
            try:
                while True:
                    response = await responses.read()
                    if response is None:
                        progress.on_stream_end()
                        cause = "the stream ended"
                        break
                    expired_tokens = 0
                    for item in progress.items(response):
                        failures = 0
                        yield item
                        last_item = time.monotonic()
                    if progress.has_ended:
                        return
            except TimeoutError:
                cause = f"no response for {silence_seconds:g} s"
                error = errors.DeadlineExceededError(grpc.StatusCode.DEADLINE_EXCEEDED, cause)
            except errors.NotFoundError:
                items = progress.on_not_found()
                if not items:
                    raise
                for item in items:
                    yield item
                return
            except ChatTicketError as failure:
                expired = self._renews_token and failure.reason == "CREDENTIAL_EXPIRED"
                expired_tokens = expired_tokens + 1 if expired else 0
                if not is_retryable(failure) and not 0 < expired_tokens <= MAX_EXPIRED_TOKENS:
                    raise
                if self._closing.has_begun:
                    raise errors.client_closed() from None
                cause, error = str(failure), failure
            finally:
                responses.cancel()
            if progress.has_ended:
                return
            pause = backoff_seconds(failures, error)
            late = timeout is not None and time.monotonic() + pause > last_item + timeout
            if late and error is not None:
                raise error
            log.log(
                logging.WARNING if failures else logging.INFO,
                "%s resumes after %s in %.1f s: %s",
                name,
                progress.position,
                pause,
                cause,
            )
            failures += 1
            await self._closing.sleep(pause)
