"""Masks that name a label, as clients send them that write JSON."""

import asyncio

import pytest
from support.client import Api
from support.grpc_tools import BufCurl

UPDATE = "ChatSessionService/UpdateChatSession"


@pytest.fixture
def buf(api: Api, environment: dict[str, str]) -> BufCurl:
    return BufCurl(api.address, api.tenant, environment)


@pytest.mark.parametrize(
    ("path", "key"),
    [
        ("labels.plan", "plan"),
        ("labels.a1", "a1"),
        ("labels.crm.id", "crm.id"),
        ("labels.crmId", "crm_id"),
    ],
)
async def test_path_in_json_names_a_key(api: Api, buf: BufCurl, path: str, key: str) -> None:
    """Of words that begin with a letter, as the comment of the mask says."""
    session = await api.session(labels={"other": "x"})
    request = {"session": {"id": session.id, "labels": {key: "v"}}, "update_mask": path}
    [response] = await asyncio.to_thread(buf.call, UPDATE, request)
    assert dict(response.session.labels) == {"other": "x", key: "v"}


@pytest.mark.parametrize("path", ["labels.a-b", "labels.a/b", "labels.1a", "labels.a_b"])
async def test_client_has_no_path_for_other_keys(api: Api, buf: BufCurl, path: str) -> None:
    """It sends nothing. All labels can be replaced."""
    session = await api.session()
    labels = {path.removeprefix("labels."): "v"}
    request = {"session": {"id": session.id, "labels": labels}, "update_mask": path}
    with pytest.raises(AssertionError, match="contains invalid path"):
        await asyncio.to_thread(buf.call, UPDATE, request)
    request["update_mask"] = "labels"
    [response] = await asyncio.to_thread(buf.call, UPDATE, request)
    assert dict(response.session.labels) == labels
