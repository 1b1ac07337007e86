"""The standard health service, grpc.health.v1."""

from collections.abc import Sequence
from typing import Any

from grpc_health.v1 import health, health_pb2


class HealthServicer(health.aio.HealthServicer):
    """Adds List, the newest method, which the library lacks; and sets all services at once."""

    def __init__(self, services: Sequence[str]):
        super().__init__()
        # The empty name stands for the whole server.
        self._names = ("", *services)

    async def set_all(self, *, serving: bool) -> None:
        answer = health_pb2.HealthCheckResponse
        for name in self._names:
            await self.set(name, answer.SERVING if serving else answer.NOT_SERVING)

    async def List(self, _: Any, context: Any) -> Any:
        statuses = {
            name: await self.Check(health_pb2.HealthCheckRequest(service=name), context)
            for name in self._names
        }
        return health_pb2.HealthListResponse(statuses=statuses)  # type: ignore[attr-defined]
