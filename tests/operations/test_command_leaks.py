"""The output of a command has no secret, with any settings and after any failure."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.client import a_file
from support.database import execute, raise_on_insert
from support.migrations import ask
from support.process import command
from support.provoked_faults import command_line, with_secrets
from support.secrets import MARKED, leaks, secret

from chat_ticket.v1 import resources_pb2 as r
from chat_ticket_svc import config, limits
from chat_ticket_svc.commands import migrate
from chat_ticket_svc.commands import token as token_command
from chat_ticket_svc.embedded import EmbeddedPostgres

ROOT = Path(__file__).parents[2]

# Imports everything once, and then is the process of one command after the other: ends as Python
# does, but at once.
COMMANDS = """
import gc, json, os, sys, tempfile
from chat_ticket_svc import cli, server
results = []
gc.freeze()
for arguments, environment in json.load(sys.stdin):
    written = tempfile.TemporaryFile()
    child = os.fork()
    if child == 0:
        os.dup2(written.fileno(), 1)
        os.dup2(written.fileno(), 2)
        os.environ.update(environment)
        end = 1
        try:
            cli.main(arguments)
        except SystemExit as error:
            end = error.code
            if isinstance(end, str):
                end = print(end, file=sys.stderr) or 1
        except BaseException:
            sys.excepthook(*sys.exc_info())
        sys.stdout.flush()
        os._exit(end or 0)
    _, status = os.waitpid(child, 0)
    written.seek(0)
    results.append((status, written.read().decode()))
