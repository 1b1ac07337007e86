"""Servers that the service is compared with: `python -m benchmarks.variants serve [OPTION]`.

Without an option it is the service with one more method, which does nothing: what every unary call
pays before it does anything. It is added to the composition here and nowhere else, so that it is
served as the others are. With `--bare` it is on gRPC's server with the same options and nothing of
ours around it, beside a stand-in for creating and following messages of one session, which stores
nothing: what following costs gRPC alone. With `--unfollowed` no write wakes anybody.
"""

import asyncio
import gc
import json
import sys
from collections.abc import AsyncIterator, Callable
from typing import Any, cast

import grpc
import uvloop
from google.protobuf.empty_pb2 import Empty

from chat_ticket.v1 import chat_session_pb2_grpc
from chat_ticket.v1.chat_message_pb2 import CreateChatMessageRequest, CreateChatMessageResponse
from chat_ticket.v1.chat_session_pb2 import WatchChatSessionResponse as Event
from chat_ticket_svc import cli, server
from chat_ticket_svc.access import method_permissions
from chat_ticket_svc.access.credential import Permission
from chat_ticket_svc.rpc import aio_server
from chat_ticket_svc.watch import hub

BARE, UNFOLLOWED = "--bare", "--unfollowed"

SERVICE = "chat_ticket.bench.Bench"
PATH = f"/{SERVICE}/Empty"


async def _empty(_: Empty, context: object) -> Empty:  # noqa: ARG001 - what gRPC gives
    return Empty()


def _register(target: Any) -> None:
    """As the generated functions do it."""
    handler = grpc.unary_unary_rpc_method_handler(
        _empty,
        request_deserializer=Empty.FromString,
        response_serializer=Empty.SerializeToString,
    )
    generic = grpc.method_handlers_generic_handler(SERVICE, {"Empty": handler})
    target.add_generic_rpc_handlers((generic,))
    target.add_registered_method_handlers(SERVICE, {"Empty": handler})


class _Told:
    """The stand-in: tells every stream of every message, and keeps them for the slow ones."""

    def __init__(self) -> None:
        self._events = [Event(caught_up=Event.CaughtUp()).SerializeToString()]
        self._more = asyncio.Event()

    async def create(
        self,
        request: CreateChatMessageRequest,
        context: object,  # noqa: ARG002
    ) -> CreateChatMessageResponse:
        event = Event()
        event.messages_created.messages.append(request.message)
        self._events.append(event.SerializeToString())
        self._more.set()
        self._more = asyncio.Event()
        return CreateChatMessageResponse()

    async def watch(self, request: bytes, context: object) -> AsyncIterator[bytes]:  # noqa: ARG002
        yield self._events[0]
        place = len(self._events)
        while True:
            more = self._more
            if place == len(self._events):
                await more.wait()
            yield self._events[place]
            place += 1

    def register(self, target: Any) -> None:
        create = grpc.unary_unary_rpc_method_handler(
            self.create,
            request_deserializer=CreateChatMessageRequest.FromString,
            response_serializer=CreateChatMessageResponse.SerializeToString,
        )
        target.add_registered_method_handlers(
            "chat_ticket.v1.ChatMessageService", {"CreateChatMessage": create}
        )
        watch: Any = grpc.unary_stream_rpc_method_handler(self.watch)
        target.add_registered_method_handlers(
            "chat_ticket.v1.ChatSessionService", {"WatchChatSession": watch}
        )


def _register_too(add: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
    """As the service registers its own methods, whatever it puts around them."""

    def added(servicer: Any, target: Any) -> None:
        add(servicer, target)
        _register(target)

    return added


async def _bare() -> None:
    bare = aio_server.create_server(options=server.OPTIONS)
    _register(bare)
    _Told().register(bare)
    port = bare.add_insecure_port("127.0.0.1:0")
    await bare.start()
    print(json.dumps({"event": "listening", "port": port}), file=sys.stderr, flush=True)
    gc.freeze()
    await bare.wait_for_termination()


def main() -> None:
    if BARE in sys.argv:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_bare())
    cast("dict[str, Permission]", method_permissions.METHOD_PERMISSIONS)[PATH] = Permission.READ
    generated: Any = chat_session_pb2_grpc
    add = generated.add_ChatSessionServiceServicer_to_server
    generated.add_ChatSessionServiceServicer_to_server = _register_too(add)
    arguments = sys.argv[1:]
    if UNFOLLOWED in arguments:
        arguments.remove(UNFOLLOWED)
        hub.WatchHub.changed = lambda *_: None  # type: ignore[method-assign]
    cli.main(arguments)


if __name__ == "__main__":
    main()
