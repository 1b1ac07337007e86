"""TLS: the server's certificate, and authentication by client certificate."""

import asyncio
import contextlib
import json
import ssl
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from grpc import StatusCode
from support.authority import Authority, Certificate, Key
from support.client import Api, refused
from support.sessions import list_sessions
from support.tools import needs_grpcurl
from support.watching import watching

from chat_ticket_svc.access import server_certificates
from chat_ticket_svc.config import ConfigurationError

ASSISTANT = "spiffe://example.org/ns/chat/assistant"

CALLERS = f"""
["{ASSISTANT}"]
tenants = "*"
permissions = ["read", "write"]

["billing.internal"]
tenants = ["acme"]
permissions = ["read"]
"""

CA = Authority()

NewServer = Callable[..., Any]


@pytest_asyncio.fixture
async def start(
    start_server: Any, database: str, tmp_path: Path
) -> AsyncIterator[Callable[..., Any]]:
    """`connect = await start(**settings)`: a server of this CA; then `await connect(caller, …)`."""
    async with contextlib.AsyncExitStack() as stack:

        async def start(**settings: object) -> Callable[..., Any]:
            (tmp_path / "authority.pem").write_bytes(CA.certificate)
            (tmp_path / "callers.toml").write_text(CALLERS)
            defaults = {
                "auth": "mtls",
                "tls_client_ca": str(tmp_path / "authority.pem"),
                "mtls_policy": str(tmp_path / "callers.toml"),
                **CA.server().write(tmp_path / "tls"),
            }
            address = (await start_server(database, **{**defaults, **settings})).address

            async def connect(
                caller: Certificate | None = None, tenant: str = "", token: str = ""
            ) -> Api:
                api = Api(address, tenant, token=token, credentials=CA.trusted_by(caller))
                return await stack.enter_async_context(api)

            return connect

        yield start


class TestCallers:
    async def test_spiffe_id(self, start: NewServer, tenant: str) -> None:
        """A listed caller may do what the policy grants, and nothing else."""
        connect = await start()
        api = await connect(CA.caller(uris=[ASSISTANT]), tenant)
        session = await api.session()
        with refused(StatusCode.PERMISSION_DENIED, "PERMISSION_REQUIRED") as refusal:
            await api.escalate(session.id)
        assert refusal.info.metadata["permission"] == "ticket"

    async def test_dns_name(self, start: NewServer) -> None:
        """Case does not matter. A single tenant is the default."""
        connect = await start()
        api = await connect(CA.caller(names=["something.else", "Billing.Internal"]))
        await list_sessions(api)
        with refused(StatusCode.PERMISSION_DENIED, "PERMISSION_REQUIRED"):
            await api.session()
        other = await connect(CA.caller(names=["billing.internal"]), "other")
        with refused(StatusCode.PERMISSION_DENIED, "TENANT_NOT_ALLOWED"):
            await list_sessions(other)

    @pytest.mark.parametrize(
        ("uris", "names"),
        [
            ((), ("localhost",)),
            ((), ()),
            ((f"{ASSISTANT}/",), ()),
            ((ASSISTANT.replace("assistant", "Assistant"),), ()),
            # RFC: a SPIFFE certificate has one URI.
            ((ASSISTANT, "spiffe://example.org/two"), ()),
            ((), (ASSISTANT,)),
            (("https://billing.internal",), ()),
            (("billing.internal",), ()),
            ((), ("*.internal",)),
            ((), ("evil.billing.internal",)),
            # gRPC reports a name only up to a NUL.
            ((), ("billing.internal\0.evil.com",)),
            ((f"{ASSISTANT}\0/evil",), ()),
        ],
    )
    async def test_certificate_without_a_listed_name(
        self, start: NewServer, uris: tuple[str, ...], names: tuple[str, ...]
    ) -> None:
        """A signature by the CA is not enough, nor is a listed name of another type."""
        connect = await start()
        with refused(StatusCode.UNAUTHENTICATED, "CREDENTIAL_INVALID"):
            await list_sessions(await connect(CA.caller(uris=uris, names=names), "acme"))

    @pytest.mark.parametrize("caller", ["none", "of another CA", "expired"])
    async def test_connection_is_rejected(self, start: NewServer, caller: str) -> None:
        """Without a certificate of the CA the TLS handshake fails."""
        certificate = {
            "none": None,
            "of another CA": Authority().caller(uris=[ASSISTANT]),
            "expired": CA.caller(uris=[ASSISTANT], seconds=-60),
        }[caller]
        api = await (await start())(certificate, "acme")
        with pytest.raises(Exception, match="UNAVAILABLE"):
            await list_sessions(api)

    async def test_calls_end_when_the_certificate_expires(
        self, start: NewServer, tenant: str
    ) -> None:
        """On an open connection too: streams end at once, and new calls are rejected."""
        api = await (await start())(CA.caller(uris=[ASSISTANT], seconds=3), tenant)
        session = await api.session()
        async with watching(api, session.id) as watcher:
            with refused(StatusCode.UNAUTHENTICATED, "CREDENTIAL_EXPIRED"):
                async with asyncio.timeout(10):
                    while True:
                        await watcher.next()
        with refused(StatusCode.UNAUTHENTICATED, "CREDENTIAL_EXPIRED"):
            await list_sessions(api)


