"""The standard health service, grpc.health.v1, and the monitor that sets it from the database."""

import asyncio
from collections.abc import Sequence
from typing import Any

import structlog
from grpc_health.v1 import health, health_pb2

from chat_ticket_svc.store import schema
from chat_ticket_svc.store.connection_errors import cause
from chat_ticket_svc.store.database import Database
from chat_ticket_svc.telemetry import metrics

log = structlog.get_logger()

CHECK_INTERVAL_SECONDS = 1


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


class HealthMonitor:
    """Reports SERVING while the database is reachable and migrated, else NOT_SERVING."""

    def __init__(self, servicer: HealthServicer, probe: schema.Probe, db: Database):
        self._servicer = servicer
        self._probe = probe
        self._db = db
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Report NOT_SERVING, and start to check the database."""
        await self._servicer.set_all(serving=False)
        self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Stop the checks. The last report stays."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        last_problem = None
        while True:
            try:
                missing = await self._probe.missing()
                problem = f"the database lacks {', '.join(missing)}" if missing else ""
                if last_problem and not problem:
                    await self._db.check()  # the pool may take longer than the probe to recover
            except Exception as error:  # any error: the server is not healthy
                problem = cause(error)
            metrics.DATABASE_UP.set(not problem)
            if problem != last_problem:
                last_problem = problem
                if problem:
                    await self._servicer.set_all(serving=False)
                    log.warning("not serving", problem=problem)
                else:
                    await self._servicer.set_all(serving=True)
                    log.info("serving")
            await asyncio.sleep(CHECK_INTERVAL_SECONDS)
