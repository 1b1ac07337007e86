"""What the log says of credentials: who called, and why a token was rejected."""

from collections.abc import Iterator

import jwt
import pytest
from grpc import StatusCode
from support.authority import AUDIENCE, ISSUER, Key
from support.client import Api, refused
from support.cluster import Cluster
from support.database import raise_on_insert
from support.process import ServerProcess, log_line, server_process
from support.secrets import leaks, secret
from support.sessions import list_sessions

KEY = Key("of-the-issuer")
TENANTS = "https://chat.example/tenants"


@pytest.fixture(scope="module")
def process(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server whose claims have names of their own, with a database that accepts no session."""
    own_database = cluster.create()
    raise_on_insert(own_database, "RAISE 'no'")
    settings = {
        **KEY.trusted(tmp_path_factory.mktemp("keys")),
        "auth": "jwt",
        "jwt_tenants_claim": TENANTS,
        "jwt_permissions_claim": "permissions",
        "jwt_subject_claim": "client_id",
    }
    variables = {f"CHAT_TICKET_{name.upper()}": value for name, value in settings.items()}
    with server_process(own_database, **variables) as process:
        process.wait_for("serving")
        yield process
    cluster.drop(own_database)


def token(**claims: object) -> str:
    """Of an issuer that names its claims as the server's settings do."""
    own = {TENANTS: ["acme"], "permissions": ["read", "write", "other"], "client_id": "bot-7"}
    return KEY.token(**{"tenants": None, "scope": None, **own, **claims})


async def test_the_subject_is_in_the_lines_of_its_calls(process: ServerProcess) -> None:
    """Of a call that succeeds, of one that it has no permission for, and of an error."""
    async with Api(process.address, "", token=token()) as api:
        await list_sessions(api)
        with refused(StatusCode.INTERNAL):
            await api.session()
    reader = token(permissions=["read"], client_id="reader\n" + "x" * 300)
    async with Api(process.address, "", token=reader) as api:
        with refused(StatusCode.PERMISSION_DENIED):
            await api.session()
    by_bot = {"subject": "bot-7", "tenant": "acme"}
    await log_line(process, "finished call", code="OK", **by_bot)
    await log_line(process, "finished call", code="INTERNAL", **by_bot)
    await log_line(process, "internal error", **by_bot)
    denied = await log_line(process, "finished call", code="PERMISSION_DENIED")
    assert denied["subject"].startswith("reader\\nxxx"), "escaped"
    assert len(denied["subject"]) <= 203, "bounded"


REJECTED = {
    "aud": (token(aud=["other", "x" * 300]), AUDIENCE, '["other", "xxx'),
    "iss": (token(iss="https://other.example\n"), ISSUER, "https://other.example\\n"),
    "exp": (token(exp=1000), "later than ", "1000"),
    "nbf": (token(nbf=10**10), "at most ", str(10**10)),
    TENANTS: (token(**{TENANTS: None}), 'a list of tenant ids, or "*"', "nothing"),
    "permissions": (
        token(permissions=[{"a": secret("permission")}]),
        "permissions: a list, or a text separated by spaces",
        "a list with something else",
    ),
    "signature": (
        jwt.encode(
            Key.claims(sub=secret("claim")),
            Key().private,
            headers={"kid": KEY.key_id},
            algorithm="ES256",
        ),
        "one by this key",
        "another",
    ),
    "alg": (
        jwt.encode(Key.claims(), secret("hmac") * 9, "HS256", headers={"kid": KEY.key_id}),
        "one of RS256, ES256, EdDSA, and the key's",
        "HS256",
    ),
    "kid": (Key("another-one").token(), "the id of a key in the key set", "another-one"),
    "token": (secret("token"), "a signed JSON Web Token", "DecodeError"),
}


@pytest.mark.parametrize("part", REJECTED)
async def test_the_log_says_why_a_token_is_rejected(process: ServerProcess, part: str) -> None:
    """The claim, what is expected and what is found, once in a while; the caller learns nothing."""
    rejected, expected, found = REJECTED[part]
    async with Api(process.address, "acme", token=rejected) as api:
        for _ in range(5):
            with refused(StatusCode.UNAUTHENTICATED) as refusal:
                await list_sessions(api)
    assert refusal.text == ("credential has expired" if part == "exp" else "token is not valid")
    line = await log_line(process, "credential rejected", part=part)  # one of five
    assert line["expected"].startswith(expected)
    assert line["found"].startswith(found)
    assert len(line["found"]) <= 203
    assert line.get("key_id") == (None if part in ("kid", "token") else KEY.key_id)
    assert line["level"] == "info"
    assert line["request_id"] == "of-a-test", "the client's own"
    assert not leaks(process.output)
    assert rejected not in process.output