class TestBoth:
    async def test_a_call_needs_both_and_may_do_what_both_allow(
        self, start: NewServer, tmp_path: Path
    ) -> None:
        """The certificate allows reads and writes for all tenants, and the token less."""
        key = Key()
        connect = await start(auth="jwt,mtls", **key.trusted(tmp_path))
        assistant = CA.caller(uris=[ASSISTANT])
        with refused(StatusCode.UNAUTHENTICATED, "CREDENTIAL_REQUIRED"):
            await list_sessions(await connect(assistant, "acme"))
        with pytest.raises(Exception, match="UNAVAILABLE"):
            await list_sessions(await connect(None, "acme", key.token()))
        with refused(StatusCode.UNAUTHENTICATED, "CREDENTIAL_INVALID"):
            await list_sessions(await connect(CA.caller(names=["nobody"]), "acme", key.token()))
        api = await connect(assistant, "", key.token(tenants=["acme"], scope="read ticket"))
        await list_sessions(api)
        with refused(StatusCode.PERMISSION_DENIED, "PERMISSION_REQUIRED"):
            await api.session()
        with refused(StatusCode.PERMISSION_DENIED, "PERMISSION_REQUIRED"):
            await api.escalate("0197a000-0000-7000-8000-000000000001")
        narrow = CA.caller(names=["billing.internal"])
        with refused(StatusCode.PERMISSION_DENIED, "TENANT_NOT_ALLOWED"):
            await list_sessions(await connect(narrow, "other", key.token()))
        for tenant in ("acme", "other"):
            with refused(StatusCode.PERMISSION_DENIED, "TENANT_NOT_ALLOWED"):
                await list_sessions(await connect(narrow, tenant, key.token(tenants=["other"])))

    @needs_grpcurl
    async def test_grpcurl_with_both(self, start: NewServer, tmp_path: Path) -> None:
        """A third-party client works with the options that `make run` prints."""
        key = Key()
        connect = await start(auth="jwt,mtls", **key.trusted(tmp_path))
        caller = CA.caller(uris=[ASSISTANT]).write(tmp_path / "caller")
        process = await asyncio.create_subprocess_exec(
            str(Path(sys.executable).with_name("grpcurl")),
            *("-cacert", str(tmp_path / "authority.pem")),
            *("-cert", caller["tls_certificate"], "-key", caller["tls_key"]),
            *("-H", f"authorization: Bearer {key.token(tenants=['acme'])}"),
            (await connect()).address,
            "chat_ticket.v1.ChatSessionService/CreateChatSession",
            stdout=asyncio.subprocess.PIPE,
        )
        output, _ = await process.communicate()
        assert json.loads(output)["session"]["tenant_id"] == "acme"


