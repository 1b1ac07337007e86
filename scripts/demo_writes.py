"""The part of the demonstration in which several writers write to one session."""

import asyncio
import json
import uuid
from collections import Counter
from typing import Any

import grpc.aio
from demo_chats import Checks, Tenant, describe_error

from chat_ticket.v1.resources_pb2 import (
    CHAT_MESSAGE_AUTHOR_KIND_AI_AGENT,
    CHAT_MESSAGE_ROLE_ASSISTANT,
    CHAT_MESSAGE_ROLE_USER,
)

AGENTS = 2
UPDATES = 20  # of each of the services that keep something in the metadata of one message
CARD = "4111111111111111"


async def write_together(checks: Checks, tenant: Tenant) -> None:
    print(f"\nWRITE to one session of {tenant.name}, {AGENTS} agents at once")
    session_id = (await tenant("CreateChatSession")).session.id
    asked = {"role": CHAT_MESSAGE_ROLE_USER, "content": f"My card {CARD} was charged twice."}
    question = (await tenant("CreateChatMessage", session_id=session_id, message=asked)).message
    answer = await answer_once(checks, tenant, session_id, question.sequence)
    tenant.acknowledged[session_id] = [question.sequence, answer.sequence]
    await rate_and_count(checks, tenant, answer.id)
    await redact(checks, tenant, question.id)


async def answer_once(checks: Checks, tenant: Tenant, session_id: str, revision: int) -> Any:
    """Agents that have read the same revision answer it. Returns the answer that was stored."""

    async def answer(number: int) -> Any:
        author = {"kind": CHAT_MESSAGE_AUTHOR_KIND_AI_AGENT, "id": f"agent-{number}"}
        message = {"role": CHAT_MESSAGE_ROLE_ASSISTANT, "content": "One is refunded."}
        try:
            response = await tenant(
                "CreateChatMessage",
                session_id=session_id,
                message=message | {"id": str(uuid.uuid4()), "author": author},
                expected_revision=revision,
            )
        except grpc.aio.AioRpcError as error:
            return describe_error(error)
        return response.message

    outcomes = await asyncio.gather(*(answer(number) for number in range(1, AGENTS + 1)))
    refusals = Counter(outcome for outcome in outcomes if isinstance(outcome, str))
    answers = [outcome for outcome in outcomes if not isinstance(outcome, str)]
    author, others = answers[0].author.id if answers else "nobody", ", ".join(refusals)
    checks.check(
        len(answers) == 1 and refusals == {"ABORTED ETAG_MISMATCH": AGENTS - 1},
        f"both expect revision {revision}: {author} has answered, the other → {others}",
    )
    return answers[0]


async def rate_and_count(checks: Checks, tenant: Tenant, message_id: str) -> None:
    """Two services keep a rating and a count in the metadata of one message."""

    async def keep(name: str) -> None:
        for number in range(1, UPDATES + 1):
            patch = json.dumps({name: number})
            await tenant("UpdateChatMessage", message={"id": message_id}, metadata_merge_json=patch)

    await asyncio.gather(keep("rating"), keep("tokens"))
    message = (await tenant("GetChatMessage", message_id=message_id)).message
    checks.check(
        json.loads(message.metadata_json) == {"rating": UPDATES, "tokens": UPDATES},
        f"{UPDATES} ratings and {UPDATES} counts were merged into {message.metadata_json}",
    )


async def redact(checks: Checks, tenant: Tenant, message_id: str) -> None:
    async def found() -> int:
        return len((await tenant("SearchChatMessages", query=CARD)).hits)

    before = await found()
    message = (await tenant("RedactChatMessage", message_id=message_id)).message
    after = await found()
    checks.check(
        (before, after) == (1, 0) and message.redacted and CARD not in message.content,
        f'a search found the card, and does not since the message is "{message.content}"',
    )
