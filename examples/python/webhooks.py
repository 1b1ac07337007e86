"""Posts every change of a tenant's sessions and tickets to a URL: in order, and at least once.

Start the service by `make run`, and then, in another terminal:

    WEBHOOK_SECRET=secret .venv/bin/python examples/python/webhooks.py https://example.com/hook

A change that is not accepted is posted again, and later ones wait for it. The cursor of what was
accepted is kept in a file, so that the program goes on there when it is started again. Without the
file it begins now. A program of your own needs the packages chat-ticket-client and httpx.

The requests are those of https://www.standardwebhooks.com. `webhook-id` is the same when the same
change is posted again, so a receiver that keeps the ids can ignore repeats. `webhook-signature` is
an HMAC-SHA256 of the id, the time and the body, so that nobody else can post. The libraries of that
site take the secret in base64: `c2VjcmV0` for `secret`.
"""

import argparse
import asyncio
import base64
import hashlib
import hmac
import itertools
import logging
import os
import random
import sys
import time
from pathlib import Path

import httpx
from google.protobuf.json_format import MessageToJson

from chat_ticket.client import AsyncChatTicketClient
from chat_ticket.errors import OutOfRangeError
from chat_ticket.v1.chat_session_pb2 import WatchChatSessionsResponse

FIRST_RETRY_SECONDS = 0.2
MAX_RETRY_SECONDS = 60.0

CHANGES = ("session", "session_deleted", "ticket", "ticket_deleted")

log = logging.getLogger("webhooks")


class Webhook:
    """A URL that changes are posted to."""

    def __init__(self, http: httpx.AsyncClient, url: str, secret: bytes):
        self._http = http
        self._url = url
        self._secret = secret

    async def post(self, event: WatchChatSessionsResponse.Event) -> None:
        """Post a change until it is accepted."""
        body = MessageToJson(event, preserving_proto_field_name=True, indent=None).encode()
        for failures in itertools.count():
            try:
                response = await self._http.post(
                    self._url, content=body, headers=self._headers(body)
                )
                response.raise_for_status()
            except httpx.HTTPError as error:
                limit = min(FIRST_RETRY_SECONDS * 2 ** min(failures, 20), MAX_RETRY_SECONDS)
                pause = random.uniform(limit / 2, limit)  # noqa: S311 - jitter
                log.warning("not accepted, again in %.1f s: %s", pause, error or repr(error))
                await asyncio.sleep(pause)
            else:
                return

    def _headers(self, body: bytes) -> dict[str, str]:
        message_id, now = hashlib.sha256(body).hexdigest(), str(int(time.time()))
        signed = f"{message_id}.{now}.".encode() + body
        signature = base64.b64encode(hmac.digest(self._secret, signed, "sha256"))
        return {
            "content-type": "application/json",
            "webhook-id": message_id,
            "webhook-timestamp": now,
            "webhook-signature": f"v1,{signature.decode()}",
        }


class CursorFile:
    """The cursor of what was accepted. A crash leaves the old one or the new one."""

    def __init__(self, path: Path):
        self._path = path

    def read(self) -> str:
        return self._path.read_text() if self._path.exists() else ""

    def write(self, cursor: str) -> None:
        new = self._path.with_suffix(".new")
        with new.open("w") as file:
            file.write(cursor)
            file.flush()
            os.fsync(file.fileno())
        new.replace(self._path)


async def relay(address: str, url: str, secret: bytes, cursor_file: CursorFile) -> None:
    # For a remote server add token=... and credentials=grpc.ssl_channel_credentials().
    async with (
        AsyncChatTicketClient(address, tenant="acme") as client,
        httpx.AsyncClient(timeout=10) as http,
    ):
        webhook = Webhook(http, url, secret)
        async for response in client.follow_sessions(cursor_file.read()):
            for event in response.events:
                if event.WhichOneof("event") in CHANGES:
                    await webhook.post(event)
            cursor_file.write(response.cursor)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("url")
    parser.add_argument("--address", default="localhost:50051")
    parser.add_argument("--cursor-file", type=Path, default=Path("webhooks.cursor"))
    arguments = parser.parse_args()
    secret = os.environ.get("WEBHOOK_SECRET", "").encode()
    if not secret:
        parser.error("set WEBHOOK_SECRET, which signs the requests")
    logging.basicConfig(format="%(message)s")
    try:
        asyncio.run(
            relay(arguments.address, arguments.url, secret, CursorFile(arguments.cursor_file))
        )
    except OutOfRangeError as error:
        # The receiver has to read all again, which it must be told by somebody.
        sys.exit(f"changes may be missing; delete {arguments.cursor_file} to go on: {error}")


if __name__ == "__main__":
    main()