async def shown(address: str) -> bytes:
    """The certificate that a server presents to a new connection, in DER."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    host, port = address.split(":")
    _, writer = await asyncio.open_connection(host, int(port), ssl=context)
    certificate: bytes = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.close()
    return certificate


class TestServer:
    """The intervals are shortened."""

    @pytest.fixture(autouse=True)
    def _short_intervals(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(server_certificates, "RELOAD_SECONDS", 0.1)

    async def until_shown(self, address: str, certificate: Certificate) -> None:
        expected = ssl.PEM_cert_to_DER_cert(certificate.certificate.decode())
        async with asyncio.timeout(10):
            while await shown(address) != expected:
                await asyncio.sleep(0.05)

    async def test_tls_with_tokens(self, start: NewServer, tmp_path: Path, tenant: str) -> None:
        """Without mTLS callers need no certificate."""
        key = Key()
        connect = await start(auth="jwt", **key.trusted(tmp_path))
        await (await connect(None, tenant, key.token())).session()

    async def test_renewed_certificate_is_served_without_restart(
        self,
        start: NewServer,
        tmp_path: Path,
        tenant: str,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        """New connections get the new one. An unusable one is logged, and the old one stays."""
        first = CA.server()
        connect = await start(**first.write(tmp_path / "tls"))
        api = await connect(CA.caller(uris=[ASSISTANT]), tenant)
        session = await api.session()
        second = CA.server()
        async with watching(api, session.id) as watcher:
            second.write(tmp_path / "tls")
            await self.until_shown(api.address, second)
            await api.message(session.id)
            while not watcher.created:
                await watcher.next()
        (tmp_path / "tls" / "key.pem").unlink()
        expired = CA.server(seconds=-60)
        for broken in (
            None,
            Certificate(certificate=b"nonsense", key=second.key),
            Certificate(certificate=second.certificate, key=first.key),
            Certificate(certificate=b"", key=b""),
            expired,
        ):
            if broken is not None:
                broken.write(tmp_path / "tls")
            capsys.readouterr()
            async with asyncio.timeout(10):
                while "keeping the old ones" not in (captured := capsys.readouterr()).out:
                    assert not captured.err
                    await asyncio.sleep(0.05)
            await self.until_shown(api.address, second)
        third = CA.server()
        third.write(tmp_path / "tls")
        await self.until_shown(api.address, third)
        await list_sessions(await connect(CA.caller(uris=[ASSISTANT]), tenant))

    async def test_renewed_client_ca_applies_to_new_connections(
        self, start: NewServer, tmp_path: Path, tenant: str
    ) -> None:
        """Callers can change to another CA without a restart."""
        connect = await start()
        other = Authority()
        (tmp_path / "authority.pem").write_bytes(other.certificate)
        caller = other.caller(uris=[ASSISTANT])
        async with asyncio.timeout(10):
            while True:
                with contextlib.suppress(Exception):
                    await list_sessions(await connect(caller, tenant))
                    break
                await asyncio.sleep(0.05)
        with pytest.raises(Exception, match="UNAVAILABLE"):
            await list_sessions(await connect(CA.caller(uris=[ASSISTANT]), tenant))

    @pytest.mark.parametrize(
        ("broken", "message"),
        [
            ("missing", "CHAT_TICKET_TLS_KEY: No such file"),
            ("nonsense", "CHAT_TICKET_TLS_KEY: must contain an unencrypted PEM key"),
            ("other key", "CHAT_TICKET_TLS_KEY: does not match the certificate"),
            ("expired", "CHAT_TICKET_TLS_CERTIFICATE: has expired"),
        ],
    )
    async def test_broken_certificate_at_start(
        self, start: NewServer, tmp_path: Path, broken: str, message: str
    ) -> None:
        """The server does not start, and names the setting and the problem."""
        settings = CA.server().write(tmp_path / "broken")
        if broken == "expired":
            CA.server(seconds=-60).write(tmp_path / "broken")
        else:
            content = {"missing": None, "nonsense": b"x", "other key": CA.server().key}[broken]
            key = tmp_path / "broken" / "key.pem"
            key.unlink()
            if content is not None:
                key.write_bytes(content)
        with pytest.raises(ConfigurationError, match=message):
            await start(**settings)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("[", "TOML|Expected|Unclosed|Invalid"),
            ('["a.b"]\ntenants = "*"', "a.b.permissions: Field required"),
            ('["a.b"]\ntenants = "*"\npermissions = []', "a.b.permissions"),
            ('["a.b"]\ntenants = "*"\npermissions = ["reed"]', "a.b.permissions.0"),
            ('["a.b"]\ntenants = "acme"\npermissions = ["read"]', "a.b.tenants"),
            ('["a.b"]\ntenants = []\npermissions = ["read"]', "a.b.tenants"),
            ('["a.b"]\ntenants = "*"\npermissions = ["read"]\ntenant = "x"', "a.b.tenant: Extra"),
            ('["*.b"]\ntenants = ["x"]\npermissions = ["read"]', r"\*.b"),
            ('["A.b"]\ntenants = ["x"]\npermissions = ["read"]', "A.b"),
            ('["spiffe://A/b"]\ntenants = ["x"]\npermissions = ["read"]', "spiffe"),
        ],
    )
    async def test_malformed_policy_file(
        self, start: NewServer, tmp_path: Path, text: str, message: str
    ) -> None:
        """A malformed entry is a configuration error. It is not ignored."""
        path = tmp_path / "malformed.toml"
        path.write_text(text)
        with pytest.raises(ConfigurationError, match=f"CHAT_TICKET_MTLS_POLICY.*({message})"):
            await start(mtls_policy=str(path))
