"""The synchronous client with the surface of the asyncio one, so that one test is for both."""

import asyncio
import contextlib
import contextvars
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

import grpc

from chat_ticket.client import ChatTicketClient

THREADS = 32  # more than a test has calls and watches at once
END = object()


class ThreadedClient:
    """Each call, and each read of a stream, runs in a thread of its own."""

    def __init__(self, *arguments: Any, **keywords: Any):
        self.client = ChatTicketClient(*arguments, **keywords)
        self._threads = ThreadPoolExecutor(THREADS, "threaded-client")
        self.sessions, self.messages, self.drafts, self.attachments, self.tickets = (
            _Stub(stub, self._run, self._read)
            for stub in (
                self.client.sessions,
                self.client.messages,
                self.client.drafts,
                self.client.attachments,
                self.client.tickets,
            )
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await asyncio.to_thread(self.client.close)
        self._threads.shutdown(wait=False)

    async def retry(
        self, method: Callable[[Any], Awaitable[Any]], request: Any, **keywords: Any
    ) -> Any:
        """The loop itself runs in a thread, and the method in the event loop of the test."""
        loop = asyncio.get_running_loop()

        def synchronous(request: Any) -> Any:
            return asyncio.run_coroutine_threadsafe(_coroutine(method, request), loop).result()

        return await self._run(self.client.retry, synchronous, request, **keywords)

    def watch(self, *arguments: Any, **keywords: Any) -> AsyncIterator[Any]:
        return self._read(self.client.watch, *arguments, **keywords)

    def follow_sessions(self, *arguments: Any, **keywords: Any) -> AsyncIterator[Any]:
        return self._read(self.client.follow_sessions, *arguments, **keywords)

    def messages_of(self, *arguments: Any, **keywords: Any) -> AsyncIterator[Any]:
        return self._read(self.client.messages_of, *arguments, **keywords)

    async def _run(self, function: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
        loop = asyncio.get_running_loop()
        context = contextvars.copy_context()
        return await loop.run_in_executor(
            self._threads, lambda: context.run(function, *arguments, **keywords)
        )

    async def _read(
        self, stream: Callable[..., Iterator[Any]], *arguments: Any, **keywords: Any
    ) -> AsyncIterator[Any]:
        responses = await self._run(stream, *arguments, **keywords)
        try:
            while (response := await self._run(next, responses, END)) is not END:
                yield response
        finally:
            # Nobody can close a generator that a thread waits in: closing the client ends that.
            with contextlib.suppress(ValueError, AttributeError):
                responses.close()


class _Stub:
    def __init__(self, stub: Any, run: Callable[..., Any], read: Callable[..., Any]):
        self._stub = stub
        self._run = run
        self._read = read

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._stub, name)
        use = self._run if isinstance(method, grpc.UnaryUnaryMultiCallable) else self._read
        return lambda *arguments, **keywords: use(method, *arguments, **keywords)


async def _coroutine(method: Callable[[Any], Awaitable[Any]], request: Any) -> Any:
    return await method(request)
