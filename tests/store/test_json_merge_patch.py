"""json_merge_patch(), which merges metadata, against RFC 7396."""

import pytest
from support.merge_patches import APPENDIX_A
from support.plain_rows import Rows

DIGITS = "9" * 400 + "." + "1" * 400
# What the RFC has no case for.
OTHERS = [
    (None, '{"a":1,"b":null,"c":{"d":null}}', '{"a":1,"c":{}}'),
    ('{"a":1}', "{}", '{"a":1}'),
    ('{"a":{"b":1,"c":2}}', '{"a":{"b":null}}', '{"a":{"c":2}}'),
    ('{"a":[1,null]}', '{"b":[null,{"c":null}]}', '{"a":[1,null],"b":[null,{"c":null}]}'),
    ('{"a":"null"}', '{"b":"null"}', '{"a":"null","b":"null"}'),
    ('{"":1," ":2}', '{"":null,"é🙂":3}', '{" ":2,"é🙂":3}'),
    (f'{{"a":{DIGITS}}}', '{"b":1.0}', f'{{"a":{DIGITS},"b":1.0}}'),
    ('{"a":1}', f'{{"a":{DIGITS},"b":1.500,"c":1e2}}', f'{{"a":{DIGITS},"b":1.500,"c":100}}'),
]


@pytest.mark.parametrize(("target", "patch", "expected"), [*APPENDIX_A, *OTHERS])
def test_merge(us: Rows, target: str | None, patch: str, expected: str) -> None:
    """Each case, to the digit: as text, since 1 and 1.0 are equal as jsonb."""
    row = us.connection.execute(
        "SELECT json_merge_patch(%s::jsonb, %s::jsonb)::text, %s::jsonb::text",
        [target, patch, expected],
    ).fetchone()
    assert row is not None
    assert row[0] == row[1]


def test_merge_is_as_deep_as_metadata_may_be(us: Rows) -> None:
    """Each level is a call of the function."""
    depth = 500

    def nested(inner: str) -> str:
        return '{"a":' * depth + inner + "}" * depth

    row = us.connection.execute(
        "SELECT json_merge_patch(%s::jsonb, %s::jsonb) = %s::jsonb",
        [nested('{"b":1}'), nested('{"c":2}'), nested('{"b":1,"c":2}')],
    ).fetchone()
    assert row == (True,)


def test_merge_finds_itself_whatever_the_search_path(us: Rows) -> None:
    """It calls itself where it is."""
    us.connection.execute("SET search_path = ''")
    row = us.connection.execute(
        """SELECT public.json_merge_patch('{"a":{"b":1}}', '{"a":{"c":{}}}')::text"""
    ).fetchone()
    assert row == ('{"a": {"b": 1, "c": {}}}',)
