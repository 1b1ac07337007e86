"""Merge patches (RFC 7396) of the metadata of messages."""

import asyncio
import json
from decimal import Decimal
from typing import Any

import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from grpc import StatusCode
from support.client import Api, an_id, refused
from support.database import execute
from support.merge_patches import APPENDIX_A
from support.messages import KIB, get_message, merge_metadata
from support.sessions import get_revision
from support.watching import watching

from chat_ticket.v1 import resources_pb2 as r
from chat_ticket.v1.chat_message_pb2 import UpdateChatMessageRequest

# Metadata is an object, before and afterwards.
OF_OBJECTS = [case for case in APPENDIX_A if all(text.startswith("{") for text in case)]
# And more: what is merged is an object in both, everything else is replaced.
OTHER_CASES = [
    ('{"a":{"b":1,"c":{"d":2,"e":3}}}', '{"a":{"c":{"d":null}}}', '{"a":{"b":1,"c":{"e":3}}}'),
    ('{"a":[1,2]}', '{"a":{"b":null,"c":3}}', '{"a":{"c":3}}'),
    ('{"a":{"b":1}}', '{"a":[{"b":null}]}', '{"a":[{"b":null}]}'),
    ('{"a":{"b":1}}', '{"a":{"b":{"c":{"d":4}}}}', '{"a":{"b":{"c":{"d":4}}}}'),
    ('{"":1,"é":2}', '{"":null,"é":3,"😀":4}', '{"é":3,"😀":4}'),
    ('{"a":1}', '{"a":2,"a":null}', "{}"),
    ("", '{"a":1,"b":null}', '{"a":1}'),
    ("", '{"a":{"b":null}}', '{"a":{}}'),
]


def parsed(text: str) -> Any:
    return json.loads(text, parse_float=Decimal, parse_int=Decimal)


class TestMerge:
    @pytest.mark.parametrize(("metadata", "patch", "result"), OF_OBJECTS + OTHER_CASES)
    async def test_result(self, api: Api, metadata: str, patch: str, result: str) -> None:
        """It is the metadata with the members of the patch. One revision is taken."""
        session = await api.session()
        message = await api.message(session.id, metadata_json=metadata)
        merged = await merge_metadata(api, message.id, patch)
        assert parsed(merged.metadata_json) == parsed(result)
        assert (merged.revision, merged.etag) == (2, "2")
        assert await get_message(api, message.id) == merged
        assert await get_revision(api, session.id) == 2

    @pytest.mark.parametrize(
        "number",
        [
            "9007199254740993",
            "0.1000000000000000055511151231257827",
            "1.0",
            "-1.7e308",
            "4.9e-324",
            "1" + "0" * 308,
        ],
    )
    async def test_every_digit_is_kept(self, api: Api, number: str) -> None:
        """Of the metadata and of the patch."""
        session = await api.session()
        kept = f'{{"kept": {number}, "in": {{"kept": {number}}}}}'
        message = await api.message(session.id, metadata_json=kept)
        patch = f'{{"new": {number}, "in": {{"new": {number}}}}}'
        merged = parsed((await merge_metadata(api, message.id, patch)).metadata_json)
        for members in (merged, merged["in"]):
            assert members["kept"] == members["new"] == Decimal(number)
            assert str(members["kept"]) == str(members["new"])

    @pytest.mark.parametrize(
        ("metadata", "patch"),
        [
            ('{"a": 1.0, "b": {"c": null}}', '{"a": 1.0}'),
            ('{"a": 1.0, "b": {"c": null}}', '{"x": null, "b": {"d": null}}'),
            ('{"a": 1}', "{}"),
            ("{}", "{}"),
            ("{}", '{"a": null}'),
            ("", "{}"),
            ("", '{"a": null}'),
        ],
    )
    async def test_merge_that_changes_nothing(self, api: Api, metadata: str, patch: str) -> None:
        """It takes no revision. Metadata that is not there stays away."""
        session = await api.session()
        message = await api.message(session.id, metadata_json=metadata)
        assert await merge_metadata(api, message.id, patch) == message
        assert await get_message(api, message.id) == message
        assert await get_revision(api, session.id) == 1

    async def test_number_written_differently_is_a_change(self, api: Api) -> None:
        """1 and 1.0 are equal as jsonb, and different as sent."""
        message = await api.message((await api.session()).id, metadata_json='{"a": 1.0}')
        merged = await merge_metadata(api, message.id, '{"a": 1}')
        assert (merged.metadata_json, merged.revision) == ('{"a": 1}', 2)

    async def test_last_member_that_is_removed(self, api: Api) -> None:
        """An object without members is left, which is not the same as no metadata."""
        message = await api.message((await api.session()).id, metadata_json='{"a": 1}')
        assert (await merge_metadata(api, message.id, '{"a": null}')).metadata_json == "{}"

    async def test_only_metadata_changes(self, api: Api) -> None:
        """Watchers receive the message again."""
        session = await api.session()
        message = await api.message(session.id, metadata_json='{"a": 1}', language_code="de")
        async with watching(api, session.id) as watcher:
            await watcher.until("caught_up")
            merged = await merge_metadata(api, message.id, '{"b": 2}')
            event = await watcher.until("message_updated")
        assert event.message_updated == merged
        message.metadata_json, message.revision, message.etag = '{"a": 1, "b": 2}', 2, "2"
        assert merged == message

    async def test_two_services_lose_nothing(self, api: Api, another_server: Api) -> None:
        """A rating and a token count, merged at the same time, 200 times."""
        session = await api.session()
        message = await api.message(session.id, metadata_json='{"channel": "web"}')

        async def merge(of: Api, name: str) -> None:
            for n in range(1, 201):
                patch = {name: n, "log": {f"{name} {n}": n}}
                merged = json.loads(
                    (await merge_metadata(of, message.id, json.dumps(patch))).metadata_json
                )
                assert merged[name] == n

        await asyncio.gather(merge(api, "rating"), merge(another_server, "tokens"))
        merged = await get_message(api, message.id)
        log = {f"{name} {n}": n for name in ("rating", "tokens") for n in range(1, 201)}
        assert json.loads(merged.metadata_json) == {
            "channel": "web",
            "rating": 200,
            "tokens": 200,
            "log": log,
        }
        assert merged.revision == 401


