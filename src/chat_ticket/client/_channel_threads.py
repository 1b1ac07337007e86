"""gRPC's channel for threads, whose calls carry metadata and raise chat_ticket.errors.

It takes the place of grpc.intercept_channel, which makes a method of gRPC's anew for each call, and
a dozen objects more: 12 % of the client's CPU. A call of it is a call of gRPC: it ends as gRPC ends
it when the connection breaks, when the server refuses it, and when its caller cancels it.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from types import TracebackType
from typing import Any

import grpc

from chat_ticket import errors
from chat_ticket.client._channel import CallMetadata
from chat_ticket.client._retry import bounded


class ClientChannel:
    """What the stubs take for their channel. They make each of its methods once."""

    def __init__(self, channel: grpc.Channel, metadata: CallMetadata[str], timeout: float):
        self._channel: Any = channel
        self._metadata = metadata
        self._timeout = timeout

    def close(self) -> None:
        self._channel.close()

    def unary_unary(self, *arguments: Any, **keywords: Any) -> "_UnaryMethod":
        method = self._channel.unary_unary(*arguments, **keywords)
        return _UnaryMethod(method, self._metadata, self._timeout)

    def unary_stream(self, *arguments: Any, **keywords: Any) -> "_StreamMethod":
        method = self._channel.unary_stream(*arguments, **keywords)
        return _StreamMethod(method, self._metadata, None)

    def stream_stream(self, *arguments: Any, **keywords: Any) -> "_DuplexMethod":
        method = self._channel.stream_stream(*arguments, **keywords)
        return _DuplexMethod(method, self._metadata, None)


class _Method:
    """A method of a service, with the arguments of gRPC's."""

    def __init__(self, method: Any, metadata: CallMetadata[str], timeout: float | None):
        self._method = method
        self._metadata = metadata
        self._timeout = timeout

    def _call(
        self,
        call: Callable[..., Any],
        request: Any,
        timeout: float | None = None,
        metadata: Iterable[tuple[str, str | bytes]] | None = None,
        credentials: grpc.CallCredentials | None = None,
        wait_for_ready: bool | None = None,
        compression: grpc.Compression | None = None,
    ) -> Any:
        """What `call` returns, which is one of gRPC's functions for the method."""
        timeout = bounded(self._timeout if timeout is None else timeout)
        token: str | None = None
        if self._metadata.get_token is not None:
            start = time.monotonic()
            token = self._metadata.get_token()
            if timeout is not None:
                timeout -= time.monotonic() - start
        try:
            return call(
                request,
                timeout,
                self._metadata.combine(metadata, token),
                credentials,
                wait_for_ready,
                compression,
            )
        except grpc.RpcError as error:
            raise errors.from_rpc_error(error) from error

    def _begin(
        self,
        call: Callable[..., Any],
        request: Any,
        timeout: float | None = None,
        metadata: Iterable[tuple[str, str | bytes]] | None = None,
        credentials: grpc.CallCredentials | None = None,
        wait_for_ready: bool | None = None,
        compression: grpc.Compression | None = None,
    ) -> "_Call | _FailedCall":
        """What has begun. An error is that of its result, also when it cannot begin."""
        options = (credentials, wait_for_ready, compression)
        try:
            return _Call(self._call(call, request, timeout, metadata, *options))
        except Exception as error:
            return _FailedCall(error)


class _UnaryMethod(_Method, grpc.UnaryUnaryMultiCallable):  # type: ignore[type-arg]
    def __call__(self, request: Any, *arguments: Any, **keywords: Any) -> Any:
        return self._call(self._method, request, *arguments, **keywords)

    def with_call(self, request: Any, *arguments: Any, **keywords: Any) -> Any:
        response, call = self._call(self._method.with_call, request, *arguments, **keywords)
        return response, _Call(call)

    def future(self, request: Any, *arguments: Any, **keywords: Any) -> Any:
        return self._begin(self._method.future, request, *arguments, **keywords)


class _StreamMethod(_Method):
    def __call__(self, request: Any, *arguments: Any, **keywords: Any) -> Any:
        return self._begin(self._method, request, *arguments, **keywords)


class _DuplexMethod(_Method):
    def __call__(self, request_iterator: Any, *arguments: Any, **keywords: Any) -> Any:
        return self._begin(self._method, request_iterator, *arguments, **keywords)


class _Call:
    """gRPC's call, future or stream of responses, but with the exceptions of chat_ticket.errors."""

    def __init__(self, call: Any):
        self._call = call

    def __getattr__(self, name: str) -> Any:
        return getattr(self._call, name)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return self._typed(self._call.__next__)

    def result(self, timeout: float | None = None) -> Any:
        return self._typed(self._call.result, timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        error: BaseException | None = self._call.exception(timeout)
        return errors.from_rpc_error(error) if isinstance(error, grpc.RpcError) else error

    @staticmethod
    def _typed(read: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return read(*arguments)
        except grpc.RpcError as error:
            raise errors.from_rpc_error(error) from error


class _FailedCall(Future[Any]):
    """A call that could not begin, such as one whose token could not be got."""

    def __init__(self, error: Exception):
        super().__init__()
        self.set_exception(error)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return self.result()

    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.INTERNAL

    def details(self) -> str:
        return str(self.exception())

    def initial_metadata(self) -> None:
        """None, as nothing came of the call. So it is with `trailing_metadata`."""

    trailing_metadata = initial_metadata

    def is_active(self) -> bool:
        return False

    def time_remaining(self) -> None:
        """None, as the call has no end to come."""

    def add_callback(self, _: Callable[[], Any]) -> bool:
        return False  # the call has ended

    def traceback(self, timeout: float | None = None) -> TracebackType | None:
        error = self.exception(timeout)
        return None if error is None else error.__traceback__
