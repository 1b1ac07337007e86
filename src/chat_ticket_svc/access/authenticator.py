"""The interface that every way to authenticate a caller implements."""

from typing import Any, Protocol

import grpc.aio

from chat_ticket_svc.access.credential import Credential, Metadata

Context = grpc.aio.ServicerContext[Any, Any]


class Authenticator(Protocol):
    async def authenticate(self, context: Context, metadata: Metadata) -> Credential:
        """The credential of a call's caller. Raises UnauthenticatedError without a valid one."""
        ...
