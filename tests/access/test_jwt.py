"""Authentication by JSON Web Token, and the key set that verifies tokens."""

import asyncio
import base64
import contextlib
import hmac
import json
import time
from collections.abc import AsyncIterator, Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import grpc
import jwt
import pytest
import pytest_asyncio
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from grpc import StatusCode
from grpc_health.v1 import health_pb2
from jwt.algorithms import ECAlgorithm
from support.authority import AUDIENCE, ISSUER, Key, KeyServer, key_set
from support.client import Api, refused
from test_list_messages import batches
from test_watch import watching

from chat_ticket.v1.chat_message_pb2 import ListChatMessagesRequest
from chat_ticket.v1.chat_session_pb2 import ListChatSessionsRequest
from chat_ticket_svc.access import jwks, jwt_authenticator
from chat_ticket_svc.config import ConfigurationError
from chat_ticket_svc.rpc import middleware

SETTINGS = {"auth": "jwt", "jwt_issuer": ISSUER, "jwt_audience": AUDIENCE}

# The server trusts ES256 tokens of this key and no others, where a test says nothing else.
KEY = Key()

NewApi = Callable[..., Api]


class Server:
    """A server that requires tokens, and its clients."""

    def __init__(self, address: str, stack: contextlib.AsyncExitStack):
        self.address = address
        self._stack = stack

    async def api(self, token: str, tenant: str = "") -> Api:
        return await self._stack.enter_async_context(Api(self.address, tenant, token=token))


@pytest_asyncio.fixture
async def start(start_server: Any, database: str) -> AsyncIterator[Callable[..., Any]]:
    """`await start(jwks=…)`: a server that requires tokens."""
    async with contextlib.AsyncExitStack() as stack:

        async def start(**settings: object) -> Server:
            api = await start_server(database, **{**SETTINGS, **settings})
            return Server(api.address, stack)

        yield start


@pytest_asyncio.fixture
async def server(start: Any, tmp_path: Path) -> Server:
    """A server whose key set is a file with KEY."""
    (tmp_path / "keys.json").write_bytes(key_set(KEY))
    return await start(jwks=str(tmp_path / "keys.json"))  # type: ignore[no-any-return]


async def listed(api: Api) -> Any:
    return await api.sessions.ListChatSessions(ListChatSessionsRequest())


class TestTenants:
    async def test_single_tenant_is_the_default(self, server: Server, tenant: str) -> None:
        """x-tenant-id is optional if the credential has exactly one tenant."""
        api = await server.api(KEY.token(tenants=[tenant]))
        assert (await api.session()).tenant_id == tenant
        named = await server.api(KEY.token(tenants=[tenant]), tenant)
        assert len((await listed(named)).sessions) == 1

    async def test_one_of_several_tenants_must_be_named(self, server: Server, tenant: str) -> None:
        """The server never guesses the tenant."""
        token = KEY.token(tenants=[tenant, f"{tenant} too"])
        with refused(StatusCode.UNAUTHENTICATED, "TENANT_REQUIRED"):
            await listed(await server.api(token))
        for name in (tenant, f"{tenant} too"):
            assert (await (await server.api(token, name)).session()).tenant_id == name

    async def test_all_tenants(self, server: Server, tenant: str) -> None:
        """ "*" allows every tenant, but x-tenant-id must name one."""
        token = KEY.token(tenants="*")
        assert (await (await server.api(token, tenant)).session()).tenant_id == tenant
        with refused(StatusCode.UNAUTHENTICATED, "TENANT_REQUIRED"):
            await listed(await server.api(token))

    async def test_star_in_a_list_is_the_name_of_a_tenant(self, server: Server) -> None:
        """Only "*" instead of the list allows all tenants."""
        token = KEY.token(tenants=["*"])
        with refused(StatusCode.PERMISSION_DENIED, "TENANT_NOT_ALLOWED"):
            await listed(await server.api(token, "acme"))

    async def test_another_tenant_is_denied(self, server: Server, tenant: str) -> None:
        """The error does not reveal whether that tenant or its session exists."""
        other = await server.api(KEY.token(), f"other {tenant}")
        session = await other.session()
        api = await server.api(KEY.token(tenants=[tenant]), other.tenant)
        nobody = await server.api(KEY.token(tenants=[tenant]), f"nobody {tenant}")
        texts = set()
        for denied in (api, nobody):
            with refused(StatusCode.PERMISSION_DENIED, "TENANT_NOT_ALLOWED") as refusal:
                await denied.message(session.id)
            texts.add(refusal.text)
            with refused(StatusCode.PERMISSION_DENIED, "TENANT_NOT_ALLOWED"):
                await batches(denied, session.id)
        assert len(texts) == 1
        [first] = await batches(other, session.id)
        assert not first.messages

    async def test_malformed_tenant_is_invalid(self, server: Server) -> None:
        """The error is the same as without authentication."""
        with refused(StatusCode.INVALID_ARGUMENT) as refusal:
            await listed(await server.api(KEY.token(), "t" * 256))
        assert list(refusal.fields) == ["x-tenant-id"]


