"""A server as gRPC's documentation makes it, with an empty method: `python -m benchmarks.stock N`.

It has N methods, no options, no interceptors, and nothing of ours, so that it stays what it is when
the service changes. Its event loop is uvloop's, which makes it faster than asyncio's would.
"""

import asyncio
import json
import sys

import grpc
import uvloop
from google.protobuf.empty_pb2 import Empty

from benchmarks import EMPTY_SERVICE


async def _empty(_: Empty, context: object) -> Empty:  # noqa: ARG001 - gRPC passes both
    return Empty()


async def _serve(methods: int) -> None:
    server = grpc.aio.server()
    handler = grpc.unary_unary_rpc_method_handler(
        _empty,
        request_deserializer=Empty.FromString,
        response_serializer=Empty.SerializeToString,
    )
    others = (f"Other{number}" for number in range(1, methods))
    handlers = dict.fromkeys(("Empty", *others), handler)
    # As generated functions register their methods.
    generic = grpc.method_handlers_generic_handler(EMPTY_SERVICE, handlers)
    server.add_generic_rpc_handlers((generic,))
    server.add_registered_method_handlers(EMPTY_SERVICE, handlers)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(json.dumps({"event": "listening", "port": port}), file=sys.stderr, flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(int(sys.argv[1])))
