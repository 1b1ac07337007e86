"""The channels of a client, the same for both clients: more of them as it has more streams."""

import threading
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar
from weakref import WeakSet

Channel = TypeVar("Channel")

# A call beyond the server's limit of concurrent streams waits in its connection until another one
# ends, and a watch does not end. RFC 9113 recommends a limit of at least 100, which many proxies
# have. So half of them are left for calls with one response.
STREAMS_PER_CHANNEL = 50


class ChannelPool(Generic[Channel]):
    """Looks like one channel to the stubs, and spreads streams over several.

    The first channel has all calls with one response, and streams up to STREAMS_PER_CHANNEL. Each
    further channel has as many streams. It is kept when they end, for later ones: gRPC closes the
    connection of a channel that is idle for half an hour.
    """

    def __init__(self, open_channel: Callable[[], Channel]):
        self._open_channel = open_channel
        self._lock = threading.Lock()  # the synchronous client is shared by threads
        self._first = self._current = _Streams(open_channel())
        self._all = [self._first]
        self._is_closed = False

    def close(self) -> Sequence[Channel]:
        """The channels to close. None is opened any more."""
        with self._lock:
            self._is_closed = True
            return [streams.channel for streams in self._all]

    def unary_unary(self, *arguments: Any, **keywords: Any) -> Any:
        return self._first.channel.unary_unary(*arguments, **keywords)  # type: ignore[attr-defined]

    def unary_stream(self, *arguments: Any, **keywords: Any) -> Any:
        return self._stream("unary_stream", *arguments, **keywords)

    def stream_stream(self, *arguments: Any, **keywords: Any) -> Any:
        return self._stream("stream_stream", *arguments, **keywords)

    def _stream(self, kind: str, path: str, *arguments: Any, **keywords: Any) -> Any:
        def start(*call_arguments: Any, **call_keywords: Any) -> Any:
            streams = self._reserve()
            try:
                method = streams.method(kind, path, *arguments, **keywords)
                call = method(*call_arguments, **call_keywords)
            except BaseException:
                self._started(streams, None)
                raise
            self._started(streams, call)
            return call

        return start

    def _reserve(self) -> "_Streams[Channel]":
        """The streams of a channel with room for one more."""
        with self._lock:
            if self._is_closed:
                raise ValueError("the client is closed")
            if not self._current.has_room():
                for streams in self._all:
                    if streams.has_room():
                        break
                else:
                    streams = _Streams(self._open_channel())
                    self._all.append(streams)
                self._current = streams
            self._current.starting += 1
            return self._current

    def _started(self, streams: "_Streams[Channel]", call: Any) -> None:
        with self._lock:
            streams.starting -= 1
            if call is not None:
                streams.calls.add(call)


class _Streams(Generic[Channel]):
    """A channel and its open streams."""

    def __init__(self, channel: Channel):
        self.channel = channel
        self.starting = 0
        # Weak, because a stream ends when its caller drops it. A callback at its end would keep it.
        self.calls: WeakSet[Any] = WeakSet()
        self._methods: dict[str, Any] = {}

    def has_room(self) -> bool:
        if self.starting + len(self.calls) >= STREAMS_PER_CHANNEL:
            for call in [call for call in self.calls if call.done()]:
                self.calls.discard(call)
        return self.starting + len(self.calls) < STREAMS_PER_CHANNEL

    def method(self, kind: str, path: str, *arguments: Any, **keywords: Any) -> Any:
        if path not in self._methods:
            self._methods[path] = getattr(self.channel, kind)(path, *arguments, **keywords)
        return self._methods[path]