print(json.dumps(results))
"""


def commands(*cases: tuple[list[str], dict[str, str]]) -> list[str]:
    """The output of each command, run with its variables. Each must fail."""
    default = {"DATABASE_URL": "postgresql://u@127.0.0.1:1/x", "CHAT_TICKET_PORT": "0"}
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS],
        input=json.dumps([(arguments, default | given) for arguments, given in cases]),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    results = json.loads(done.stdout)
    for (arguments, _), (status, written) in zip(cases, results, strict=True):
        assert (status == 0) == ("--help" in arguments), written
    return [written for _, written in results]


SECRETS = {
    name: f"postgresql://u:{secret('password')}@127.0.0.1:1/x?application_name={secret('q')}"
    for name in ("DATABASE_URL", "DATABASE_LISTEN_URL", "MIGRATE_DATABASE_URL")
} | {
    "CHAT_TICKET_JWKS": f"https://u:{secret('user')}@h/{secret('path')}?{secret('query')}",
    "CHAT_TICKET_TLS_KEY": secret("key"),
    "PGPASSWORD": secret("password"),
}


class TestCommands:
    def test_help_shows_no_setting(self) -> None:
        """With secrets in the environment."""
        names = ([], ["serve"], ["migrate"], ["migrate-status"], ["token"])
        for written in commands(*(([*name, "--help"], SECRETS) for name in names)):
            assert "usage: chat-ticket-svc" in written
            assert not leaks(written)

    def test_wrong_settings_are_named_without_their_values(self) -> None:
        """All settings are wrong at once."""
        fields = config.Settings.model_fields
        variables = [
            config.variable(str(field.validation_alias or name))
            for name, field in fields.items()
            if name not in ("limits", "quotas")
        ]
        for group, names in (("LIMITS", limits.Limits), ("QUOTAS", limits.Quotas)):
            variables += [f"CHAT_TICKET_{group}__{name.upper()}" for name in names.model_fields]
        assert len(variables) > 45
        [written] = commands((["serve"], {name: secret("value") for name in variables}))
        assert not leaks(written)
        assert "Traceback" not in written
        # Any text does for these.
        text = {"HOST", "TLS_CERTIFICATE", "TLS_KEY", "TLS_CLIENT_CA", "MTLS_POLICY"}
        text |= {"JWKS", "JWT_ISSUER", "JWT_AUDIENCE", "ATTACHMENT_URL_ALLOWED_HOSTS"}
        text |= {"JWT_TENANTS_CLAIM", "JWT_PERMISSIONS_CLAIM", "JWT_SUBJECT_CLAIM"}
        unnamed = {name for name in variables if f"{name}:" not in written}
        assert unnamed == {f"CHAT_TICKET_{name}" for name in text}

    def test_inconsistent_settings(self, tmp_path: Path) -> None:
        """Missing files, files with other content, and keys instead of paths."""
        pem = f"-----BEGIN PRIVATE KEY-----\n{secret('pem')}\n-----END PRIVATE KEY-----\n"
        broken = tmp_path / "broken.pem"
        broken.write_text(pem)
        callers = tmp_path / "callers.toml"
        callers.write_text(f'["a.b"]\ntenants = "{secret("t")}"\npermissions = ["{secret("p")}"]\n')
        token_command.development_settings(tmp_path)
        complete_key = tmp_path / "development-key.pem"
        missing = str(tmp_path / secret("name"))
        tls = {"CHAT_TICKET_TLS_CERTIFICATE": str(broken), "CHAT_TICKET_TLS_KEY": str(complete_key)}
        jwt_settings = {
            "CHAT_TICKET_AUTH": "jwt",
            "CHAT_TICKET_JWT_ISSUER": "i",
            "CHAT_TICKET_JWT_AUDIENCE": "a",
        }
        own = certificate(tmp_path)
        fine = tmp_path / "fine.toml"
        fine.write_text('["a.b"]\ntenants = "*"\npermissions = ["read"]\n')
        mtls = {
            **own,
            "CHAT_TICKET_AUTH": "mtls",
            "CHAT_TICKET_TLS_CLIENT_CA": own["CHAT_TICKET_TLS_CERTIFICATE"],
            "CHAT_TICKET_MTLS_POLICY": str(fine),
        }
        hosts = "CHAT_TICKET_ATTACHMENT_URL_ALLOWED_HOSTS"
        cases: list[tuple[str, dict[str, str]]] = [
            ("CHAT_TICKET_TLS_KEY", {**tls, "CHAT_TICKET_TLS_KEY": pem}),
            ("CHAT_TICKET_TLS_KEY", {**tls, "CHAT_TICKET_TLS_KEY": f"{pem * 99}"}),
            ("CHAT_TICKET_TLS_CERTIFICATE", tls),
            ("CHAT_TICKET_TLS_KEY", {**mtls, "CHAT_TICKET_TLS_KEY": str(broken)}),
            ("CHAT_TICKET_TLS_CERTIFICATE", {**tls, "CHAT_TICKET_TLS_CERTIFICATE": missing}),
            ("CHAT_TICKET_TLS_CLIENT_CA", {**mtls, "CHAT_TICKET_TLS_CLIENT_CA": missing}),
            ("CHAT_TICKET_MTLS_POLICY", {**mtls, "CHAT_TICKET_MTLS_POLICY": missing}),
            ("CHAT_TICKET_MTLS_POLICY", {**mtls, "CHAT_TICKET_MTLS_POLICY": str(callers)}),
            ("CHAT_TICKET_MTLS_POLICY", {**mtls, "CHAT_TICKET_MTLS_POLICY": str(broken)}),
            ("CHAT_TICKET_JWKS", {**jwt_settings, "CHAT_TICKET_JWKS": missing}),
            ("CHAT_TICKET_JWKS", {**jwt_settings, "CHAT_TICKET_JWKS": str(broken)}),
            ("CHAT_TICKET_JWKS", {"CHAT_TICKET_JWKS": f"https://[{secret('host')}]/"}),
            ("CHAT_TICKET_JWKS", {"CHAT_TICKET_JWKS": f"https://u:{secret('p')}℀@h/"}),
            ("limits", {"CHAT_TICKET_LIMITS": secret("limits")}),
            ("CHAT_TICKET_QUOTAS__STREAMS", {"CHAT_TICKET_QUOTAS": f'{{"streams":"{MARKED}"}}'}),
            (hosts, {hosts: f"fine,https://u:{secret('p')}@h/?{secret('q')}"}),
        ]
        written = commands(*((["serve"], settings) for _, settings in cases))
        for (name, _), text in zip(cases, written, strict=True):
            assert name in text
            assert text.startswith("chat-ticket-svc: ")
            assert "Traceback" not in text
            assert not leaks(text)

    @pytest.mark.parametrize("name", ["serve", "migrate", "migrate-status"])
    def test_url_that_cannot_be_read_is_not_shown(self, name: str) -> None:
        """The error names the variable, and has no part of the URL."""
        p = secret("password")
        urls = [
            f"postgresql://u:{p}@{secret('h')}:{secret('port')}/{secret('d')}",
            f"postgresql://u:{p}%zz@h/d",
            f"postgresql://u:{p} {p}@h/d",
            f"postgresql://u:{p}^@h/d",
            f"postgresql://u:{p}[@h/d",
            f"postgresql://u:{p}℀@h/d",
            f"postgresql://u:{p}/{p}@h/d",
            f"postgresql://u:p@[{secret('h')}]/d",
            f"postgresql://{secret('h')}:1,{secret('h')}:{secret('port')}/d",
            secret("nothing"),
        ]
        if name == "serve":
            urls += [f"postgresql://u@h/d?{secret('q')}=1", f"postgresql://u@h/d?{secret('q')}"]
        for text in commands(*(([name], {"DATABASE_URL": url}) for url in urls)):
            assert text.startswith("chat-ticket-svc: DATABASE_URL: ")
            assert text.count("\n") == 1
            assert not leaks(text)

    def test_migrations_that_fail(self, guarded_postgres: EmbeddedPostgres) -> None:
        """libpq's message may contain the URL. The error has the cause in our own words."""
        socket = guarded_postgres.url("template_of_leaks").replace("postgres@", "guarded@")
        guarded = socket.replace("guarded", f"guarded:{secret('password')}")
        as_root = with_secrets(guarded_postgres.url("template_of_leaks"))
        closed = f"postgresql://u:{secret('p')}@127.0.0.1:1/x"
        cases = {
            f"{closed}?application_name={secret('q')}": "refused",
            f"{closed}?sslmode={secret('q')}": "invalid value",
            f"{closed}?connect_timeout={secret('q')}": "invalid value",
            f"{as_root}&options=-c%20{secret('q')}%3D1": "does not know",
            as_root.replace("postgres:", f"{secret('user')}:"): "role does not exist",
            guarded: "refuses the user or its password",
        }
        for name in ("migrate", "migrate-status"):
            written = commands(*(([name], {"MIGRATE_DATABASE_URL": url}) for url in cases))
            for text, expected in zip(written, cases.values(), strict=True):
                assert expected in text
                assert not leaks(text)

    def test_migration_that_fails_on_a_row(
        self,
        guarded_postgres: EmbeddedPostgres,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capfd: pytest.CaptureFixture[str],
    ) -> None:
        """PostgreSQL's error contains the row. The output has the file and the SQLSTATE."""
        (tmp_path / "20990101000000_fail.sql").write_text(
            f"-- migrate:up\nSELECT '{secret('row')}'::int;\n-- migrate:down\n"
        )
        monkeypatch.setattr(migrate, "MIGRATIONS", tmp_path)
        assert migrate.up(guarded_postgres.url("failing"), quiet=False) != 0
        written = "".join(capfd.readouterr())
        assert "20990101000000_fail.sql" in written
        assert "22P02" in written
        assert not leaks(written)

    def test_dbmate_is_not_given_the_url_as_an_argument(self) -> None:
        """Every user can read the process list."""
        import socket

        with socket.create_server(("127.0.0.1", 0)) as silent:
            port = silent.getsockname()[1]
            url = f"postgresql://u:{secret('p')}@127.0.0.1:{port}/x?application_name={secret('q')}"
            migrating = subprocess.Popen(
                [sys.executable, "-m", "chat_ticket_svc", "migrate"],
                env={**os.environ, "DATABASE_URL": url},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            connection, _ = silent.accept()  # dbmate's, which now waits for an answer
            pid = migrating.pid
            [child] = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            seen = command_line(pid) + command_line(int(child))
            connection.close()
        written, _ = migrating.communicate(timeout=30)
        assert b"dbmate" in seen
        assert not leaks(seen + written)

    def test_unexpected_error(self, tmp_path: Path) -> None:
        """The process ends with the whole chain of errors, and without the text."""
        (tmp_path / "sitecustomize.py").write_text(
            "from chat_ticket_svc import config\n"
            f"def load(**_): raise RuntimeError('{MARKED}') from KeyError('{MARKED}')\n"
            "config.load = load\n"
        )
        paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
        done = subprocess.run(
            [sys.executable, "-m", "chat_ticket_svc", "migrate"],
            env={**os.environ, "PYTHONPATH": paths},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 1
        assert re.search(r"KeyError.*RuntimeError", done.stderr, re.DOTALL)
        assert re.search(r"cli\.py:\d+ main", done.stderr)
        assert not leaks(done.stdout + done.stderr)


async def test_commands_about_data_show_none(
    fresh_database: str, start_server: Callable[..., Any], tenant: str
) -> None:
    """Neither when they count, refuse or delete, nor when PostgreSQL's error has a row.

    An export is the data, and nothing beside it.
    """
    api = await start_server(fresh_database)
    session = await api.session(
        user_id="u-1", title=secret("title"), labels={"label": secret("label")}
    )
    await api.message(
        session.id,
        secret("content"),
        author=r.ChatMessageAuthor(id=secret("author")),
        metadata_json=json.dumps({secret("key"): secret("value")}),
        attachments=[a_file(file_name=secret("name"))],
    )
    ticket = r.Ticket(title=secret("title"), external_ref=secret("reference"))
    await api.escalate(session.id, ticket=ticket)
    execute(fresh_database, "UPDATE chat_sessions SET updated_at = '2020-01-01Z'")
    of_user = ("--tenant", tenant, "--user", "u-1")
    erase = ("erase", *of_user, "--yes", "--active-tickets")
    sabotage = f"RAISE '{secret('MESSAGE')}' USING DETAIL = '{secret('DETAIL')}'"
    expire = ("expire", "--tenant", tenant, "--older-than", "400d")
    for arguments, status in (
        (("erase", *of_user, "--dry-run"), 1),
        (("erase", *of_user, "--yes"), 1),
        (expire, 0),
        (erase, 1),
        (erase, 0),
    ):
        is_sabotaged = (arguments, status) == (erase, 1)
        if is_sabotaged:
            raise_on_insert(fresh_database, sabotage, table="chat_session_tombstones")
        done = await command(*arguments, DATABASE_URL=fresh_database)
        if is_sabotaged:
            execute(fresh_database, "DROP TRIGGER sabotage ON chat_session_tombstones")
            exported = await command("export", *of_user, DATABASE_URL=fresh_database)
            assert exported.status == 0
            assert leaks(exported.output)
            assert not leaks(exported.errors)
        assert done.status == status, done
        assert not leaks(done.output + done.errors)
    assert ask(fresh_database, "SELECT count(*) FROM chat_sessions") == [(0,)]


def certificate(directory: Path) -> dict[str, str]:
    """The settings of a certificate of our own."""
    from datetime import UTC, datetime, timedelta

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    own = (
        x509.CertificateBuilder(name, name, key.public_key(), 1, now, now + timedelta(days=1))
        .sign(key, hashes.SHA256())
        .public_bytes(serialization.Encoding.PEM)
    )
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    (directory / "own.pem").write_bytes(own)
    (directory / "own-key.pem").write_bytes(private)
    return {
        "CHAT_TICKET_TLS_CERTIFICATE": str(directory / "own.pem"),
        "CHAT_TICKET_TLS_KEY": str(directory / "own-key.pem"),
    }