def signed(header: dict[str, Any], claims: dict[str, Any], secret: bytes) -> str:
    """A token that no library would sign: an HMAC with any secret."""

    def encoded(value: bytes) -> str:
        return base64.urlsafe_b64encode(value).decode().rstrip("=")

    text = f"{encoded(json.dumps(header).encode())}.{encoded(json.dumps(claims).encode())}"
    return f"{text}.{encoded(hmac.digest(secret, text.encode(), sha256))}"


def by_other_key(**header: Any) -> str:
    """Signed with the forger's key, under the key id of KEY."""
    return jwt.encode(Key.claims(), Key().private, "ES256", headers={"kid": KEY.key_id, **header})


PUBLIC_PEM = KEY.private.public_key().public_bytes(
    serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
)
HEADER, CLAIMS, SIGNATURE = KEY.token().split(".")

FORGED = {
    "not a token": "nonsense",
    "empty": " ",
    "three dots": "...",
    "header is no object": "W10.e30.AA",
    "no signature": jwt.encode(Key.claims(), None, "none", headers={"kid": KEY.key_id}),
    "signature left out": KEY.token().rpartition(".")[0] + ".",
    "other key": by_other_key(),
    "own key in the header": by_other_key(jwk=Key().public),
    "own key server in the header": by_other_key(jku="http://127.0.0.1:1/keys"),
    "public key as a secret": signed({"alg": "HS256", "kid": KEY.key_id}, Key.claims(), PUBLIC_PEM),
    "HMAC that says it is ES256": signed(
        {"alg": "ES256", "kid": KEY.key_id}, Key.claims(), PUBLIC_PEM
    ),
    "other claims": f"{HEADER}.{KEY.token(tenants=['a']).split('.')[1]}.{SIGNATURE}",
    "unknown extension that must be understood": jwt.encode(
        Key.claims(), KEY.private, "ES256", headers={"kid": KEY.key_id, "crit": ["x"], "x": 1}
    ),
    "no key id": jwt.encode(Key.claims(), KEY.private, "ES256"),
    "unknown key id": jwt.encode(Key.claims(), KEY.private, "ES256", headers={"kid": "other"}),
    "key id that is no text": "eyJhbGciOiJFUzI1NiIsImtpZCI6W119" + f".{CLAIMS}.{SIGNATURE}",
    "other issuer": KEY.token(iss="https://other.example"),
    "no issuer": KEY.token(iss=None),
    "other audience": KEY.token(aud="other"),
    "no audience": KEY.token(aud=None),
    "never expires": KEY.token(exp=None),
    "expires at infinity": KEY.token(exp=float("inf")),
    "expiry that is no number": KEY.token(exp="tomorrow"),
    "not yet valid": KEY.token(nbf=int(time.time()) + 600),
    "no tenants": KEY.token(tenants=None),
    "empty list of tenants": KEY.token(tenants=[]),
    "tenants that are no list": KEY.token(tenants="acme"),
    "tenant that is no text": KEY.token(tenants=[1]),
    "tenant that is no tenant id": KEY.token(tenants=["acme", " a "]),
    "scope that is no text": KEY.token(scope=["read"]),
    "deep header": base64.urlsafe_b64encode(b"[" * 3000).decode() + ".e30.AA",
}


