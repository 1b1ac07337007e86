"""gRPC's own asyncio server, but for how it takes in calls of methods that do not exist.

It reads the path of such a call as UTF-8 in the one task that takes in all calls (grpcio 1.85.1,
AioServer._server_main_loop). A path that is none ends that task: one request from anybody who
reaches the port, and nothing listens any more while the process lives on. Methods that exist are
registered with gRPC's core and do not come that way; so what does is refused without a look at
its path, which is all that was ever going to happen to it.
"""

import asyncio
import contextlib
from typing import Any

import grpc.aio
from grpc._cython import cygrpc  # type: ignore[attr-defined] # has no stubs


def server(**arguments: Any) -> grpc.aio.Server:
    """As grpc.aio.server; every servicer must be added by its generated function."""
    original = cygrpc.AioServer
    cygrpc.AioServer = _AioServer
    try:
        return grpc.aio.server(**arguments)
    finally:
        cygrpc.AioServer = original


class _AioServer(cygrpc.AioServer):  # type: ignore[misc]
    def _make_request_call_future(self, method: bytes | None) -> asyncio.Future[Any]:
        """The next call of a registered method; or, for None, of any other."""
        if method is not None:
            future: asyncio.Future[Any] = super()._make_request_call_future(method)
            return future
        return asyncio.get_running_loop().create_task(self._refuse_unknown_methods())

    async def _refuse_unknown_methods(self) -> None:
        """Never returns; raises what gRPC expects of it, when the server stops."""
        refusals: set[asyncio.Task[None]] = set()
        while True:
            call = await self._request_call()
            refusal = asyncio.create_task(_refuse(call))
            refusals.add(refusal)
            refusal.add_done_callback(refusals.discard)


async def _refuse(call: Any) -> None:
    context = cygrpc._ServicerContext(call, None, None, asyncio.get_running_loop())
    # It says that it was aborted, or that the caller has left before.
    with contextlib.suppress(grpc.aio.BaseError):
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")
