"""The permissions of credentials, and settings that would make a server insecure."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pool
from grpc import StatusCode
from support.authority import Key
from support.client import Api, refused
from support.process import run_command, server_process
from support.tools import needs_grpcurl

from chat_ticket_svc.access import method_permissions
from chat_ticket_svc.config import ConfigurationError, load
from chat_ticket_svc.server import SERVICES

ROOT = Path(__file__).parents[2]

PERMISSIONS = ["read", "write", "delete", "ticket"]


def rpcs() -> dict[str, bool]:
    """The full name of every method of the services, and whether it streams."""
    pool = descriptor_pool.Default()
    return {
        f"/{name}/{method.name}": method.server_streaming
        for name in SERVICES
        for method in pool.FindServiceByName(name).methods  # type: ignore[no-untyped-call]
    }


def needed(method: str) -> str:
    """The permission that docs/security.md assigns to a method, by its name."""
    name = method.rpartition("/")[2]
    if name.startswith(("Get", "List", "Search", "Watch")):
        return "read"
    if name == "DeleteChatTicket" or ("Ticket" in name and not name.startswith("Delete")):
        return "ticket"
    return "delete" if name.startswith(("Delete", "Redact")) else "write"


class TestPermissions:
    @pytest.mark.parametrize("permission", [*PERMISSIONS, "none"])
    async def test_each_method_requires_exactly_its_permission(
        self, start_server: Any, database: str, tmp_path: Path, permission: str
    ) -> None:
        """With one permission only its methods can be called. Errors name the missing one."""
        key = Key()
        address = (await start_server(database, auth="jwt", **key.trusted(tmp_path))).address
        scope = {"none": None}.get(permission, f"openid {permission}")
        metadata = [("authorization", f"Bearer {key.token(tenants=['acme'], scope=scope)}")]
        async with grpc.aio.insecure_channel(address) as channel:
            for method, streams in rpcs().items():
                kind = channel.unary_stream if streams else channel.unary_unary
                call: Any = kind(method)(b"", metadata=metadata)
                if method.endswith("/WatchChatSessions") and permission == "read":
                    assert await call.read()  # caught_up, of a stream that goes on
                    call.cancel()
                    continue
                expected = StatusCode.PERMISSION_DENIED
                if needed(method) == permission:
                    # What is empty says: invalid, or a page of nothing.
                    expected = StatusCode.INVALID_ARGUMENT
                    if method.endswith(("/ListChatSessions", "/ListTickets")):
                        expected = StatusCode.OK
                    if method.endswith("/CreateChatSession"):
                        expected = StatusCode.OK
                assert await call.code() is expected, method
                if expected is StatusCode.PERMISSION_DENIED:
                    with refused(expected, "PERMISSION_REQUIRED") as refusal:
                        await (call.read() if streams else call)
                    assert refusal.info.metadata["permission"] == needed(method)

    @pytest.mark.parametrize(
        "method", [*rpcs(), *sorted(method_permissions.UNAUTHENTICATED_METHODS)]
    )
    async def test_server_does_not_start_without_a_rule_for_each_method(
        self, start_server: Any, database: str, monkeypatch: pytest.MonkeyPatch, method: str
    ) -> None:
        """A method without a rule is not served."""
        permissions = {
            name: each
            for name, each in method_permissions.METHOD_PERMISSIONS.items()
            if name != method
        }
        monkeypatch.setattr(method_permissions, "METHOD_PERMISSIONS", permissions)
        monkeypatch.setattr(
            method_permissions,
            "UNAUTHENTICATED_METHODS",
            method_permissions.UNAUTHENTICATED_METHODS - {method},
        )
        with pytest.raises(ConfigurationError, match=re.escape(method)):
            await start_server(database)

    def test_every_rule_has_a_method(self) -> None:
        """The table has no rule for a method that no longer exists."""
        assert set(method_permissions.METHOD_PERMISSIONS) == set(rpcs())
        assert not method_permissions.UNAUTHENTICATED_METHODS & set(rpcs())

    async def test_method_without_a_rule_is_denied(
        self, api: Api, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Admission denies it too, not only the check at start."""
        method = "/chat_ticket.v1.ChatSessionService/GetChatSession"
        monkeypatch.delitem(method_permissions.METHOD_PERMISSIONS, method)  # type: ignore[arg-type]
        call = api.channel.unary_unary(method)
        with refused(StatusCode.PERMISSION_DENIED, "METHOD_NOT_ALLOWED"):
            await call(b"", metadata=[("x-tenant-id", "acme")])


