"""Authentication by JSON Web Token, and the key set that verifies tokens."""

import asyncio
import base64
import hmac
import json
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import grpc
import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from grpc import StatusCode
from grpc_health.v1 import health_pb2
from jwt.algorithms import ECAlgorithm
from support.authority import Key, key_set
from support.client import refused
from support.jwt_server import KEY, JwtServer
from support.messages import batches
from support.sessions import list_sessions
from support.watching import watching

from chat_ticket.v1.chat_message_pb2 import ListChatMessagesRequest
from chat_ticket_svc.access import jwt_authenticator
from chat_ticket_svc.rpc import middleware


class TestTenants:
    async def test_single_tenant_is_the_default(self, jwt_server: JwtServer, tenant: str) -> None:
        """x-tenant-id is optional if the credential has exactly one tenant."""
        api = await jwt_server.api(KEY.token(tenants=[tenant]))
        assert (await api.session()).tenant_id == tenant
        named = await jwt_server.api(KEY.token(tenants=[tenant]), tenant)
        assert len((await list_sessions(named)).sessions) == 1

    async def test_one_of_several_tenants_must_be_named(
        self, jwt_server: JwtServer, tenant: str
    ) -> None:
        """The server never guesses the tenant."""
        token = KEY.token(tenants=[tenant, f"{tenant} too"])
        with refused(StatusCode.UNAUTHENTICATED, "TENANT_REQUIRED"):
            await list_sessions(await jwt_server.api(token))
        for name in (tenant, f"{tenant} too"):
            assert (await (await jwt_server.api(token, name)).session()).tenant_id == name

    async def test_all_tenants(self, jwt_server: JwtServer, tenant: str) -> None:
        """ "*" allows every tenant, but x-tenant-id must name one."""
        token = KEY.token(tenants="*")
        assert (await (await jwt_server.api(token, tenant)).session()).tenant_id == tenant
        with refused(StatusCode.UNAUTHENTICATED, "TENANT_REQUIRED"):
            await list_sessions(await jwt_server.api(token))

    async def test_star_in_a_list_is_the_name_of_a_tenant(self, jwt_server: JwtServer) -> None:
        """Only "*" instead of the list allows all tenants."""
        token = KEY.token(tenants=["*"])
        with refused(StatusCode.PERMISSION_DENIED, "TENANT_NOT_ALLOWED"):
            await list_sessions(await jwt_server.api(token, "acme"))

    async def test_another_tenant_is_denied(self, jwt_server: JwtServer, tenant: str) -> None:
        """The error does not reveal whether that tenant or its session exists."""
        other = await jwt_server.api(KEY.token(), f"other {tenant}")
        session = await other.session()
        api = await jwt_server.api(KEY.token(tenants=[tenant]), other.tenant)
        nobody = await jwt_server.api(KEY.token(tenants=[tenant]), f"nobody {tenant}")
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

    async def test_malformed_tenant_is_invalid(self, jwt_server: JwtServer) -> None:
        """The error is the same as without authentication."""
        with refused(StatusCode.INVALID_ARGUMENT) as refusal:
            await list_sessions(await jwt_server.api(KEY.token(), "t" * 256))
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
    "scope that is neither text nor a list of texts": KEY.token(scope=["read", 1]),
    "deep header": base64.urlsafe_b64encode(b"[" * 3000).decode() + ".e30.AA",
}


