"""The standard health service, grpc.health.v1."""

from collections.abc import Sequence
from typing import Any

from grpc_health.v1 import health, health_pb2


class HealthServicer(health.aio.HealthServicer):
    """The library's servicer with the method List, and a setter for all services at once."""

    def __init__(self, services: Sequence[str]):
        super().__init__()
        # The empty name stands for the whole server.
        self._names = ("", *services)

    async def set_all(self, *, serving: bool) -> None:
        response = health_pb2.HealthCheckResponse
        for name in self._names:
            await self.set(name, response.SERVING if serving else response.NOT_SERVING)

    async def List(self, _: Any, context: Any) -> Any:
        statuses = {
            name: await self.Check(health_pb2.HealthCheckRequest(service=name), context)
            for name in self._names
        }
        return health_pb2.HealthListResponse(statuses=statuses)  # type: ignore[attr-defined]