class TestSettings:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"host": "0.0.0.0"}, "anyone could act for any tenant"),
            ({"host": "::"}, "anyone could act for any tenant"),
            ({"host": "example.org"}, "anyone could act for any tenant"),
            (
                {"host": "0.0.0.0", "auth": "jwt", "jwks": "k"},
                "anyone on the network path could steal credentials",
            ),
            ({"auth": "jwt"}, "CHAT_TICKET_JWKS.*CHAT_TICKET_JWT_ISSUER.*JWT_AUDIENCE"),
            ({"auth": "mtls"}, "TLS_CERTIFICATE.*TLS_KEY.*TLS_CLIENT_CA.*MTLS_POLICY"),
            ({"auth": "jwt,mtls"}, "TLS_CERTIFICATE.*MTLS_POLICY.*JWKS"),
            ({"auth": "insecure"}, "CHAT_TICKET_AUTH"),
            ({"tls_key": "x"}, "CHAT_TICKET_TLS_CERTIFICATE"),
            ({"tls_certificate": "x"}, "CHAT_TICKET_TLS_KEY"),
            ({"jwt_algorithms": "ES256,HS256"}, "CHAT_TICKET_JWT_ALGORITHMS"),
            ({"jwt_algorithms": "none"}, "CHAT_TICKET_JWT_ALGORITHMS"),
            ({"jwt_algorithms": ","}, "CHAT_TICKET_JWT_ALGORITHMS"),
            ({"jwks": "http://keys.example/"}, "CHAT_TICKET_JWKS"),
            ({"jwks": "http://127.0.0.1.example/"}, "CHAT_TICKET_JWKS"),
        ],
    )
    def test_unsafe_or_incomplete_settings_are_rejected(
        self, settings: dict[str, str], message: str
    ) -> None:
        """A missing setting never makes the server less secure."""
        with pytest.raises(ConfigurationError, match=f"(?s){message}"):
            load(**{"jwt_issuer": "", "jwt_audience": "", **settings})

    @pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "[::1]", "localhost"])
    def test_loopback_needs_nothing(self, host: str) -> None:
        """The development default."""
        assert not load(host=host).exposure

    @pytest.mark.parametrize("settings", [{}, {"auth": "jwt", "jwks": "a"}])
    def test_insecure_listening_can_be_allowed(self, settings: dict[str, str]) -> None:
        """With CHAT_TICKET_ALLOW_INSECURE."""
        wanted = {"host": "0.0.0.0", "allow_insecure": "true", **settings}
        assert load(jwt_issuer="i", jwt_audience="a", **wanted).exposure

    def test_insecure_listening_logs_a_warning(self, database: str) -> None:
        """At each start."""
        environment = {"CHAT_TICKET_HOST": "0.0.0.0", "CHAT_TICKET_ALLOW_INSECURE": "true"}
        with server_process(database, **environment) as server:
            server.wait_for("listening")
            [warning] = [line for line in server.log if line["level"] == "warning"]
            assert "anyone could act for any tenant" in warning["event"]

    def test_unknown_settings_log_a_warning(self, database: str) -> None:
        """A misspelt setting has no effect. Variables without the prefix are ignored."""
        environment = {"CHAT_TICKET_ATUH": "jwt", "CHAT_TICKETS": "x"}
        with server_process(database, **environment) as server:
            line = server.wait_for("unknown settings have no effect")
            assert line["variables"] == ["CHAT_TICKET_ATUH"]

    def test_unknown_quotas_are_rejected(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A variable with the prefix of a group can only be a mistake."""
        monkeypatch.setenv("CHAT_TICKET_QUOTAS__STREAM", "3")
        with pytest.raises(ConfigurationError, match="CHAT_TICKET_QUOTAS__STREAM"):
            load()

    def test_rejection_names_the_setting_that_allows_it(self, database: str) -> None:
        """On the command line, without a traceback."""
        result = run_command("serve", DATABASE_URL=database, CHAT_TICKET_HOST="0.0.0.0")
        assert result.returncode != 0
        assert "CHAT_TICKET_ALLOW_INSECURE" in result.stderr
        assert "Traceback" not in result.stderr


class TestDevelopment:
    @needs_grpcurl
    @pytest.mark.parametrize("auth", ["none", "jwt"])
    def test_make_run_prints_a_call_that_works(self, tmp_path: Path, auth: str) -> None:
        """The call has what the server requires. The server accepts tokens of the token command."""
        data = tmp_path / "a directory"
        with server_process(
            *("", "--embedded", str(data / "postgres")),
            CHAT_TICKET_AUTH=auth,
            PYTHONUNBUFFERED="1",  # as containers set it: every write is flushed
        ) as server:
            server.wait_for("serving")
            line = server.printed()
            result = subprocess.run(line, shell=True, capture_output=True, text=True, check=False)
            assert (result.returncode, result.stdout.split()) == (0, ["{", "}"]), result.stderr
            if auth == "none":
                [database] = re.findall(r"^export (DATABASE_URL=.*)$", server.output, re.MULTILINE)
                port = server.address.rpartition(":")[2]
                check = f"'{sys.executable}' -m chat_ticket_svc check"
                checked = subprocess.run(
                    f"{database} CHAT_TICKET_PORT={port} {check}",
                    shell=True,
                    capture_output=True,
                    text=True,
                    check=False,
                )
                assert checked.returncode == 0, checked
                return
            assert (data / "development-key.pem").stat().st_mode & 0o777 == 0o600

            def listed(*arguments: str, tenant: str = "") -> str:
                token = run_command("token", "--directory", str(data), *arguments).stdout.strip()
                call = [str(Path(sys.executable).with_name("grpcurl")), "-plaintext"]
                if tenant:
                    call += ["-H", f"x-tenant-id: {tenant}"]
                call += ["-H", f"authorization: Bearer {token}", server.address]
                call.append("chat_ticket.v1.ChatSessionService/ListChatSessions")
                result = subprocess.run(call, capture_output=True, text=True, check=False)
                return result.stdout + result.stderr

            assert listed("--tenant", "acme").split() == ["{", "}"]
            assert listed(tenant="acme").split() == ["{", "}"]
            assert "TENANT_NOT_ALLOWED" in listed("--tenant", "other", tenant="acme")
            assert "PERMISSION_REQUIRED" in listed("--tenant", "acme", "--permission", "write")

    @pytest.mark.parametrize("mistake", [("--permission", "reed"), ("--tenant", " acme")])
    def test_token_command_rejects_mistakes(self, tmp_path: Path, mistake: tuple[str, str]) -> None:
        """A misspelt permission or tenant is an error."""
        result = run_command("token", "--directory", str(tmp_path), *mistake)
        assert result.returncode != 0
        assert mistake[0] in result.stderr
        assert not list(tmp_path.iterdir())

    def test_make_run_passes_auth_on(self) -> None:
        """`make run AUTH=jwt` starts a server that requires tokens.

        No shell is in between: it would keep signals from the server.
        """
        result = subprocess.run(
            ["make", "--no-print-directory", "--dry-run", "run", "AUTH=jwt"],
            cwd=ROOT,
            env={**os.environ, "MAKEFLAGS": ""},
            capture_output=True,
            text=True,
            check=True,
        )
        assert result.stdout.splitlines()[-1].startswith("env CHAT_TICKET_AUTH=jwt .venv/bin/")
