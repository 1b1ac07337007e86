"""Looks at the drafts in the database several times a second, while something breaks."""

import contextlib
import threading
import time
import uuid
from collections.abc import Sequence
from typing import Any

import grpc
import psycopg

from chat_ticket.v1.chat_draft_pb2 import GetChatDraftRequest
from chat_ticket.v1.chat_draft_pb2_grpc import ChatDraftServiceStub
from faults.draft_record import DraftRecord
from faults.workload import CHANNEL

SAMPLE_SECONDS = 0.2
# That a draft may be open after its lease, while the service is up.
OVERDUE_SECONDS = 5.0
# The service is up when the database and one of the servers answer within this time, and their
# connections last: no transaction succeeds while all of them are terminated again and again.
UP_SECONDS = 0.35

LASTING = """
SELECT EXISTS (SELECT FROM pg_stat_activity
                WHERE application_name = 'chat-ticket-svc'
                  AND backend_start < clock_timestamp() - interval '1 second')
"""

OPEN = """
SELECT d.id::text, extract(epoch FROM clock_timestamp() - d.expires_at)::float8, m.id IS NOT NULL
  FROM chat_drafts d LEFT JOIN chat_messages m ON m.tenant_id = d.tenant_id AND m.id = d.id
 WHERE d.tenant_id = ANY(%(tenants)s)
"""
# One statement, so that a draft that becomes a message meanwhile is one of them.
GONE = """
SELECT written.id::text FROM unnest(%(ids)s::uuid[]) AS written (id)
 WHERE NOT EXISTS (SELECT FROM chat_drafts d
                    WHERE d.tenant_id = ANY(%(tenants)s) AND d.id = written.id)
   AND NOT EXISTS (SELECT FROM chat_messages m
                    WHERE m.tenant_id = ANY(%(tenants)s) AND m.id = written.id)
"""


class DraftSampler:
    """Samples the drafts of some tenants from `start` to `stop`."""

    def __init__(
        self,
        database_url: str,
        addresses: Sequence[str],
        tenants: Sequence[str],
        drafts: Sequence[DraftRecord],
        *,
        overdue_seconds: float,
    ):
        self._database_url = database_url
        self._channels = [grpc.insecure_channel(each, options=CHANNEL) for each in addresses]
        self._tenants = list(tenants)
        self._drafts = drafts
        self._overdue_seconds = overdue_seconds
        self._up_since: float | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.violations: dict[str, None] = {}  # each once

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()
        for channel in self._channels:
            channel.close()

    def _run(self) -> None:
        while not self._stopped.is_set():
            with (
                contextlib.suppress(psycopg.OperationalError),
                psycopg.connect(
                    self._database_url, autocommit=True, connect_timeout=3
                ) as connection,
            ):
                while not self._stopped.wait(SAMPLE_SECONDS):
                    self._sample(connection)
            self._up_since = None
            self._stopped.wait(SAMPLE_SECONDS)

    def _is_up(self) -> bool:
        """Whether a server finds that a draft does not exist."""
        request = GetChatDraftRequest(draft_id=str(uuid.uuid4()))
        metadata = [("x-tenant-id", self._tenants[0])]
        calls = [
            ChatDraftServiceStub(channel).GetChatDraft.future(
                request, metadata=metadata, timeout=UP_SECONDS
            )
            for channel in self._channels
        ]
        return any(call.code() is grpc.StatusCode.NOT_FOUND for call in calls)

    def _sample(self, connection: psycopg.Connection[Any]) -> None:
        if not (self._is_up() and connection.execute(LASTING).fetchone() == (True,)):
            self._up_since = None
        elif self._up_since is None:
            self._up_since = time.monotonic()
        began = time.monotonic()
        written = [draft.id for draft in list(self._drafts) if draft.acknowledged]
        params = {"tenants": self._tenants, "ids": written}
        for draft_id, overdue, is_message in connection.execute(OPEN, params).fetchall():
            if is_message:
                self._find(f"{draft_id} is a message and still a draft")
            if time.monotonic() - began > UP_SECONDS:
                self._up_since = None
            if self._up_since is None:
                continue
            if min(overdue, began - self._up_since) > self._overdue_seconds:
                self._find(f"{draft_id} has outlived its lease")
        for (draft_id,) in connection.execute(GONE, params).fetchall():
            self._find(f"{draft_id} was acknowledged, and is neither a draft nor a message")

    def _find(self, text: str) -> None:
        self.violations[f"draft {text}"] = None
