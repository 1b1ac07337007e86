"""The standard health service, grpc.health.v1, and the monitor that sets it from the database."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc

from chat_ticket_svc.store import schema
from chat_ticket_svc.store.connection_errors import cause
from chat_ticket_svc.store.database import Database
from chat_ticket_svc.tasks import cancel_and_wait
from chat_ticket_svc.telemetry import metrics

log = structlog.get_logger()

CHECK_INTERVAL_SECONDS = 1


class HealthServicer(health_pb2_grpc.HealthServicer):
    """The status of the server and of each service: the same for all, NOT_SERVING at first.

    Not the library's servicer: that one writes to its watchers while it holds a lock, so a watcher
    who reads nothing would hold up the others, each change of the status, and the shutdown.
    """

    def __init__(self, services: Sequence[str]):
        # The empty name stands for the whole server.
        self._names = ("", *services)
        self._status: Any = health_pb2.HealthCheckResponse.NOT_SERVING
        self._changed = asyncio.Event()
        self._is_draining = False

    def set(self, *, serving: bool) -> None:
        response = health_pb2.HealthCheckResponse
        self._status = (
            response.SERVING if serving and not self._is_draining else response.NOT_SERVING
        )
        self._changed.set()
        self._changed = asyncio.Event()

    def drain(self) -> None:
        """Report NOT_SERVING from now on."""
        self._is_draining = True
        self.set(serving=False)

    async def Check(self, request: Any, context: Any) -> Any:
        if request.service not in self._names:
            await context.abort(grpc.StatusCode.NOT_FOUND)
        return health_pb2.HealthCheckResponse(status=self._status)

    async def Watch(self, request: Any, _: Any) -> AsyncIterator[Any]:
        last = None
        while True:
            changed, status = self._changed, self._status
            if request.service not in self._names:
                status = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
            if status != last:
                last = status
                yield health_pb2.HealthCheckResponse(status=status)
            else:
                await changed.wait()

    async def List(self, _: Any, __: Any) -> Any:
        response = health_pb2.HealthCheckResponse(status=self._status)
        return health_pb2.HealthListResponse(statuses=dict.fromkeys(self._names, response))  # type: ignore[attr-defined]


class HealthMonitor:
    """Reports SERVING while the database is reachable and migrated, else NOT_SERVING."""

    def __init__(self, servicer: HealthServicer, probe: schema.Probe, db: Database):
        self._servicer = servicer
        self._probe = probe
        self._db = db
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start to check the database."""
        self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Stop the checks. The last report stays."""
        await cancel_and_wait(self._task)

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
                    self._servicer.set(serving=False)
                    log.warning("not serving", problem=problem)
                else:
                    self._servicer.set(serving=True)
                    log.info("serving")
            await asyncio.sleep(CHECK_INTERVAL_SECONDS)