class TestForged:
    async def test_all_are_rejected_alike(self, jwt_server: JwtServer, tenant: str) -> None:
        """The error does not reveal why a token is not valid."""
        errors = set()
        for name, token in FORGED.items():
            print(name)  # shown when it is not rejected
            api = await jwt_server.api(token, tenant)
            with refused(StatusCode.UNAUTHENTICATED, "CREDENTIAL_INVALID") as refusal:
                await api.session()
            errors.add((refusal.text, str(refusal.details)))
            with refused(StatusCode.UNAUTHENTICATED, "CREDENTIAL_INVALID"):
                await batches(api, "0197a000-0000-7000-8000-000000000001")
        assert len(errors) == 1
        good = await jwt_server.api(KEY.token(), tenant)
        assert not (await list_sessions(good)).sessions, "nothing was written"

    @pytest.mark.parametrize(
        ("key", "algorithm"),
        [
            (ec.generate_private_key(ec.SECP384R1()), "ES384"),
            (rsa.generate_private_key(65537, 2048), "RS512"),
        ],
        ids=["ES384", "RS512"],
    )
    async def test_algorithm_that_is_not_listed(
        self, start_jwt_server: Any, tmp_path: Path, key: Any, algorithm: str
    ) -> None:
        """A valid signature by a known key is rejected if its algorithm is not allowed."""
        kind = jwt.algorithms.get_default_algorithms()[algorithm]
        public = {**kind.to_jwk(key.public_key(), as_dict=True), "kid": "two", "alg": algorithm}
        (tmp_path / "keys.json").write_text(json.dumps({"keys": [public]}))
        token = jwt.encode(Key.claims(), key, algorithm, headers={"kid": "two"})
        jwt_server = await start_jwt_server(jwks=str(tmp_path / "keys.json"))
        with refused(StatusCode.UNAUTHENTICATED, "CREDENTIAL_INVALID"):
            await list_sessions(await jwt_server.api(token, "acme"))
        listing = await start_jwt_server(
            jwks=str(tmp_path / "keys.json"), jwt_algorithms=f"ES256,{algorithm}"
        )
        await list_sessions(await listing.api(token, "acme"))

    @pytest.mark.filterwarnings("ignore::jwt.InsecureKeyLengthWarning")
    async def test_short_rsa_key(self, start_jwt_server: Any, tmp_path: Path) -> None:
        """Keys that can be factored are not accepted."""
        key = rsa.generate_private_key(65537, 1024)
        algorithm = jwt.algorithms.get_default_algorithms()["RS256"]
        public = {**algorithm.to_jwk(key.public_key(), as_dict=True), "kid": "short"}
        (tmp_path / "keys.json").write_text(json.dumps({"keys": [public, KEY.public]}))
        jwt_server = await start_jwt_server(jwks=str(tmp_path / "keys.json"))
        token = jwt.encode(Key.claims(), key, "RS256", headers={"kid": "short"})
        with refused(StatusCode.UNAUTHENTICATED, "CREDENTIAL_INVALID"):
            await list_sessions(await jwt_server.api(token, "acme"))

    async def test_unusable_keys_beside_a_usable_one(
        self, start_jwt_server: Any, tmp_path: Path
    ) -> None:
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
        jwt_server = await start_jwt_server(jwks=str(tmp_path / "keys.json"))
        await list_sessions(await jwt_server.api(KEY.token(), "acme"))
        with refused(StatusCode.UNAUTHENTICATED, "CREDENTIAL_INVALID"):
            await list_sessions(await jwt_server.api(private.token(), "acme"))

    async def test_request_is_not_parsed_before_authentication(
        self, start_jwt_server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Parsing takes memory and time: 4 KiB on the wire can become two million messages."""
        parsed = []
        tolerant = middleware._safe_deserializer

        def counting(deserialize: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
            return lambda data: (parsed.append(data), tolerant(deserialize)(data))[1]

        monkeypatch.setattr(middleware, "_safe_deserializer", counting)
        (tmp_path / "keys.json").write_bytes(key_set(KEY))
        jwt_server = await start_jwt_server(jwks=str(tmp_path / "keys.json"))
        request = ListChatMessagesRequest(session_id="0197a000-0000-7000-8000-000000000001")
        nobody = await jwt_server.api("", "acme")
        with refused(StatusCode.UNAUTHENTICATED, "CREDENTIAL_REQUIRED"):
            await list_sessions(nobody)
        with refused(StatusCode.UNAUTHENTICATED, "CREDENTIAL_REQUIRED"):
            await nobody.messages.ListChatMessages(request).read()
        assert not parsed
        api = await jwt_server.api(KEY.token(), "acme")
        await list_sessions(api)
        with refused(StatusCode.NOT_FOUND):
            await api.messages.ListChatMessages(request).read()
        assert parsed == [b"", request.SerializeToString()]

    async def test_key_for_encryption(self, start_jwt_server: Any, tmp_path: Path) -> None:
        """A key published for another use is not accepted for signatures."""
        key = Key("two", use="enc")
        (tmp_path / "keys.json").write_bytes(key_set(KEY, key))
        jwt_server = await start_jwt_server(jwks=str(tmp_path / "keys.json"))
        with refused(StatusCode.UNAUTHENTICATED, "CREDENTIAL_INVALID"):
            await list_sessions(await jwt_server.api(key.token(), "acme"))

    async def test_expired_token_has_a_reason_of_its_own(self, jwt_server: JwtServer) -> None:
        """The caller learns that it needs a new token."""
        with refused(StatusCode.UNAUTHENTICATED, "CREDENTIAL_EXPIRED"):
            await list_sessions(await jwt_server.api(KEY.token(exp=int(time.time()) - 1), "acme"))

    async def test_cached_token_expires(self, jwt_server: JwtServer) -> None:
        """On time, whenever its signature was verified."""
        end = int(time.time()) + 2
        api = await jwt_server.api(KEY.token(exp=end), "acme")
        await list_sessions(api)
        await asyncio.sleep(end + 0.1 - time.time())
        with refused(StatusCode.UNAUTHENTICATED, "CREDENTIAL_EXPIRED"):
            await list_sessions(api)

    async def test_verified_tokens_are_cached(
        self, jwt_server: JwtServer, monkeypatch: pytest.MonkeyPatch
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
            await list_sessions(await jwt_server.api(token, "acme"))
        assert checked == [one, two, three, one]

    async def test_forged_expired_token_is_invalid(self, jwt_server: JwtServer) -> None:
        """The signature is verified before the expiry."""
        token = Key().token(exp=int(time.time()) - 1)
        with refused(StatusCode.UNAUTHENTICATED, "CREDENTIAL_INVALID"):
            await list_sessions(await jwt_server.api(token, "acme"))

    @pytest.mark.parametrize("exp", [10**12, 10**30, 4102444800.5])
    async def test_distant_expiry_is_valid(
        self, jwt_server: JwtServer, tenant: str, exp: float
    ) -> None:
        """For streams too."""
        api = await jwt_server.api(KEY.token(exp=exp), tenant)
        session = await api.session()
        async with watching(api, session.id) as watcher:
            await watcher.next()

    async def test_no_credential(self, jwt_server: JwtServer) -> None:
        """A call without a token is rejected, with any tenant."""
        with refused(StatusCode.UNAUTHENTICATED, "CREDENTIAL_REQUIRED"):
            await list_sessions(await jwt_server.api("", "acme"))

    @pytest.mark.parametrize(
        "values", [[f"Basic {KEY.token()}"], [KEY.token()], [f"Bearer {KEY.token()}"] * 2]
    )
    async def test_not_one_bearer_token(self, jwt_server: JwtServer, values: list[str]) -> None:
        """A different scheme, no scheme, or two tokens."""
        api = await jwt_server.api("", "acme")
        metadata = [("x-tenant-id", "acme"), *(("authorization", value) for value in values)]
        call = api.channel.unary_unary("/chat_ticket.v1.ChatSessionService/ListChatSessions")
        with refused(StatusCode.UNAUTHENTICATED, "CREDENTIAL_INVALID"):
            await call(b"", metadata=metadata)

    async def test_scheme_in_any_case(self, jwt_server: JwtServer) -> None:
        """RFC 9110: the scheme is case-insensitive."""
        api = await jwt_server.api("", "")
        metadata = [("x-tenant-id", "acme"), ("authorization", f"bearer  {KEY.token()}")]
        call = api.channel.unary_unary("/chat_ticket.v1.ChatSessionService/ListChatSessions")
        await call(b"", metadata=metadata)

    async def test_health_needs_no_credential(self, jwt_server: JwtServer) -> None:
        """Health probes have no credential."""
        api = await jwt_server.api("")
        await api.health.Check(health_pb2.HealthCheckRequest())


class TestStreams:
    async def test_watch_ends_when_its_credential_expires(
        self, jwt_server: JwtServer, tenant: str
    ) -> None:
        """With UNAUTHENTICATED, after the history. A call with a new token resumes from there."""
        api = await jwt_server.api(KEY.token(), tenant)
        session = await api.session()
        await api.message(session.id)
        short = await jwt_server.api(KEY.token(exp=time.time() + 1.5), tenant)
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

    async def test_list_ends_when_its_credential_expires(
        self, jwt_server: JwtServer, tenant: str
    ) -> None:
        """Even if the stream waits for its reader."""
        api = await jwt_server.api(KEY.token(), tenant)
        session = await api.session()
        for _ in range(4):
            await asyncio.gather(*(api.message(session.id, "x" * 262_144) for _ in range(10)))
        short = await jwt_server.api(KEY.token(exp=time.time() + 1.5), tenant)
        call = short.messages.ListChatMessages(ListChatMessagesRequest(session_id=session.id))
        await call.read()
        await asyncio.sleep(2)
        with refused(StatusCode.UNAUTHENTICATED, "CREDENTIAL_EXPIRED"):
            while await call.read() is not grpc.aio.EOF:
                pass