class TestForged:
    async def test_all_are_rejected_alike(self, server: Server, tenant: str) -> None:
        """The error does not reveal why a token is not valid."""
        told = set()
        for name, token in FORGED.items():
            print(name)  # shown when it is not refused
            api = await server.api(token, tenant)
            with refused(StatusCode.UNAUTHENTICATED, "CREDENTIAL_INVALID") as refusal:
                await api.session()
            told.add((refusal.text, str(refusal.details)))
            with refused(StatusCode.UNAUTHENTICATED, "CREDENTIAL_INVALID"):
                await batches(api, "0197a000-0000-7000-8000-000000000001")
        assert len(told) == 1
        good = await server.api(KEY.token(), tenant)
        assert not (await listed(good)).sessions, "nothing was written"

    @pytest.mark.parametrize(
        ("key", "algorithm"),
        [
            (ec.generate_private_key(ec.SECP384R1()), "ES384"),
            (rsa.generate_private_key(65537, 2048), "RS512"),
        ],
        ids=["ES384", "RS512"],
    )
    async def test_algorithm_that_is_not_listed(
        self, start: Any, tmp_path: Path, key: Any, algorithm: str
    ) -> None:
        """A valid signature by a known key is rejected if its algorithm is not allowed."""
        kind = jwt.algorithms.get_default_algorithms()[algorithm]
        public = {**kind.to_jwk(key.public_key(), as_dict=True), "kid": "two", "alg": algorithm}
        (tmp_path / "keys.json").write_text(json.dumps({"keys": [public]}))
        token = jwt.encode(Key.claims(), key, algorithm, headers={"kid": "two"})
        server = await start(jwks=str(tmp_path / "keys.json"))
        with refused(StatusCode.UNAUTHENTICATED, "CREDENTIAL_INVALID"):
            await listed(await server.api(token, "acme"))
        listing = await start(jwks=str(tmp_path / "keys.json"), jwt_algorithms=f"ES256,{algorithm}")
        await listed(await listing.api(token, "acme"))

    @pytest.mark.filterwarnings("ignore::jwt.InsecureKeyLengthWarning")
    async def test_short_rsa_key(self, start: Any, tmp_path: Path) -> None:
        """Keys that can be factored are not accepted."""
        key = rsa.generate_private_key(65537, 1024)
        algorithm = jwt.algorithms.get_default_algorithms()["RS256"]
        public = {**algorithm.to_jwk(key.public_key(), as_dict=True), "kid": "short"}
        (tmp_path / "keys.json").write_text(json.dumps({"keys": [public, KEY.public]}))
        server = await start(jwks=str(tmp_path / "keys.json"))
        token = jwt.encode(Key.claims(), key, "RS256", headers={"kid": "short"})
        with refused(StatusCode.UNAUTHENTICATED, "CREDENTIAL_INVALID"):
            await listed(await server.api(token, "acme"))

    async def test_unusable_keys_beside_a_usable_one(self, start: Any, tmp_path: Path) -> None:
        """They are ignored, private keys too. The usable one works."""
        private = Key("private")
        secret = ECAlgorithm.to_jwk(private.private, as_dict=True)
        odd = [
            *(None, "x", [], {}, {"kid": "a"}, {"kty": "EC", "kid": "b"}),
            {**KEY.public, "kid": ["c"]},
            {**Key().public, "kid": "d", "alg": ["ES256"]},
            {**KEY.public, "kid": None},
            {**secret, "kid": private.key_id, "alg": "ES256"},
        ]
        (tmp_path / "keys.json").write_text(json.dumps({"keys": [*odd, KEY.public]}))
        server = await start(jwks=str(tmp_path / "keys.json"))
        await listed(await server.api(KEY.token(), "acme"))
        with refused(StatusCode.UNAUTHENTICATED, "CREDENTIAL_INVALID"):
            await listed(await server.api(private.token(), "acme"))

    async def test_request_is_not_parsed_before_authentication(
        self, start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Parsing takes memory and time: 4 KiB on the wire can become two million messages."""
        parsed = []
        tolerant = middleware._safe_deserializer

        def counting(deserialize: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
            return lambda data: (parsed.append(data), tolerant(deserialize)(data))[1]

        monkeypatch.setattr(middleware, "_safe_deserializer", counting)
        (tmp_path / "keys.json").write_bytes(key_set(KEY))
        server = await start(jwks=str(tmp_path / "keys.json"))
        request = ListChatMessagesRequest(session_id="0197a000-0000-7000-8000-000000000001")
        nobody = await server.api("", "acme")
        with refused(StatusCode.UNAUTHENTICATED, "CREDENTIAL_REQUIRED"):
            await listed(nobody)
        with refused(StatusCode.UNAUTHENTICATED, "CREDENTIAL_REQUIRED"):
            await nobody.messages.ListChatMessages(request).read()
        assert not parsed
        api = await server.api(KEY.token(), "acme")
        await listed(api)
        with refused(StatusCode.NOT_FOUND):
            await api.messages.ListChatMessages(request).read()
        assert parsed == [b"", request.SerializeToString()]

    async def test_key_for_encryption(self, start: Any, tmp_path: Path) -> None:
        """A key published for another use is not accepted for signatures."""
        key = Key("two", use="enc")
        (tmp_path / "keys.json").write_bytes(key_set(KEY, key))
        server = await start(jwks=str(tmp_path / "keys.json"))
        with refused(StatusCode.UNAUTHENTICATED, "CREDENTIAL_INVALID"):
            await listed(await server.api(key.token(), "acme"))

    async def test_expired_token_has_a_reason_of_its_own(self, server: Server) -> None:
        """The caller learns that it needs a new token."""
        with refused(StatusCode.UNAUTHENTICATED, "CREDENTIAL_EXPIRED"):
            await listed(await server.api(KEY.token(exp=int(time.time()) - 1), "acme"))

    async def test_cached_token_expires(self, server: Server) -> None:
        """On time, whenever its signature was verified."""
        api = await server.api(KEY.token(exp=int(time.time()) + 2), "acme")
        await listed(api)
        await asyncio.sleep(2.1)
        with refused(StatusCode.UNAUTHENTICATED, "CREDENTIAL_EXPIRED"):
            await listed(api)

    async def test_verified_tokens_are_cached(
        self, server: Server, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The signature is verified once, and the size of the cache is bounded."""
        checked = []
        decode = jwt.decode
        monkeypatch.setattr(
            jwt_authenticator.jwt,
            "decode",
            lambda *args, **kw: (checked.append(args[0]), decode(*args, **kw))[1],
        )
        monkeypatch.setattr(jwt_authenticator, "MAX_CACHED_TOKENS", 2)
        one, two, three = (KEY.token(n=n) for n in range(3))
        for token in (one, one, two, one, three, three, one):
            await listed(await server.api(token, "acme"))
        assert checked == [one, two, three, one]

    async def test_forged_expired_token_is_invalid(self, server: Server) -> None:
        """The signature is verified before the expiry."""
        token = Key().token(exp=int(time.time()) - 1)
        with refused(StatusCode.UNAUTHENTICATED, "CREDENTIAL_INVALID"):
            await listed(await server.api(token, "acme"))

    @pytest.mark.parametrize("exp", [10**12, 10**30, 4102444800.5])
    async def test_distant_expiry_is_valid(self, server: Server, tenant: str, exp: float) -> None:
        """For streams too."""
        api = await server.api(KEY.token(exp=exp), tenant)
        session = await api.session()
        async with watching(api, session.id) as watcher:
            await watcher.next()

    async def test_no_credential(self, server: Server) -> None:
        """A call without a token is rejected, whatever tenant it names."""
        with refused(StatusCode.UNAUTHENTICATED, "CREDENTIAL_REQUIRED"):
            await listed(await server.api("", "acme"))

    @pytest.mark.parametrize(
        "values", [[f"Basic {KEY.token()}"], [KEY.token()], [f"Bearer {KEY.token()}"] * 2]
    )
    async def test_not_one_bearer_token(self, server: Server, values: list[str]) -> None:
        """A different scheme, no scheme, or two tokens."""
        api = await server.api("", "acme")
        metadata = [("x-tenant-id", "acme"), *(("authorization", value) for value in values)]
        call = api.channel.unary_unary("/chat_ticket.v1.ChatSessionService/ListChatSessions")
        with refused(StatusCode.UNAUTHENTICATED, "CREDENTIAL_INVALID"):
            await call(b"", metadata=metadata)

    async def test_scheme_in_any_case(self, server: Server) -> None:
        """RFC 9110: the scheme is case-insensitive."""
        api = await server.api("", "")
        metadata = [("x-tenant-id", "acme"), ("authorization", f"bearer  {KEY.token()}")]
        call = api.channel.unary_unary("/chat_ticket.v1.ChatSessionService/ListChatSessions")
        await call(b"", metadata=metadata)

    async def test_health_needs_no_credential(self, server: Server) -> None:
        """Health probes have no credential."""
        api = await server.api("")
        await api.health.Check(health_pb2.HealthCheckRequest())


class TestStreams:
    async def test_watch_ends_when_its_credential_expires(
        self, server: Server, tenant: str
    ) -> None:
        """With UNAUTHENTICATED, after the history. A call with a new token resumes from there."""
        api = await server.api(KEY.token(), tenant)
        session = await api.session()
        await api.message(session.id)
        short = await server.api(KEY.token(exp=time.time() + 1.5), tenant)
        async with watching(short, session.id) as watcher:
            while "caught_up" not in watcher.kinds:
                await watcher.next()
            with refused(StatusCode.UNAUTHENTICATED, "CREDENTIAL_EXPIRED"):
                async with asyncio.timeout(10):
                    await watcher.next()
        await api.message(session.id)
        async with watching(api, session.id, watcher.revision) as resumed:
            while "caught_up" not in resumed.kinds:
                await resumed.next()
        assert resumed.created == [2]

    async def test_list_ends_when_its_credential_expires(self, server: Server, tenant: str) -> None:
        """Even if the stream waits for its reader."""
        api = await server.api(KEY.token(), tenant)
        session = await api.session()
        for _ in range(4):
            await asyncio.gather(*(api.message(session.id, "x" * 262_144) for _ in range(10)))
        short = await server.api(KEY.token(exp=time.time() + 1.5), tenant)
        call = short.messages.ListChatMessages(ListChatMessagesRequest(session_id=session.id))
        await call.read()
        await asyncio.sleep(2)
        with refused(StatusCode.UNAUTHENTICATED, "CREDENTIAL_EXPIRED"):
            while await call.read() is not grpc.aio.EOF:
                pass


class TestKeys:
    """The key set at a URL or in a file. The intervals are shortened."""

    @pytest.fixture(autouse=True)
    def _short_intervals(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(jwks, "COOLDOWN_SECONDS", 0.1)
        monkeypatch.setattr(jwks, "REFRESH_SECONDS", 0.5)
        monkeypatch.setattr(jwks, "FETCH_TIMEOUT_SECONDS", 2)

    @pytest_asyncio.fixture
    async def keys(self) -> AsyncIterator[KeyServer]:
        async with KeyServer(KEY).running() as keys:
            yield keys

    async def accepts(self, server: Server, key: Key) -> bool:
        try:
            await listed(await server.api(key.token(), "acme"))
        except grpc.aio.AioRpcError as error:
            assert error.code() is StatusCode.UNAUTHENTICATED
            return False
        return True

    async def until(self, server: Server, key: Key, accepted: bool) -> None:
        async with asyncio.timeout(10):
            while await self.accepts(server, key) is not accepted:
                await asyncio.sleep(0.05)

    async def test_keys_rotate_at_a_url(self, start: Any, keys: KeyServer) -> None:
        """A new key is fetched when a token names it. A withdrawn key expires."""
        server = await start(jwks=keys.url)
        assert await self.accepts(server, KEY)
        new = Key("new")
        keys.body = key_set(KEY, new)
        await asyncio.sleep(0.3)
        assert await self.accepts(server, new), "by the first call that needs it"
        assert await self.accepts(server, KEY)
        keys.body = key_set(new)
        await self.until(server, KEY, False)
        assert await self.accepts(server, new)

    async def test_cached_token_depends_on_its_key(self, start: Any, keys: KeyServer) -> None:
        """It is rejected once its key is withdrawn, or replaced under the same id."""
        server = await start(jwks=keys.url)
        token = KEY.token()
        api = await server.api(token, "acme")
        await listed(api)
        keys.body = key_set(Key(KEY.key_id))
        async with asyncio.timeout(10):
            with contextlib.suppress(grpc.aio.AioRpcError):
                while await listed(api) is not None:
                    await asyncio.sleep(0.05)
        with refused(StatusCode.UNAUTHENTICATED, "CREDENTIAL_INVALID"):
            await listed(api)

    async def test_keys_rotate_in_a_file(self, start: Any, tmp_path: Path) -> None:
        """In the same way as at a URL."""
        path = tmp_path / "keys.json"
        path.write_bytes(key_set(KEY))
        server = await start(jwks=str(path))
        new = Key("new")
        path.write_bytes(key_set(new))
        await asyncio.sleep(0.3)
        assert await self.accepts(server, new)
        assert not await self.accepts(server, KEY)

    async def test_unknown_key_ids_do_not_hammer_the_key_server(
        self, start: Any, keys: KeyServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Any number of tokens with unknown key ids cause a single fetch."""
        monkeypatch.setattr(jwks, "COOLDOWN_SECONDS", 30)
        monkeypatch.setattr(jwks, "REFRESH_SECONDS", 30)
        server = await start(jwks=keys.url)
        assert keys.requests == 1
        api = await server.api("", "acme")
        call = api.channel.unary_unary("/chat_ticket.v1.ChatSessionService/ListChatSessions")

        async def forged(number: int) -> None:
            token = jwt.encode(Key.claims(), KEY.private, "ES256", headers={"kid": str(number)})
            with refused(StatusCode.UNAUTHENTICATED, "CREDENTIAL_INVALID"):
                await call(b"", metadata=[("authorization", f"Bearer {token}")])

        await asyncio.gather(*(forged(number) for number in range(200)))
        assert keys.requests == 1
        monkeypatch.setattr(jwks, "COOLDOWN_SECONDS", 0)
        keys.answering.clear()
        waiting = asyncio.gather(*(forged(number) for number in range(50)))
        async with asyncio.timeout(10):
            while keys.requests < 2:
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)
        assert keys.requests == 2, "one for all who wait"
        monkeypatch.setattr(jwks, "COOLDOWN_SECONDS", 30)
        keys.answering.set()
        await waiting
        assert keys.requests == 2

    async def test_proxy_is_not_used_over_http(
        self, start: Any, keys: KeyServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Without TLS a proxy could replace the keys with its own."""
        forger = Key()
        async with KeyServer(forger).running() as proxy:
            for name in ("HTTP_PROXY", "ALL_PROXY"):  # gRPC's own clients read the lower case
                monkeypatch.setenv(name, proxy.url)
            for name in ("NO_PROXY", "no_proxy"):
                monkeypatch.delenv(name, raising=False)
            server = await start(jwks=keys.url)
            assert await self.accepts(server, KEY)
            assert not await self.accepts(server, forger)
            assert not proxy.requests

    async def test_slow_key_server_does_not_delay_known_keys(
        self, start: Any, keys: KeyServer
    ) -> None:
        """Fetches run in the background. Calls that need one wait for a bounded time."""
        server = await start(jwks=keys.url)
        keys.answering.clear()
        await asyncio.sleep(0.3)
        unknown = asyncio.create_task(self.accepts(server, Key("unknown")))
        for _ in range(20):
            assert await self.accepts(server, KEY)
        assert not unknown.done()
        async with asyncio.timeout(10):
            assert not await unknown

    async def test_cancelled_caller_does_not_cancel_the_fetch(
        self, start: Any, keys: KeyServer
    ) -> None:
        """Other callers that wait for the same fetch get their key."""
        server = await start(jwks=keys.url)
        new = Key("new")
        keys.body = key_set(KEY, new)
        await asyncio.sleep(0.2)
        keys.answering.clear()
        asked = keys.requests
        leaving, staying = [await server.api(new.token(), "acme") for _ in range(2)]
        leaves = leaving.sessions.ListChatSessions(ListChatSessionsRequest())
        stays = asyncio.create_task(listed(staying))
        while keys.requests == asked:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)
        leaves.cancel()
        await asyncio.sleep(0.2)
        assert not stays.done()
        keys.answering.set()
        await stays

    async def test_last_keys_stay_when_a_fetch_fails(
        self, start: Any, keys: KeyServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Whatever the server answers. The fetch is repeated."""
        server = await start(jwks=keys.url)
        monkeypatch.setattr(jwks, "REFRESH_SECONDS", 0.1)
        monkeypatch.setattr(jwks, "COOLDOWN_SECONDS", 0)
        good_head = keys.head
        other = key_set(Key("other"))
        broken = [
            (good_head, b"{"),
            (good_head, b'{"keys": []}'),
            (good_head, b"[]"),
            (good_head, b'{"keys": [{"kty": "EC", "kid": "one"}]}'),
            (b"HTTP/1.1 500 No\r\nConnection: close\r\n", other),
            (f"HTTP/1.1 302 F\r\nLocation: {keys.url}/elsewhere\r\n".encode(), other),
            (good_head, other.ljust(1024 * 1024 + 1)),
        ]
        for keys.head, keys.body in broken:
            asked = keys.requests
            async with asyncio.timeout(10):
                while keys.requests < asked + 2:
                    await asyncio.sleep(0.05)
            assert await self.accepts(server, KEY), keys.body[:50]
        new = Key("new")
        keys.head, keys.body = good_head, key_set(new)
        await self.until(server, new, True)

    async def test_key_server_that_is_down_at_start(self, start: Any, keys: KeyServer) -> None:
        """Calls fail with UNAVAILABLE until the keys are fetched."""
        good_body, keys.body = keys.body, b"not yet"
        server = await start(jwks=keys.url)
        with refused(StatusCode.UNAVAILABLE, "KEYS_UNAVAILABLE") as refusal:
            await listed(await server.api(KEY.token(), "acme"))
        assert "RetryInfo" in refusal.details
        keys.body = good_body
        async with asyncio.timeout(10):
            while True:
                with contextlib.suppress(grpc.aio.AioRpcError):
                    await listed(await server.api(KEY.token(), "acme"))
                    break
                await asyncio.sleep(0.05)

    @pytest.mark.parametrize("content", [None, "", "{}", '{"keys": []}', '{"keys": [{}]}'])
    async def test_file_without_keys_is_a_configuration_error(
        self, start: Any, tmp_path: Path, content: str | None
    ) -> None:
        """The server does not start."""
        path = tmp_path / "keys.json"
        if content is not None:
            path.write_text(content)
        with pytest.raises(ConfigurationError, match="CHAT_TICKET_JWKS"):
            await start(jwks=str(path))