class TestRefused:
    @pytest.mark.parametrize(
        ("patch", "description"),
        [
            ("[]", "not a JSON object"),
            ("null", "not a JSON object"),
            ('"bar"', "not a JSON object"),
            (" ", "not JSON"),
            ('{"a": NaN}', "NaN is not a JSON number"),
            ('{"a": 1e309}', "out of the range of a double"),
            ('{"a": "\\u0000"}', "NUL character or an unpaired surrogate"),
            ('{"a": ' * 20 + "{}" + "}" * 20, "nested more than 20 levels deep"),
            ('{"a": "' + "x" * 64 * KIB + '"}', "65,544 bytes"),
        ],
    )
    async def test_patch_that_is_no_metadata(self, api: Api, patch: str, description: str) -> None:
        """The error names the problem, and nothing changes."""
        session = await api.session()
        message = await api.message(session.id)
        with refused(StatusCode.INVALID_ARGUMENT) as refusal:
            await merge_metadata(api, message.id, patch)
        assert list(refusal.fields) == ["metadata_merge_json"]
        assert description in refusal.fields["metadata_merge_json"]
        assert await get_message(api, message.id) == message

    async def test_result_over_the_limit(self, api: Api) -> None:
        """The error says that it is the result. Up to the limit it is stored."""
        session = await api.session()
        message = await api.message(session.id, metadata_json=json.dumps({"a": "x" * 40 * KIB}))
        room = 64 * KIB - 40 * KIB - len('{"a":"","b":""}')
        for over in (1, 30 * KIB):
            with refused(StatusCode.INVALID_ARGUMENT) as refusal:
                await merge_metadata(api, message.id, json.dumps({"b": "y" * (room + over)}))
            [description] = refusal.fields.values()
            assert description.startswith(f"merged metadata: {64 * KIB + over:,} bytes")
            assert description.endswith("at most 65,536")
            assert [*refusal.fields] == ["metadata_merge_json"]
        assert await get_message(api, message.id) == message
        assert await get_revision(api, session.id) == 1
        await merge_metadata(api, message.id, json.dumps({"b": "y" * room}))

    async def test_deepest_patch_into_the_deepest_metadata(self, api: Api) -> None:
        """A merge makes nothing deeper."""
        deep = '{"a": ' * 19 + "{}" + "}" * 19
        message = await api.message((await api.session()).id, metadata_json=deep)
        merged = await merge_metadata(
            api, message.id, deep.replace('"a"', '"b"').replace("{}", "[]")
        )
        assert merged.revision == 2
        both = await merge_metadata(api, message.id, deep.replace("{}", '{"x": 1}'))
        assert both.revision == 3

    async def test_neither_mask_nor_patch(self, api: Api) -> None:
        """Both fields are named: one of them is required."""
        request = UpdateChatMessageRequest(message=r.ChatMessage(id=an_id(), metadata_json="{}"))
        with refused(StatusCode.INVALID_ARGUMENT) as refusal:
            await api.messages.UpdateChatMessage(request)
        text = "required: update_mask or metadata_merge_json"
        assert refusal.fields == {"update_mask": text, "metadata_merge_json": text}

    async def test_mask_and_patch(self, api: Api) -> None:
        """Which of them would win is nobody's guess. Every violation is listed."""
        message = await api.message((await api.session()).id)
        request = UpdateChatMessageRequest(
            message=r.ChatMessage(id=message.id, metadata_json="{}", etag="x"),
            update_mask=FieldMask(paths=["metadata_json"]),
            metadata_merge_json='{"a": 1}',
        )
        with refused(StatusCode.INVALID_ARGUMENT) as refusal:
            await api.messages.UpdateChatMessage(request)
        assert refusal.fields == {
            "update_mask": "not allowed with metadata_merge_json",
            "message.etag": "not an etag of this service",
        }
        assert await get_message(api, message.id) == message

    async def test_absent_message(self, api: Api, other: Api) -> None:
        """Is not found, as is another tenant's."""
        theirs = await other.message((await other.session()).id, metadata_json='{"a": 1}')
        for message_id in (an_id(), theirs.id):
            with refused(StatusCode.NOT_FOUND, "CHAT_MESSAGE_NOT_FOUND"):
                await merge_metadata(api, message_id, '{"b": 1}')
        assert await get_message(other, theirs.id) == theirs

    async def test_redacted_message(self, api: Api, database: str) -> None:
        """It takes no metadata any more, not even none."""
        session = await api.session()
        message = await api.message(session.id)
        execute(
            database,
            "UPDATE chat_messages SET redacted = true, content = '[redacted]'"
            f" WHERE id = '{message.id}'",
        )
        for patch in ('{"a": 1}', "{}"):
            with refused(StatusCode.FAILED_PRECONDITION, "CHAT_MESSAGE_REDACTED") as refusal:
                await merge_metadata(api, message.id, patch, etag="7", expected_revision=7)
            [violation] = refusal.details["PreconditionFailure"].violations
            assert violation.subject == f"chat_messages/{message.id}"
        assert await get_revision(api, session.id) == 1
