"""What ends the stream of a writer: its session, its server, its credential, its deadline."""

import asyncio
import time
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from grpc import StatusCode
from support.authority import key_set
from support.client import Api, an_id, refused
from support.drafts import DraftStream, a_start, get_draft, list_drafts, unstarted, writing
from support.jwt_server import KEY, SETTINGS
from support.server import serving
from support.sessions import delete_session


class TestSession:
    @pytest.mark.parametrize("text", ["text", ""])
    async def test_deleted_session(self, api: Api, another_server: Api, text: str) -> None:
        """Its drafts end with it. Their writers hear it at once, on whatever server they are."""
        for writer, deleter in ((api, api), (another_server, api), (api, another_server)):
            session = await api.session()
            async with writing(writer, session.id) as one, writing(writer, session.id) as two:
                await one.write(text)
                await delete_session(deleter, session.id)
                async with asyncio.timeout(3):
                    for stream in (one, two):
                        with refused(StatusCode.NOT_FOUND, "CHAT_SESSION_NOT_FOUND") as refusal:
                            await stream.until_error()
                        assert refusal.details["ResourceInfo"].resource_name == session.id
            with refused(StatusCode.NOT_FOUND, "CHAT_DRAFT_NOT_FOUND"):
                await get_draft(api, one.draft_id)
            with refused(StatusCode.NOT_FOUND, "CHAT_SESSION_NOT_FOUND"):
                async with writing(api, session.id, one.draft_id):
                    pass

    async def test_session_that_is_deleted_while_text_is_written(
        self, api: Api, another_server: Api
    ) -> None:
        """Whatever the writer is doing, it ends with NOT_FOUND and not with another error."""

        async def write(stream: DraftStream) -> None:
            for _ in range(500):
                await stream.append("x", stream.offset - stream.offset % 3)
                await asyncio.sleep(0)

        for number in range(10):
            session = await api.session()
            async with writing((api, another_server)[number % 2], session.id) as stream:
                await stream.append("xxx")
                writes = asyncio.create_task(write(stream))
                await stream.until("written")
                await delete_session(api, session.id)
                with refused(StatusCode.NOT_FOUND, "CHAT_SESSION_NOT_FOUND"):
                    await stream.until_error()
                await writes


class TestServer:
    async def test_drain(self, database: str, api: Api, tenant: str) -> None:
        """Writers end with DRAINING at once, and resume elsewhere with all that was acknowledged.

        So does a draft that would begin during the drain.
        """
        session = await api.session()
        async with serving(database, drain_seconds=30) as server:
            leaving = Api(f"127.0.0.1:{server.port}", tenant)
            async with leaving, writing(leaving, session.id) as stream:
                await stream.write("acknowledged")
                stopping = asyncio.create_task(server.stop())
                async with asyncio.timeout(5):
                    with refused(StatusCode.UNAVAILABLE, "DRAINING") as refusal:
                        await stream.until_error()
                assert "RetryInfo" in refusal.details
                with refused(StatusCode.UNAVAILABLE, "DRAINING"):
                    async with writing(leaving, session.id):
                        pass
                await stopping
        async with writing(api, session.id, stream.draft_id) as again:
            await again.append(", and on")
            assert (await again.finish()).content == "acknowledged, and on"
        assert await list_drafts(api, session.id) == []

    async def test_drain_while_text_is_written(self, database: str, api: Api, tenant: str) -> None:
        """Nothing that was acknowledged is lost, and the rest is sent again."""
        session = await api.session()
        text = "".join(f"{number} " for number in range(3000))
        async with serving(database) as server:
            leaving = Api(f"127.0.0.1:{server.port}", tenant)
            async with leaving, writing(leaving, session.id) as stream:

                async def write() -> None:
                    for start in range(0, len(text), 10):
                        await stream.append(text[start : start + 10])
                        await asyncio.sleep(0)

                writes = asyncio.create_task(write())
                await stream.until("written")
                stopping = asyncio.create_task(server.stop())
                with refused(StatusCode.UNAVAILABLE, "DRAINING"):
                    await stream.until_error()
                await writes
                await stopping
        async with writing(api, session.id, stream.draft_id) as again:
            assert again.written >= stream.written > 0
            await again.append(text[again.written :])
            assert (await again.finish()).content == text

    async def test_finish_during_the_drain(self, database: str, api: Api, tenant: str) -> None:
        """A finish that is on its way is answered, or the draft is finished elsewhere."""
        session = await api.session()
        async with serving(database) as server:
            leaving = Api(f"127.0.0.1:{server.port}", tenant)
            async with leaving, writing(leaving, session.id) as stream:
                await stream.write("text")
                finished, _ = await asyncio.gather(
                    stream.finish(), server.stop(), return_exceptions=True
                )
        if isinstance(finished, BaseException):
            with refused(StatusCode.UNAVAILABLE, "DRAINING"):
                raise finished
        async with unstarted(api) as again:
            await again.send(start=a_start(session.id, stream.draft_id))
            if (response := await again.next()).HasField("started"):
                finished = await again.finish()
            else:
                assert response.finished.message == finished
        assert not isinstance(finished, BaseException)
        assert (finished.content, finished.sequence) == ("text", 1)


class TestCaller:
    async def test_deadline(self, api: Api) -> None:
        """The stream ends, and the draft stays open, to be resumed."""
        session = await api.session()
        draft_id = an_id()
        async with unstarted(api, timeout=0.3) as stream:
            await stream.send(start=a_start(session.id, draft_id))
            await stream.next()
            await stream.write("before")
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await stream.until_error()
            assert error.value.code() is StatusCode.DEADLINE_EXCEEDED
        async with writing(api, session.id, draft_id) as again:
            await again.append(" and after")
            assert (await again.finish()).content == "before and after"

    async def test_credential_that_expires(
        self, start_server: Any, database: str, tenant: str, tmp_path: Path
    ) -> None:
        """UNAUTHENTICATED. A call with a new token resumes."""
        (tmp_path / "keys.json").write_bytes(key_set(KEY))
        address = (
            await start_server(database, **SETTINGS, jwks=str(tmp_path / "keys.json"))
        ).address
        async with Api(address, tenant, token=KEY.token()) as good:
            session = await good.session()
            token = KEY.token(exp=time.time() + 1.5)
            async with (
                Api(address, tenant, token=token) as short,
                writing(short, session.id) as stream,
            ):
                await stream.write("before")
                with refused(StatusCode.UNAUTHENTICATED, "CREDENTIAL_EXPIRED"):
                    await stream.until_error()
            async with writing(good, session.id, stream.draft_id) as again:
                await again.append(" and after")
                assert (await again.finish()).content == "before and after"

    async def test_stream_that_is_cancelled_while_text_is_written(self, api: Api) -> None:
        """The draft has a part of the text, from its beginning, and no half a character."""
        session = await api.session()
        text = "é日\U0001f600" * 400
        for number in range(10):
            async with writing(api, session.id) as stream:
                for start in range(0, len(text), 10):
                    await stream.append(text[start : start + 10])
                await asyncio.sleep(0.001 * number)
            draft = await get_draft(api, stream.draft_id)
            assert text.startswith(draft.content)
            assert draft.length == len(draft.content.encode()) >= stream.written
            async with writing(api, session.id, stream.draft_id) as again:
                await again.append(text, 0)
                assert (await again.finish()).content == text
