"""The way in: every call is let in here, or refused, before anything looks at its request."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Protocol

import grpc.aio

from chat_ticket_svc.access import request_context
from chat_ticket_svc.access.credential import (
    EVERYTHING,
    TENANT_KEY,
    Credential,
    Metadata,
    expired,
    values,
)
from chat_ticket_svc.access.method_permissions import METHOD_PERMISSIONS, UNAUTHENTICATED_METHODS
from chat_ticket_svc.access.quotas import Quotas
from chat_ticket_svc.errors import PermissionDeniedError, QuotaExceededError

Context = grpc.aio.ServicerContext[Any, Any]

# The event loop takes no time that is too far away; a connection is closed long before.
LONGEST_STREAM_SECONDS = 1_000_000


class Authenticator(Protocol):
    """One way in which callers prove who they are."""

    async def authenticate(self, context: Context, metadata: Metadata) -> Credential:
        """Raises UnauthenticatedError."""
        ...


class AdmissionController:
    """Lets a call in when its credential, its tenant and the quotas allow it.

    With several proofs a caller has to give all of them, and may do what all of them allow; with
    none, everybody may do everything.
    """

    def __init__(self, authenticators: Sequence[Authenticator], quotas: Quotas):
        self._authenticators = authenticators
        self._quotas = quotas

    async def call(
        self, method: str, context: Context, metadata: Metadata
    ) -> contextlib.AbstractContextManager[None]:
        """Let a unary call in; what is returned is to be entered around it."""
        if method in UNAUTHENTICATED_METHODS:
            return contextlib.nullcontext()
        _, tenant_id = await self._admitted(method, context, metadata)
        request_context.set_tenant(tenant_id)
        try:
            return self._quotas.call(tenant_id)
        except QuotaExceededError:
            await self._quotas.delay_rejection(tenant_id, context.time_remaining())
            raise

    @contextlib.asynccontextmanager
    async def stream(
        self, method: str, context: Context, metadata: Metadata, session_id: Callable[[], str]
    ) -> AsyncIterator[None]:
        """Around a stream of a session, which ends when its credential expires."""
        if method in UNAUTHENTICATED_METHODS:
            with self._quotas.unauthenticated_stream(method):
                yield
            return
        credential, tenant_id = await self._admitted(method, context, metadata)
        request_context.set_tenant(tenant_id)
        try:
            use = self._quotas.stream(tenant_id, session_id().lower())
        except QuotaExceededError:
            await self._quotas.delay_rejection(tenant_id, context.time_remaining())
            raise
        with use:
            left = min(credential.expires_at - time.time(), LONGEST_STREAM_SECONDS)
            try:
                async with asyncio.timeout(left) as timeout:
                    yield
            except TimeoutError as error:
                if not timeout.expired():
                    raise
                raise expired() from error

    async def _admitted(
        self, method: str, context: Context, metadata: Metadata
    ) -> tuple[Credential, str]:
        if method not in METHOD_PERMISSIONS:
            raise PermissionDeniedError("nobody may call this", reason="METHOD_NOT_ALLOWED")
        credential = EVERYTHING
        for authenticator in self._authenticators:
            credential &= await authenticator.authenticate(context, metadata)
        credential.require(METHOD_PERMISSIONS[method])
        return credential, credential.tenant(values(metadata, TENANT_KEY))
