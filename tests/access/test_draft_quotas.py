"""Quotas of drafts: how many are written at once, and how fast."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack

import pytest
from support.client import Api
from support.drafts import list_drafts, write_message, writing
from support.quotas import SERVER, another_tenant, eventually, exceeds_quota, open_stream

from chat_ticket_svc.access import draft_quotas
from chat_ticket_svc.access.draft_quotas import DraftQuotas
from chat_ticket_svc.limits import Quotas

StartWithQuotas = Callable[..., Awaitable[Api]]


async def seconds_of(work: Awaitable[object]) -> float:
    loop = asyncio.get_running_loop()
    began = loop.time()
    await work
    return loop.time() - began


class TestNumber:
    @pytest.mark.parametrize("quota", ["tenant_drafts", "drafts", "tenant_streams", "streams"])
    async def test_draft_beyond_the_number_is_refused(
        self, start_with_quotas: StartWithQuotas, quota: str
    ) -> None:
        """Nothing of it is stored. Those that are written go on, and make room when they end."""
        api = await start_with_quotas(**{quota: 2})
        session = await api.session()
        async with writing(api, session.id) as one, writing(api, session.id) as other:
            with exceeds_quota(quota, 2, api if quota.startswith("tenant") else SERVER):
                await write_message(api, session.id)
            open_ids = {draft.id for draft in await list_drafts(api, session.id)}
            assert open_ids == {one.draft_id, other.draft_id}
            await one.append("whole")
            assert (await one.finish()).content == "whole"
            await eventually(lambda: write_message(api, session.id))

    async def test_tenants_have_numbers_of_their_own(
        self, start_with_quotas: StartWithQuotas
    ) -> None:
        """What one tenant writes takes no room of another."""
        api = await start_with_quotas(tenant_drafts=1)
        async with another_tenant(api) as other, writing(api, (await api.session()).id):
            await write_message(other, (await other.session()).id)

    async def test_writers_are_no_streams_of_their_session(
        self, start_with_quotas: StartWithQuotas
    ) -> None:
        """Whose quota is for those that watch it."""
        api = await start_with_quotas(session_streams=1)
        session = await api.session()
        async with writing(api, session.id), open_stream(api, session.id):
            await write_message(api, session.id)

    async def test_many_sessions_at_once(self, api: Api) -> None:
        """Many more than the connections of a tenant begin, write and end at the same time."""
        sessions = await asyncio.gather(*(api.session() for _ in range(150)))
        async with AsyncExitStack() as stack:
            streams = await asyncio.gather(
                *(stack.enter_async_context(writing(api, session.id)) for session in sessions)
            )
            await asyncio.gather(*(stream.write(f"to {stream.draft_id}") for stream in streams))
            messages = await asyncio.gather(*(stream.finish() for stream in streams))
        assert [message.content for message in messages] == [f"to {m.id}" for m in messages]
        assert [message.session_id for message in messages] == [s.id for s in sessions]


class TestRate:
    @pytest.mark.parametrize("text", ["a" * 500, "a", ""], ids=["long", "short", "empty"])
    async def test_text_beyond_the_rate_waits(
        self, start_with_quotas: StartWithQuotas, text: str
    ) -> None:
        """It is not refused, and not lost. A piece counts as 128 bytes at least."""
        size = max(len(text), 128)
        api = await start_with_quotas(tenant_draft_bytes_per_second=20 * size)
        session = await api.session()

        async def write(count: int) -> None:
            for _ in range(count):
                await stream.append(text)
            await stream.write("b")

        async with writing(api, session.id) as stream:
            burst = await seconds_of(write(15))
            assert burst < 0.7, "a second's text passes at once"
            assert burst + await seconds_of(write(18)) > 0.6
            assert (await stream.finish()).content == text * 15 + "b" + text * 18 + "b"

    async def test_rate_of_all_tenants(self, start_with_quotas: StartWithQuotas) -> None:
        """Text of one waits for that of another."""
        api = await start_with_quotas(draft_bytes_per_second=2000)
        async with (
            another_tenant(api) as other,
            writing(api, (await api.session()).id) as one,
            writing(other, (await other.session()).id) as another,
        ):
            alone = await seconds_of(one.write("a" * 1900))
            assert alone + await seconds_of(another.write("b" * 1000)) > 0.4

    async def test_tenant_that_writes_too_fast_holds_up_no_other(
        self, start_with_quotas: StartWithQuotas
    ) -> None:
        """What waits for the rate of its tenant does not count towards that of all tenants."""
        api = await start_with_quotas(
            tenant_draft_bytes_per_second=1000, draft_bytes_per_second=8000
        )
        sessions = [await api.session() for _ in range(10)]
        async with another_tenant(api) as other, AsyncExitStack() as stack:
            for session in sessions:
                stream = await stack.enter_async_context(writing(api, session.id))
                await stream.append("a" * 10_000)
            async with writing(other, (await other.session()).id) as theirs:
                assert await seconds_of(theirs.write("b" * 900)) < 3

    async def test_text_of_a_writer_that_leaves_does_not_count(
        self, start_with_quotas: StartWithQuotas
    ) -> None:
        """The next writer does not wait for it."""
        api = await start_with_quotas(tenant_draft_bytes_per_second=1000)
        session = await api.session()
        async with writing(api, session.id) as stream:
            await stream.append("a" * 100_000)
            await asyncio.sleep(0.1)
        async with writing(api, session.id) as stream:
            assert await seconds_of(stream.write("b" * 500)) < 5

    async def test_tenant_that_comes_again_has_no_new_burst(
        self, start_with_quotas: StartWithQuotas
    ) -> None:
        """A new stream does not begin with a rate of its own."""
        api = await start_with_quotas(tenant_draft_bytes_per_second=2000)
        session = await api.session()
        first = await seconds_of(write_message(api, session.id, "a" * 1900))
        assert first + await seconds_of(write_message(api, session.id, "b" * 1900)) > 0.8

    async def test_idle_tenants_are_forgotten(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Those that write, or have written too much, are not."""
        monkeypatch.setattr(draft_quotas, "PRUNE_THRESHOLD_TENANTS", 3)
        quotas = DraftQuotas(Quotas(tenant_draft_bytes_per_second=10_000), tenant_transactions=1)
        with quotas.writing("busy"):
            for index in range(50):
                with quotas.writing(f"tenant {index}"):
                    pass
            with quotas.writing("fast"):
                await quotas.pace("fast", 5000)
            quotas._prune_idle_tenants()
            assert quotas._tenants.keys() == {"busy", "fast"}
