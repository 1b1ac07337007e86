"""Errors that the followers of the feed provoke, with a secret in every text."""

from typing import Any

from support.client import Api
from support.database import execute
from support.feeds import caught_up_feed, following_feed
from support.provoked_errors import ServerOutput
from support.secrets import secret


async def provoke_feed_errors(output: ServerOutput, api: Api, database: str) -> None:
    """Begin a stream in every way that is refused."""

    async def refused(reason: str, cursor: str, **fields: Any) -> None:
        async with following_feed(api, cursor, **fields) as feed:
            await output.expect_error(reason, feed.end())

    bad = secret("value")
    await refused("INVALID_ARGUMENT", bad, user_id=f"{bad}\n", labels={"NO-KEY": bad, "a": "\n"})
    await refused("INVALID_ARGUMENT", bad, from_beginning=True)
    filters: dict[str, Any] = {"user_id": secret("user"), "labels": {"a": secret("label")}}
    async with caught_up_feed(api, **filters) as feed:
        pass
    execute(database, "UPDATE chat_epochs SET swept_position = (1::bigint << 62)")
    await refused("CURSOR_EXPIRED", feed.cursor, **filters)
    execute(
        database,
        "UPDATE chat_epochs SET swept_position = 0",
        "SELECT begin_chat_epoch()",
    )
    await refused("HISTORY_CHANGED", feed.cursor, **filters)
