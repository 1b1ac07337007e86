"""Variants of the server to compare with: `python -m benchmarks.variants serve [OPTION]`.

Without an option it is the service with one additional method, which does nothing: its time is the
overhead of every unary call. The method is registered only here, and served like all others.

With `--bare` the method runs on gRPC's server with the same options but without our middleware.
Beside it runs a substitute for creating and watching the messages of one session, which stores
nothing: its time is what watching costs gRPC alone.

With `--without-watch` no write wakes a watcher.
"""

import asyncio
import gc
import json
import os
import sys
from collections.abc import AsyncIterator, Callable
from typing import Any, cast

from chat_ticket_svc import event_engine

event_engine.disable_listener(os.environ)  # as `serve` does, before gRPC is imported

import grpc
import uvloop
from google.protobuf.empty_pb2 import Empty

from benchmarks import EMPTY_PATH, EMPTY_SERVICE
from chat_ticket.v1 import chat_session_pb2_grpc
from chat_ticket.v1.chat_message_pb2 import CreateChatMessageRequest, CreateChatMessageResponse
from chat_ticket.v1.chat_session_pb2 import WatchChatSessionResponse as Event
from chat_ticket_svc import cli, server
from chat_ticket_svc.access import method_permissions
from chat_ticket_svc.access.credential import Permission
from chat_ticket_svc.rpc import aio_server
from chat_ticket_svc.watch import hub

BARE, WITHOUT_WATCH = "--bare", "--without-watch"


async def _empty(_: Empty, context: object) -> Empty:  # noqa: ARG001 - gRPC passes both
    return Empty()


def _register(target: Any) -> None:
    """Register the method as the generated functions do."""
    handler = grpc.unary_unary_rpc_method_handler(
        _empty,
        request_deserializer=Empty.FromString,
        response_serializer=Empty.SerializeToString,
    )
    generic = grpc.method_handlers_generic_handler(EMPTY_SERVICE, {"Empty": handler})
    target.add_generic_rpc_handlers((generic,))
    target.add_registered_method_handlers(EMPTY_SERVICE, {"Empty": handler})


class _InMemoryChat:
    """Sends every message to every stream. Keeps all events, so that slow streams miss none."""

    def __init__(self) -> None:
        self._events = [Event(caught_up=Event.CaughtUp()).SerializeToString()]
        self._changed = asyncio.Event()

    async def create(
        self,
        request: CreateChatMessageRequest,
        context: object,  # noqa: ARG002
    ) -> CreateChatMessageResponse:
        event = Event()
        event.messages_created.messages.append(request.message)
        self._events.append(event.SerializeToString())
        self._changed.set()
        self._changed = asyncio.Event()
        return CreateChatMessageResponse()

    async def watch(self, request: bytes, context: object) -> AsyncIterator[bytes]:  # noqa: ARG002
        yield self._events[0]
        position = len(self._events)
        while True:
            changed = self._changed
            if position == len(self._events):
                await changed.wait()
            yield self._events[position]
            position += 1

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


def _also_register(add: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
    """A replacement for a generated function that also registers the additional method.

    So the method gets whatever the server puts around its own methods.
    """

    def add_both(servicer: Any, target: Any) -> None:
        add(servicer, target)
        _register(target)

    return add_both


async def _serve_bare() -> None:
    bare = aio_server.create_server(request_timeout_seconds=10, options=server.OPTIONS)
    _register(bare)
    _InMemoryChat().register(bare)
    port = bare.add_insecure_port("127.0.0.1:0")
    await bare.start()
    print(json.dumps({"event": "listening", "port": port}), file=sys.stderr, flush=True)
    gc.freeze()
    await bare.wait_for_termination()


def main() -> None:
    if BARE in sys.argv:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve_bare())
    cast("dict[str, Permission]", method_permissions.METHOD_PERMISSIONS)[EMPTY_PATH] = (
        Permission.READ
    )
    generated: Any = chat_session_pb2_grpc
    add = generated.add_ChatSessionServiceServicer_to_server
    generated.add_ChatSessionServiceServicer_to_server = _also_register(add)
    arguments = sys.argv[1:]
    if WITHOUT_WATCH in arguments:
        arguments.remove(WITHOUT_WATCH)
        hub.WatchHub.notify_changed = lambda *_: None  # type: ignore[method-assign]
    cli.main(arguments)


if __name__ == "__main__":
    main()
