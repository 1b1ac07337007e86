"""Deleting sessions, however many messages they have.

A session is deleted in one transaction, so nobody sees a part of it. With a million messages that
takes longer than a statement or a call may take. So the deletion of a large session belongs to no
call: it goes on when its caller has left, without a statement timeout. A repeated call waits for
it.
"""

import asyncio
from collections.abc import Callable
from weakref import WeakValueDictionary

from chat_ticket_svc.store import sessions
from chat_ticket_svc.store.database import Database
from chat_ticket_svc.store.deletion import missing_allowed


class SessionDeleter:
    """Deletes sessions, for all callers of a process. `on_deleted` gets (tenant, session)."""

    def __init__(self, db: Database, on_deleted: Callable[[str, str], object]):
        self._db = db
        self._on_deleted = on_deleted
        self._large: dict[tuple[str, str, int | None], asyncio.Task[None]] = {}
        # A tenant deletes one large session at a time, as each takes a connection for long. Weak:
        # only tenants that do so have an entry.
        self._turns = WeakValueDictionary[str, asyncio.Lock]()

    async def delete(
        self, tenant_id: str, session_id: str, etag: int | None, *, allow_missing: bool
    ) -> None:
        """Delete a session and its contents, unless its ticket is open or pending.

        With `allow_missing`, does nothing if it does not exist.

        If the caller leaves, the deletion of a large session goes on. If the process ends first,
        nothing is deleted.
        """
        key = (tenant_id, session_id, etag)
        deletion = self._large.get(key)
        if deletion is None:
            try:
                await sessions.delete(
                    self._db, tenant_id, session_id, etag, allow_missing=allow_missing
                )
            except sessions.LargeSession:
                deletion = self._large.get(key) or self._start(*key)
            else:
                self._on_deleted(tenant_id, session_id)
                return
        with missing_allowed(allow_missing):
            await asyncio.shield(deletion)

    def _start(self, tenant_id: str, session_id: str, etag: int | None) -> asyncio.Task[None]:
        key = (tenant_id, session_id, etag)
        deletion = asyncio.create_task(self._delete_large(*key))
        self._large[key] = deletion

        def forget(_: asyncio.Task[None]) -> None:
            del self._large[key]
            if not deletion.cancelled():
                deletion.exception()  # its caller may have left, and a repeat meets the error anew

        deletion.add_done_callback(forget)
        return deletion

    async def _delete_large(self, tenant_id: str, session_id: str, etag: int | None) -> None:
        async with self._turns.setdefault(tenant_id, asyncio.Lock()):
            # Those who allow that it is missing, and those who do not, share this deletion.
            await sessions.delete(
                self._db, tenant_id, session_id, etag, allow_missing=False, may_be_large=True
            )
        self._on_deleted(tenant_id, session_id)
