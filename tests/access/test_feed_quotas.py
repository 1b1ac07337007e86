"""Quotas of the streams of WatchChatSessions."""

from collections.abc import Awaitable, Callable

from grpc import StatusCode
from support.client import Api, an_id, refused
from support.feeds import caught_up_feed, following_feed
from support.messages import sequences
from support.quotas import SERVER, another_tenant, eventually, exceeds_quota, open_stream


async def test_feed_is_a_stream_of_the_tenant(
    start_with_quotas: Callable[..., Awaitable[Api]],
) -> None:
    """It counts with all others of the tenant and of the server, but is of no session."""
    api = await start_with_quotas(tenant_streams=2, session_streams=1, streams=3)
    session = await api.session()
    async with (
        caught_up_feed(api),
        caught_up_feed(api, from_beginning=True),
        another_tenant(api) as other,
    ):
        with exceeds_quota("tenant_streams", 2, api):
            await sequences(api, session.id)
        with exceeds_quota("tenant_streams", 2, api):
            async with caught_up_feed(api):
                pass
        async with caught_up_feed(other):
            for attempt in (caught_up_feed(other), open_stream(other, an_id())):
                with exceeds_quota("streams", 3, SERVER):
                    await attempt.__aenter__()


async def test_quota_is_released_however_a_stream_ends(
    start_with_quotas: Callable[..., Awaitable[Api]],
) -> None:
    """By a cancellation or by an error."""
    api = await start_with_quotas(tenant_streams=1)
    session = await api.session()

    async def exactly_one_is_admitted() -> None:
        async def open_another() -> None:
            async with caught_up_feed(api):
                with exceeds_quota("tenant_streams", 1, api):
                    async with caught_up_feed(api):
                        pass

        await eventually(open_another)

    await exactly_one_is_admitted()
    await exactly_one_is_admitted()
    await eventually(lambda: sequences(api, session.id))
    with refused(StatusCode.INVALID_ARGUMENT):
        async with following_feed(api, "x") as feed:
            await feed.end()
    await exactly_one_is_admitted()
