"""Admission: each call is authenticated, authorized and counted before its request is parsed."""

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterator, Callable, Sequence

from chat_ticket_svc.access import request_context
from chat_ticket_svc.access.authenticator import Authenticator, Context
from chat_ticket_svc.access.credential import (
    FULL_ACCESS,
    TENANT_KEY,
    Credential,
    Metadata,
    credential_expired,
    metadata_values,
)
from chat_ticket_svc.access.method_permissions import METHOD_PERMISSIONS, UNAUTHENTICATED_METHODS
from chat_ticket_svc.access.quotas import QuotaEnforcer, QuotaLease
from chat_ticket_svc.errors import PermissionDeniedError, QuotaExceededError

# The event loop rejects timeouts that are too long. The connection is closed long before this one.
MAX_STREAM_SECONDS = 1_000_000


class AdmissionController:
    """Admits a call if its credential, its tenant and the quotas allow it.

    With several authenticators a caller must satisfy all of them, and may do what all of their
    credentials allow. Without an authenticator every caller may do everything.
    """

    def __init__(self, authenticators: Sequence[Authenticator], quotas: QuotaEnforcer):
        self._authenticators = authenticators
        self._quotas = quotas

    async def admit_unary(
        self,
        method: str,
        context: Context,
        metadata: Metadata,
        *,
        wait_seconds: float,
        request_bytes: int,
    ) -> QuotaLease | None:
        """Admit a unary call. The caller releases the returned quota lease when the call ends.

        It may wait for its quotas, for `wait_seconds` at most.
        """
        if method in UNAUTHENTICATED_METHODS:
            return None
        _, tenant_id = await self._authorize(method, context, metadata)
        request_context.set_tenant(tenant_id)
        try:
            return await self._quotas.acquire_call(
                tenant_id, wait_seconds=wait_seconds, request_bytes=request_bytes
            )
        except QuotaExceededError:
            await self._quotas.delay_rejection(tenant_id, context.time_remaining())
            raise

    @contextlib.asynccontextmanager
    async def admit_stream(
        self,
        method: str,
        context: Context,
        metadata: Metadata,
        session_id: Callable[[], str],
        *,
        wait_seconds: float,
        request_bytes: int,
    ) -> AsyncIterator[None]:
        """Admit a stream for the duration of the block, at most until its credential expires.

        It may wait for its quotas, for `wait_seconds` at most. `session_id` is called once the
        caller is authorized, because it parses the request.
        """
        if method in UNAUTHENTICATED_METHODS:
            with self._quotas.acquire_unauthenticated_stream(method):
                yield
            return
        credential, tenant_id = await self._authorize(method, context, metadata)
        request_context.set_tenant(tenant_id)
        try:
            lease = await self._quotas.acquire_stream(
                tenant_id,
                session_id().lower(),
                wait_seconds=wait_seconds,
                request_bytes=request_bytes,
            )
        except QuotaExceededError:
            await self._quotas.delay_rejection(tenant_id, context.time_remaining())
            raise
        with lease:
            if credential.expires_at == math.inf:
                yield
                return
            remaining = min(credential.expires_at - time.time(), MAX_STREAM_SECONDS)
            try:
                async with asyncio.timeout(remaining) as timeout:
                    yield
            except TimeoutError as error:
                if not timeout.expired():
                    raise
                raise credential_expired() from error

    async def _authorize(
        self, method: str, context: Context, metadata: Metadata
    ) -> tuple[Credential, str]:
        """The caller's credential, and the tenant that the call acts for."""
        if method not in METHOD_PERMISSIONS:
            raise PermissionDeniedError(
                "method has no permission rule", reason="METHOD_NOT_ALLOWED"
            )
        credential = FULL_ACCESS
        for authenticator in self._authenticators:
            credential &= await authenticator.authenticate(context, metadata)
            # After each, so that a later refusal is logged with what is known of the caller.
            request_context.set_subject(credential.subject)
        credential.require_permission(METHOD_PERMISSIONS[method])
        return credential, credential.select_tenant(metadata_values(metadata, TENANT_KEY))
