"""The lines of `chat-ticket-svc check` about the change feed and the epoch."""

import asyncio
import re

import psycopg
import pytest
from support.check_output import line
from support.process import command

from chat_ticket_svc.commands.check import feed
from chat_ticket_svc.store.feed_health import Holder, oldest_holder

pytestmark = [pytest.mark.usefixtures("feed_turn"), pytest.mark.holds_up_feeds]


async def test_transaction_that_holds_up_the_feed_is_a_warning(
    fresh_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When it is old. tests/store/test_feed_health.py has how it is found."""
    with psycopg.connect(fresh_database, application_name="a\tbatch") as connection:
        connection.execute("SELECT pg_current_xact_id()")
        [(pid, name)] = connection.execute("SELECT pg_backend_pid(), current_database()")
        async with asyncio.timeout(20):  # until no other test has an older one
            while (holder := await oldest_holder(fresh_database)) is None or holder.pid != pid:
                await asyncio.sleep(0.02)
        young = await feed.check_holder(fresh_database)
        assert re.fullmatch(r"held up for \d\.\d s by the oldest transaction", young.text)
        assert young.state == "ok"
        monkeypatch.setattr(feed, "MAX_TRANSACTION_SECONDS", 0)
        state, subject, text = await feed.check_holder(fresh_database)
    assert (state, subject) == ("warning", "feed")
    assert re.fullmatch(
        rf"held up for \d+ s by the transaction of process {pid} of user postgres"
        rf" in database {name}, application a(\?|\\x09)batch, idle in transaction: followers"
        " of the feed hear of later changes when it has ended",
        text,
    )


@pytest.mark.parametrize(
    ("holder", "expected"),
    [
        (
            Holder("7", 12, None, "batch", "bills", "", None, None),
            "held up for more than 2 s (its age is hidden, without pg_read_all_stats) by the"
            " transaction of process 12 of user batch in database bills: followers of the feed hear"
            " of later changes when it has ended",
        ),
        (
            Holder("7", None, "xa-1", "batch", "bills", None, None, 5000.0),
            "held up for 5,000 s by the prepared transaction xa-1 of user batch in database bills:"
            " end it by COMMIT PREPARED or ROLLBACK PREPARED",
        ),
    ],
    ids=["of another role", "prepared"],
)
async def test_holder_of_the_feed_is_described(
    monkeypatch: pytest.MonkeyPatch, holder: Holder, expected: str
) -> None:
    """As far as it is known."""

    async def found(_url: str) -> Holder:
        return holder

    monkeypatch.setattr(feed, "oldest_holder", found)
    assert await feed.check_holder("") == ("warning", "feed", expected)


async def test_identity_that_cannot_be_read_is_a_warning(fresh_database: str) -> None:
    """Then the operator has to begin epochs."""
    since = r"\d+, since 20\d\d-\d\d-\d\d \d\d:\d\d:\d\d UTC: "
    done = await command("check", DATABASE_URL=fresh_database, CHAT_TICKET_PORT="1")
    state, text = line(done, "epoch")
    assert state == "ok"
    assert re.fullmatch(since + "a promotion or a restore begins another", text)
    with psycopg.connect(fresh_database, autocommit=True) as connection:
        connection.execute("UPDATE chat_epochs SET identity = '?/00000001/5'")
    done = await command("check", DATABASE_URL=fresh_database, CHAT_TICKET_PORT="1")
    state, text = line(done, "epoch")
    assert state == "warning"
    assert re.fullmatch(
        since + "the owner of the schema may not read the system identifier, so call"
        r" begin_chat_epoch\(\) after a promotion or a restore \(see docs/operations/backup\.md\)",
        text,
    )
