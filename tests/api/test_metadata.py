"""The metadata of messages: a JSON object, kept without loss."""

import json
from decimal import Decimal

import pytest
from grpc import StatusCode
from support.client import Api, refused
from support.messages import KIB, set_metadata
from support.sessions import get_revision


class TestMetadata:
    @pytest.mark.parametrize(
        "text",
        [
            "{}",
            '{"n": 9007199254740993}',
            '{"n": 0.1000000000000000055511151231257827}',
            '{"n": -1.7e308, "m": 4.9e-324, "z": 0e5}',
            '{"a": "\\ud83d\\ude00 \\u00e9", "": [[[]]]}',
            '{"a": ' * 19 + "{}" + "}" * 19,
            '{"a": 0.' + "1" * 16383 + ', "b": 1.5e-300}',
        ],
    )
    async def test_object_is_stored_without_loss(self, api: Api, text: str) -> None:
        """Every digit of a number is kept: metadata is text, not doubles."""
        session = await api.session()
        stored = (await api.message(session.id, metadata_json=text)).metadata_json

        def parse(value: str) -> object:
            return json.loads(value, parse_float=Decimal, parse_int=Decimal)

        assert parse(stored) == parse(text)

    async def test_spacing_order_and_duplicates_are_normalized(self, api: Api) -> None:
        """It is stored as jsonb, as documented: of duplicate keys the last wins."""
        session = await api.session()
        message = await api.message(session.id, metadata_json='{"bb":1,"a":2,"bb":3}')
        assert message.metadata_json == '{"a": 2, "bb": 3}'

    async def test_absent_is_not_empty(self, api: Api) -> None:
        """No metadata is returned as an empty string, and an empty object as an object."""
        session = await api.session()
        assert (await api.message(session.id)).metadata_json == ""
        assert (await api.message(session.id, metadata_json="{}")).metadata_json == "{}"

    @pytest.mark.parametrize(
        ("text", "description"),
        [
            ("[]", "not a JSON object"),
            ("1", "not a JSON object"),
            ("null", "not a JSON object"),
            ("{", "not JSON"),
            ("{}x", "not JSON"),
            ("{'a': 1}", "not JSON"),
            ('{"a": NaN}', "NaN is not a JSON number"),
            ('{"a": -Infinity}', "-Infinity is not a JSON number"),
            ('{"a": 1e309}', "out of the range of a double"),
            ('{"a": 1e-400}', "out of the range of a double"),
            ('{"a": 1' + "0" * 400 + "}", "out of the range of a double"),
            ('{"a": "\\u0000"}', "NUL character or an unpaired surrogate"),
            ('{"\\u0000": 1, "\\u0000": 2}', "NUL character or an unpaired surrogate"),
            ('{"a": "\\ud800"}', "NUL character or an unpaired surrogate"),
            ('{"a": "\\u0000", "a": 1}', "NUL character or an unpaired surrogate"),
            ('{"a": {"b": "\\ud800"}, "a": 1}', "NUL character or an unpaired surrogate"),
            ('{"a": ' * 20 + "{}" + "}" * 20, "nested more than 20 levels deep"),
            ('{"a": ' * 24 + "[]" + "}" * 24, "nested more than 20 levels deep"),
            ('{"a": ' + "[" * 30_000, "nested more than 20 levels deep"),
            ('{"a": [' + "1e300," * 1000 + "0]}", "with all numbers written out"),
            ('{"a": 0e' + "9" * 4300 + "}", "out of the range of a double"),
            ('{"a": 0e-20000}', "out of the range of a double"),
            ('{"a": 0.' + "1" * 16384 + "}", "16,384 digits after the decimal point"),
            ('{"a": 1.' + "1" * 16100 + "e-300}", "16,400 digits after the decimal point"),
        ],
    )
    async def test_metadata_that_cannot_be_stored_is_rejected(
        self, api: Api, text: str, description: str
    ) -> None:
        """The error names the problem, and nothing is stored."""
        session = await api.session()
        with refused(StatusCode.INVALID_ARGUMENT) as refusal:
            await api.message(session.id, metadata_json=text)
        assert description in refusal.fields["message.metadata_json"]
        assert await get_revision(api, session.id) == 0

    async def test_limited_to_64_kib(self, api: Api) -> None:
        """At the limit it is stored, one more byte is rejected; blanks between tokens are free."""
        session = await api.session()
        text = json.dumps({"a": "x" * (64 * KIB - 9)})
        assert len(text) == 64 * KIB
        assert (await api.message(session.id, metadata_json=text)).metadata_json == text
        with refused(StatusCode.INVALID_ARGUMENT) as refusal:
            await api.message(session.id, metadata_json=text.replace("x", "xxx", 1))
        assert list(refusal.fields) == ["message.metadata_json"]
        spaced = text.replace("{", " { ").replace(":", "\n:\t") + " " * 99_999
        assert (await api.message(session.id, metadata_json=spaced)).metadata_json == text
        for blanks in ("", " " * 99_999):
            longer = (
                json.dumps({f"k{n:05}": 0 for n in range(6000)}, separators=(",", ":")) + blanks
            )
            with refused(StatusCode.INVALID_ARGUMENT) as refusal:
                await api.message(session.id, metadata_json=longer)
            assert "66,001 bytes" in refusal.fields["message.metadata_json"]

    @pytest.mark.parametrize(
        "text",
        [
            # 65,521 bytes, which jsonb writes with 13,103 blanks more.
            "{" + ",".join(f'"k{n:04}":0' for n in range(6552)) + "}",
            '{"a":[' + ",".join(["1e290"] * 220) + "]}",
            '{"a":[' + ",".join(["-1.5E-290"] * 210) + "]}",
            '{"a":[' + ",".join(["0"] * 32_764) + "]}",
            '{"a": "' + ": , " * 16_000 + '"}',
            '{"\\"":"' + "é\\n\\u0001" * 6000 + '"}',
        ],
        ids=["members", "numbers", "fractions", "elements", "blanks in strings", "escapes"],
    )
    async def test_what_is_returned_can_be_sent_back(self, api: Api, text: str) -> None:
        """At the limit, too: sending it back as it was returned changes nothing."""
        session = await api.session()
        message = await api.message(session.id, metadata_json=text)
        assert await set_metadata(api, message.id, message.metadata_json) == message
        again = await api.message(session.id, id=message.id, metadata_json=message.metadata_json)
        assert again == message

    async def test_number_written_differently_is_a_change(self, api: Api) -> None:
        """1 and 1.0 are equal as jsonb, and different as sent."""
        message = await api.message((await api.session()).id, metadata_json='{"a": 1.0}')
        changed = await set_metadata(api, message.id, '{"a": 1}')
        assert (changed.metadata_json, changed.revision) == ('{"a": 1}', 2)
