"""Errors that the writers of drafts provoke, with a secret in every text."""

import json

from chat_ticket.v1.chat_draft_pb2 import GetChatDraftRequest, StopChatDraftRequest
from chat_ticket_svc.store.drafts import MAX_OPEN_DRAFTS
from support.client import Api, an_id
from support.drafts import a_start, leave_draft, list_drafts, unstarted, writing
from support.provoked_errors import ServerOutput, a_secret_file
from support.secrets import secret


async def provoke_draft_errors(output: ServerOutput, api: Api) -> None:
    """Write drafts in every way that is refused, and leave one to the server."""
    bad = secret("value")
    session = await api.session()

    async def refused(reason: str, session_id: str, draft_id: str, **fields: object) -> None:
        async with unstarted(api) as stream:
            await stream.send(start=a_start(session_id, draft_id, **fields))
            await output.expect_error(reason, stream.until_error())

    await refused("INVALID_ARGUMENT", bad, bad, language_code=bad, metadata_json=f"{{{bad}")
    await refused("CHAT_SESSION_NOT_FOUND", an_id(), an_id(), metadata_json=json.dumps({bad: bad}))
    for call in (
        api.drafts.GetChatDraft(GetChatDraftRequest(draft_id=an_id())),
        api.drafts.StopChatDraft(StopChatDraftRequest(draft_id=an_id())),
    ):
        await output.expect_error("CHAT_DRAFT_NOT_FOUND", call)

    async with writing(api, session.id, metadata_json=json.dumps({bad: bad})) as stream:
        await stream.write(secret("text"))
        await refused("CHAT_DRAFT_ALREADY_EXISTS", (await api.session()).id, stream.draft_id)
        await refused("DRAFT_OPEN", session.id, an_id(), exclusive=True)
        await stream.append(secret("other"), offset=0)
        await output.expect_error("DRAFT_CONFLICT", stream.until_error())
    async with (
        writing(api, session.id, stream.draft_id) as before,
        writing(api, session.id, stream.draft_id) as stream,
    ):
        await before.append(secret("late"))
        await output.expect_error("DRAFT_TAKEN_OVER", before.until_error())
        await stream.append(secret("gap"), offset=9999)
        await output.expect_error("DRAFT_GAP", stream.until_error())
    async with writing(api, session.id) as stream:
        await stream.append(f"{bad}\0")
        await output.expect_error("INVALID_ARGUMENT", stream.until_error())
    async with writing(api, session.id) as stream:
        await stream.write(bad)
        file = a_secret_file(file_url=f"{bad}://{bad}", file_name=f"{bad}\n")
        await stream.send(finish={"metadata_json": bad, "attachments": [file]})
        await output.expect_error("INVALID_ARGUMENT", stream.until_error())
    while len(await list_drafts(api, session.id)) < MAX_OPEN_DRAFTS:
        await leave_draft(api, session.id, secret("text"))
    await refused("TOO_MANY_DRAFTS", session.id, an_id())
