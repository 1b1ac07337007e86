"""Drafts through the API: writing one from its start to its finish."""

from support.client import Api
from support.drafts import COMPLETE, list_drafts, writing
from support.messages import ASSISTANT, get_message


class TestWrite:
    async def test_draft_becomes_a_message_of_its_id(self, api: Api) -> None:
        """The responses are `started`, `written` and `finished`, and the stream ends with OK."""
        session = await api.session()
        async with writing(api, session.id) as stream:
            assert (stream.offset, stream.revision) == (0, 0)
            await stream.write("Hello")
            await stream.append(", ")
            await stream.append("world")
            message = await stream.finish()
        assert stream.written == len("Hello, world"), "all was acknowledged before the finish"
        assert (message.id, message.session_id) == (stream.draft_id, session.id)
        assert (message.content, message.role) == ("Hello, world", ASSISTANT)
        assert (message.state, message.sequence, message.revision) == (COMPLETE, 1, 1)
        assert await get_message(api, message.id) == message
        assert await list_drafts(api, session.id) == []
