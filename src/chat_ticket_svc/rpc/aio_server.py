"""gRPC's own asyncio server, but for the loop in which it takes in calls.

That loop (grpcio 1.85.1, AioServer._server_main_loop) waits for the next call of every registered
method at once, and after each call begins to wait for all of them again: a quarter of what an
empty call costs, with our number of methods. Here each method has tasks of its own that take in
its calls, so that gRPC's loop waits once, for all of these tasks to end.

And it reads the path of a method that does not exist as UTF-8: a path that is none ends the loop,
so that after one request from anybody who reaches the port nothing listens any more while the
process lives on. Methods that exist are registered with gRPC's core and do not come that way; so
what does is refused without a look at its path, which is all that was ever going to happen to it.
"""

import asyncio
import contextlib
from collections.abc import Mapping
from typing import Any

import grpc.aio
from grpc._cython import cygrpc  # type: ignore[attr-defined] # has no stubs

# Of each method, that wait for calls at once. A task takes in one call in each turn of the event
# loop. When more of them come, the others wait where nobody sees them: with one task a crowd of ten
# times as many callers as could be served was refused after a second, and what was accepted had
# waited for as long.
ACCEPTORS_PER_METHOD = 16


def server(**arguments: Any) -> grpc.aio.Server:
    """As grpc.aio.server, without interceptors and limits; serves registered methods only."""
    original = cygrpc.AioServer
    cygrpc.AioServer = _AioServer
    try:
        return grpc.aio.server(**arguments)
    finally:
        cygrpc.AioServer = original


class _AioServer(cygrpc.AioServer):  # type: ignore[misc]
    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self._handlers: dict[str, Any] = {}
        # The event loop itself holds its tasks weakly.
        self._tasks: set[asyncio.Task[None]] = set()

    def add_registered_method_handlers(self, handlers: Mapping[str, Any]) -> None:
        super().add_registered_method_handlers(handlers)
        self._handlers.update(handlers)

    def _make_request_call_future(self, method: bytes | None) -> asyncio.Future[Any]:
        """What gRPC's loop waits for: the calls of a registered method; for None, of any other."""
        loop = asyncio.get_running_loop()
        # Not the task: when gRPC's loop ends by an error it cancels what it waits for, and gRPC's
        # core still writes to what a task holds that waits for a call.
        ended = loop.create_future()

        def end(task: asyncio.Task[None]) -> None:
            if not task.cancelled() and (error := task.exception()) and not ended.done():
                ended.set_exception(error)

        for _ in range(ACCEPTORS_PER_METHOD):
            calls = self._refuse_unknown_methods() if method is None else self._accept_calls(method)
            self._keep(calls).add_done_callback(end)
        return ended

    async def _accept_calls(self, method: bytes) -> None:
        """Never returns; raises what gRPC expects of it, when the server stops."""
        loop, name = asyncio.get_running_loop(), method.decode()
        handler = self._handlers[name]
        handle = _HANDLE[handler.request_streaming, handler.response_streaming]
        while True:
            call = await self._request_registered_call(method)
            handling = handle(handler, call, loop)
            self._keep(cygrpc._schedule_rpc_coro(handling, call, loop, name))
            del call, handling  # they have all of a call, and the next one may be long in coming

    async def _refuse_unknown_methods(self) -> None:
        """Never returns, as _accept_calls."""
        while True:
            self._keep(_refuse(await self._request_call()))

    def _keep(self, work: Any) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


# By whether requests and responses are streams.
_HANDLE = {
    (False, False): cygrpc._handle_unary_unary_rpc,
    (False, True): cygrpc._handle_unary_stream_rpc,
    (True, False): cygrpc._handle_stream_unary_rpc,
    (True, True): cygrpc._handle_stream_stream_rpc,
}


async def _refuse(call: Any) -> None:
    context = cygrpc._ServicerContext(call, None, None, asyncio.get_running_loop())
    # It says that it was aborted, or that the caller has left before.
    with contextlib.suppress(grpc.aio.BaseError):
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")
