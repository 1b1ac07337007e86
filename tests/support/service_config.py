"""Callers with the gRPC service config that the service ships."""

import asyncio
import json
from collections import Counter
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from grpc import StatusCode

from chat_ticket.v1 import resources_pb2 as r
from chat_ticket.v1.chat_message_pb2 import CreateChatMessageRequest, ListChatMessagesRequest
from chat_ticket.v1.chat_session_pb2 import GetChatSessionRequest
from support.client import Api

FILE = Path(__file__).parents[2] / "protos/chat_ticket/v1/chat_ticket_grpc_service_config.json"
OK = StatusCode.OK.value[0]
CALLERS_PER_KIND = 8  # of each kind, in each language


Counts = dict[str, Counter[int]]


def service_config_json(*, retries: bool) -> str:
    """The shipped service config, or one without retries, with round robin."""
    shipped = json.loads(FILE.read_text()) if retries else {}
    return json.dumps({"loadBalancingConfig": [{"round_robin": {}}], **shipped})


class Callers:
    """Python callers of reads, streams and writes, until they are to stop."""

    def __init__(self, addresses: str, tenant: str, session_id: str, service_config: str):
        self._api = Api(
            addresses,
            tenant,
            options=[
                ("grpc.service_config", service_config),
                ("grpc.use_local_subchannel_pool", 1),
            ],
        )
        self._session_id = session_id
        self._stopped = False
        self._counts: Counts = {"read": Counter(), "stream": Counter(), "write": Counter()}
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        kinds = (("read", self._read), ("stream", self._stream), ("write", self._write))
        self._tasks = [
            asyncio.create_task(self._repeat(kind, call))
            for kind, call in kinds
            for _ in range(CALLERS_PER_KIND)
        ]

    async def answered(self, count: int) -> None:
        """Return when callers of each kind have got so many more answers."""
        goals = {kind: of[OK] + count for kind, of in self._counts.items()}
        async with asyncio.timeout(30):
            while any(self._counts[kind][OK] < goal for kind, goal in goals.items()):
                await asyncio.sleep(0.01)

    async def stop(self) -> Counts:
        self._stopped = True
        await asyncio.gather(*self._tasks)
        await self._api.channel.close()
        return self._counts

    async def _repeat(self, kind: str, call: Any) -> None:
        while not self._stopped:
            code = StatusCode.OK
            try:
                await call()
            except grpc.aio.AioRpcError as error:
                code = error.code()
            self._counts[kind][code.value[0]] += 1

    async def _read(self) -> None:
        await self._api.sessions.GetChatSession(GetChatSessionRequest(session_id=self._session_id))

    async def _stream(self) -> None:
        async for _ in self._api.messages.ListChatMessages(
            ListChatMessagesRequest(session_id=self._session_id, limit=1)
        ):
            pass

    async def _write(self) -> None:
        message = r.ChatMessage(role=r.CHAT_MESSAGE_ROLE_USER, content="once")
        request = CreateChatMessageRequest(session_id=self._session_id, message=message)
        await self._api.messages.CreateChatMessage(request)
