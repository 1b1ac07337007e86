"""`chat-ticket-svc check`: one screen that shows an operator what is wrong."""

import contextlib
import re
import socket
import uuid
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest
from cryptography import x509
from support.authority import Authority, Key
from support.check_output import line
from support.client import Api
from support.cluster import Cluster
from support.plain_rows import PARENTS
from support.process import command
from support.secrets import leaks, secret

CA = Authority()


def environment(api: Api, database_url: str, **settings: str) -> dict[str, str]:
    """The environment of the server that `api` calls."""
    port = api.address.rpartition(":")[2]
    own = {f"CHAT_TICKET_{name.upper()}": value for name, value in settings.items()}
    return {"DATABASE_URL": database_url, "CHAT_TICKET_PORT": port, **own}


async def test_everything_is_ok(start_server: Any, database: str) -> None:
    """Every line is ok, and the exit status is 0."""
    done = await command("check", **environment(await start_server(database), database))
    assert (done.status, done.errors) == (0, "")
    states, about = zip(*re.findall(r"^(\S+) +(\S+)", done.output, re.MULTILINE), strict=True)
    assert set(states) == {"ok"}
    checked = (
        "settings database schema index session write feed epoch collation ctype clock service call"
    )
    assert " ".join(about) == checked
    assert re.fullmatch(r"PostgreSQL \d+\.\d+, responds in \d+\.\d ms", line(done, "database")[1])
    assert re.fullmatch(r"[+-]0\.\d{3} s compared to the database's clock", line(done, "clock")[1])
    assert re.fullmatch(r"ListChatSessions took \d+\.\d ms", line(done, "call")[1])


async def test_nothing_is_reachable() -> None:
    """Each failed check has its cause, and all checks run."""
    done = await command(
        "check",
        DATABASE_URL="postgresql://user:pass@127.0.0.1:1/chats",
        CHAT_TICKET_PORT="1",
        CHAT_TICKET_QUOTAS__TENANT_BURST="7",
        CHAT_TICKET_POOLSIZE="3",
    )
    assert done.status == 1
    assert line(done, "database") == (
        "FAILED",
        "the database cannot be reached: connection refused: nothing listens at the host and port",
    )
    assert line(done, "service") == ("FAILED", "127.0.0.1:1 does not respond: UNAVAILABLE")
    assert "warning  settings     unknown, without effect: CHAT_TICKET_POOLSIZE" in done.output
    assert "CHAT_TICKET_QUOTAS__TENANT_BURST=7\n" in done.output
    assert "DATABASE_URL=postgresql://***@127.0.0.1:1/chats\n" in done.output


async def test_cause_is_named(database: str) -> None:
    """tests/store/test_connection_errors.py has all causes."""
    wrong = urlsplit(database)._replace(path="/nothing_at_all").geturl()
    done = await command("check", DATABASE_URL=wrong, CHAT_TICKET_PORT="1")
    expected = "the database cannot be reached: the database does not exist"
    assert line(done, "database") == ("FAILED", expected)


async def test_no_database_is_set() -> None:
    done = await command("check", DATABASE_URL="", CHAT_TICKET_PORT="1")
    assert line(done, "database") == ("FAILED", "DATABASE_URL: required")


async def test_wrong_settings_are_all_reported() -> None:
    """As `serve` reports them."""
    done = await command("check", CHAT_TICKET_PORT="x", CHAT_TICKET_POOL_SIZE="0")
    assert done.status == 1
    assert "CHAT_TICKET_PORT" in done.errors
    assert "CHAT_TICKET_POOL_SIZE" in done.errors


async def test_missing_migrations_are_named(fresh_database: str) -> None:
    with psycopg.connect(fresh_database, autocommit=True) as connection:
        connection.execute("DELETE FROM schema_migrations WHERE version = '20261121000400'")
    done = await command("check", DATABASE_URL=fresh_database, CHAT_TICKET_PORT="1")
    assert line(done, "schema") == (
        "FAILED",
        "lacks migrations 20261121000400_chat_tickets.sql: run chat-ticket-svc migrate",
    )


async def test_a_database_with_settings_of_its_own_fails(fresh_database: str) -> None:
    """No pooler is blamed for what only a superuser sets. The clock is read exactly."""
    name = urlsplit(fresh_database).path[1:]
    with psycopg.connect(fresh_database, autocommit=True) as connection:
        for setting in (
            "default_transaction_read_only = on",
            "session_replication_role = replica",
            "extra_float_digits = -15",
        ):
            connection.execute(f'ALTER DATABASE "{name}" SET {setting}')
    done = await command("check", DATABASE_URL=fresh_database, CHAT_TICKET_PORT="1")
    state, text = line(done, "database")
    assert state == "FAILED"
    assert "is read-only" in text
    assert line(done, "session") == (
        "FAILED",
        "has other settings than this service needs:"
        " session_replication_role is replica, must be origin",
    )
    assert line(done, "clock")[0] == "ok"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            "REVOKE DELETE ON chat_messages FROM app",
            "permission denied for table chat_messages (SQLSTATE 42501)",
        ),
        (
            "ALTER FUNCTION chat_tickets_link() SET search_path = elsewhere",
            'relation "chat_sessions" does not exist (SQLSTATE 42P01),'
            " in public.chat_tickets_link()",
        ),
        (
            "REVOKE SELECT ON chat_draft_pieces FROM app",
            "permission denied for table chat_draft_pieces (SQLSTATE 42501)",
        ),
        (
            "REVOKE INSERT ON ticket_tombstones FROM app",
            "permission denied for table ticket_tombstones (SQLSTATE 42501),"
            " in tickets_leave_tombstones()",
        ),
        (
            "REVOKE DELETE ON ticket_tombstones FROM app",
            "permission denied for table ticket_tombstones (SQLSTATE 42501)",
        ),
        (
            "REVOKE UPDATE ON chat_epochs FROM app",
            "permission denied for table chat_epochs (SQLSTATE 42501)",
        ),
        (
            "REVOKE DELETE ON chat_session_tombstones FROM app",
            "permission denied for table chat_session_tombstones (SQLSTATE 42501)",
        ),
        (
            "ALTER FUNCTION chat_drafts_refuse_message_id() SET search_path = elsewhere",
            'relation "chat_messages" does not exist (SQLSTATE 42P01),'
            " in public.chat_drafts_refuse_message_id()",
        ),
        (
            "LOCK TABLE chat_tickets",
            "canceling statement due to lock timeout (SQLSTATE 55P03)",
        ),
    ],
)
async def test_a_write_that_is_refused_is_reported(
    fresh_database: str, change: str, reason: str
) -> None:
    """With the table or the function. A lock of somebody else is not waited for."""
    url = urlsplit(fresh_database)
    app = url._replace(netloc="app@").geturl()
    with psycopg.connect(fresh_database) as connection:
        with contextlib.suppress(psycopg.errors.DuplicateObject), connection.transaction():
            connection.execute("CREATE ROLE app LOGIN")
        connection.execute("GRANT ALL ON ALL TABLES IN SCHEMA public TO app")
        connection.commit()
        connection.execute(change)  # type: ignore[arg-type]
        if not change.startswith("LOCK"):
            connection.commit()
        done = await command("check", DATABASE_URL=app, CHAT_TICKET_PORT="1")
        assert line(done, "write") == ("FAILED", f"a write is refused: {reason}")


async def test_the_write_leaves_nothing(fresh_database: str) -> None:
    done = await command("check", DATABASE_URL=fresh_database, CHAT_TICKET_PORT="1")
    state, text = line(done, "write")
    assert state == "ok"
    assert re.fullmatch(r"a row of each table, rolled back, took \d+\.\d ms", text)
    with psycopg.connect(fresh_database) as connection:
        for table in PARENTS:
            assert connection.execute(f"SELECT FROM {table}").fetchall() == []  # type: ignore[arg-type]


async def test_search_index_that_is_not_as_it_should_be_is_a_warning(fresh_database: str) -> None:
    """It is missing, invalid or stale, or another is there too. Searches work."""
    index = "idx_chat_messages_content"
    missing = "is missing or invalid, searches are slow: run chat-ticket-svc migrate"
    unused = (
        "also there, and not used by servers of this version: {};"
        " run chat-ticket-svc reindex when every server is of this version"
    )
    stale = (
        "{}, this is {}: words may be missing, as their stems differ;"
        " run chat-ticket-svc reindex, which builds it anew"
    )
    with psycopg.connect(fresh_database, autocommit=True) as connection:
        version = connection.info.server_version // 10_000
        for change, expected in (
            (
                f"CREATE INDEX {index}_old ON chat_messages (tenant_id)",
                unused.format(f"{index}_old"),
            ),
            (
                f"CREATE INDEX {index}_new ON chat_messages (tenant_id)",
                unused.format(f"{index}_new, {index}_old"),
            ),
            (
                f"COMMENT ON INDEX {index} IS 'built by PostgreSQL 15'",
                stale.format("was built by PostgreSQL 15", version),
            ),
            (
                f"COMMENT ON INDEX {index} IS NULL",
                stale.format("does not say who built it", version),
            ),
            (
                f"UPDATE pg_index SET indisvalid = false WHERE indexrelid = '{index}'::regclass",
                missing,
            ),
            (f"DROP INDEX {index}, {index}_old", missing),
        ):
            connection.execute(change)  # type: ignore[arg-type]
            done = await command("check", DATABASE_URL=fresh_database, CHAT_TICKET_PORT="1")
            assert line(done, "index") == ("warning", expected)


async def test_ctype_that_knows_only_ascii_is_a_warning(cluster: Cluster) -> None:
    """Then a search for мир does not find МИР."""
    name = f"test_{uuid.uuid4().hex}"
    cluster.execute(f"CREATE DATABASE {name} TEMPLATE template0 ENCODING 'UTF8' LC_CTYPE 'C'")
    url = cluster.url(name)
    try:
        done = await command("check", DATABASE_URL=url, CHAT_TICKET_PORT="1")
    finally:
        cluster.drop(url)
    assert line(done, "ctype") == (
        "warning",
        "the database's LC_CTYPE is C: searches ignore the case of ASCII letters only; create the"
        " database with a UTF-8 locale such as C.UTF-8, and move the data by pg_dump",
    )


async def test_a_collation_that_changed_is_a_warning(fresh_database: str) -> None:
    """As after an upgrade of the C library: indexes of text may be out of order."""
    name = urlsplit(fresh_database).path[1:]
    with psycopg.connect(fresh_database, autocommit=True) as connection:
        connection.execute(
            "UPDATE pg_database SET datcollversion = 'old' WHERE datname = %s", [name]
        )
    done = await command("check", DATABASE_URL=fresh_database, CHAT_TICKET_PORT="1")
    state, text = line(done, "collation")
    assert state == "warning"
    assert re.fullmatch(
        r"version .*, but old was recorded: indexes of text may be out of order, \d+ of the"
        " service; REINDEX the database, then ALTER DATABASE ... REFRESH COLLATION VERSION",
        text,
    )


class TestTokens:
    @pytest.fixture
    def key(self) -> Key:
        return Key("of-the-issuer")

    async def test_the_keys_are_named_and_a_token_is_asked_for(
        self, start_server: Any, database: str, tmp_path: Path, key: Key
    ) -> None:
        """A server with `jwt` is expected to require a token."""
        settings = {"auth": "jwt", **key.trusted(tmp_path)}
        api = await start_server(database, **settings)
        done = await command("check", **environment(api, database, **settings))
        assert done.status == 0
        assert line(done, "jwks") == ("ok", "key ids: of-the-issuer")
        assert line(done, "call")[1].startswith("the server requires a token, as it should")
        assert f"CHAT_TICKET_JWKS={settings['jwks']}\n" in done.output, "a file is shown"

    @pytest.mark.parametrize(("issuer", "state"), [("of-the-issuer", "ok"), ("other", "FAILED")])
    async def test_a_call_is_made_with_a_token(
        self,
        start_server: Any,
        database: str,
        tmp_path: Path,
        key: Key,
        issuer: str,
        state: str,
    ) -> None:
        """It has to be one that the server accepts."""
        settings = {"auth": "jwt", **key.trusted(tmp_path)}
        api = await start_server(database, **settings)
        signer = key if issuer == key.key_id else Key(issuer)
        (tmp_path / "token").write_text(signer.token(tenants=["acme"]) + "\n")
        done = await command(
            "check",
            "--token-file",
            str(tmp_path / "token"),
            **environment(api, database, **settings),
        )
        assert line(done, "call")[0] == state
        assert done.status == (0 if state == "ok" else 1)
        assert line(done, "token")[0] == state
        if state == "ok":
            assert re.match(
                r"subject not named; permissions: .*; tenants: acme; expires in \d",
                line(done, "token")[1],
            )

    @pytest.mark.parametrize(
        ("claims", "text"),
        [
            ({"aud": "other"}, "aud: expected chat-ticket-svc, found other"),
            ({"tenants": None}, 'tenants: expected a list of tenant ids, or "*", found nothing'),
        ],
        ids=["aud", "tenants"],
    )
    async def test_a_wrong_claim_is_named(
        self, tmp_path: Path, key: Key, claims: dict[str, Any], text: str
    ) -> None:
        """Without the server, by the settings and the keys."""
        token = key.token(**claims)
        (tmp_path / "token").write_text(token)
        settings = {"auth": "jwt", "port": "1", **key.trusted(tmp_path)}
        names = {f"CHAT_TICKET_{name.upper()}": value for name, value in settings.items()}
        done = await command("check", "--token-file", str(tmp_path / "token"), **names)
        assert line(done, "token") == ("FAILED", f"{text}, in a token of key of-the-issuer")
        assert token not in done.output + done.errors

    async def test_a_server_with_other_settings_can_be_called(
        self, start_server: Any, database: str, tmp_path: Path, key: Key
    ) -> None:
        """With a token, which names the tenant. Without one the line names the option."""
        api = await start_server(database, auth="jwt", **key.trusted(tmp_path))
        here = environment(api, database)
        done = await command("check", **here)
        assert line(done, "call")[0] == "FAILED"
        assert line(done, "call")[1].endswith("; pass --token-file to call it with a token")
        (tmp_path / "token").write_text(key.token(tenants=["acme"]))
        done = await command("check", "--token-file", str(tmp_path / "token"), **here)
        assert line(done, "call")[0] == "ok"

    async def test_unreadable_keys_fail(self, tmp_path: Path, key: Key) -> None:
        settings = {**key.trusted(tmp_path), "jwks": str(tmp_path / "nothing")}
        names = {f"CHAT_TICKET_{name.upper()}": value for name, value in settings.items()}
        done = await command("check", CHAT_TICKET_AUTH="jwt", CHAT_TICKET_PORT="1", **names)
        assert line(done, "jwks")[0] == "FAILED"


async def test_a_server_with_tls_is_called_by_its_certificate(
    start_server: Any, database: str, tmp_path: Path
) -> None:
    """No CA is configured: the server has to present exactly that certificate."""
    settings = CA.server().write(tmp_path / "tls")
    # The client of the fixture speaks no TLS; it is asked for nothing but the address.
    api = await start_server(database, **settings)
    done = await command("check", **environment(api, database, **settings))
    assert line(done, "certificate")[0] == "warning", "it expires within days"
    assert line(done, "call")[0] == "ok"
    other = CA.server().write(tmp_path / "other")
    done = await command("check", **environment(api, database, **other))
    state, text = line(done, "service")
    assert state == "FAILED"
    assert "presents another certificate than the one in CHAT_TICKET_TLS_CERTIFICATE" in text


async def test_client_key_of_another_certificate_is_named(tmp_path: Path) -> None:
    """In one line, without those of gRPC."""
    client, other = (CA.caller().write(tmp_path / name) for name in ("client", "other"))
    done = await command(
        "check",
        "--probe",
        *("--client-certificate", client["tls_certificate"], "--client-key", other["tls_key"]),
    )
    assert (done.status, done.output) == (1, "")
    assert re.fullmatch("chat-ticket-svc: --client-certificate: .*--client-key.*\n", done.errors)


@pytest.mark.parametrize(
    "names",
    [
        [x509.IPAddress(ip_address("10.1.2.3"))],
        [x509.UniformResourceIdentifier("spiffe://example.org/chat-ticket-svc")],
        [x509.DNSName("*.example.org")],
        [],
    ],
    ids=["ip", "spiffe", "wildcard", "common name"],
)
async def test_a_server_with_another_kind_of_name_is_probed(
    start_server: Any, database: str, tmp_path: Path, names: list[x509.GeneralName]
) -> None:
    """By the port of the option, and with a client certificate where the server requires one."""
    (tmp_path / "callers.toml").write_text('["a.internal"]\ntenants = "*"\npermissions = ["read"]')
    settings = {
        **CA.issue(names).write(tmp_path / "tls"),
        "auth": "mtls",
        "tls_client_ca": str(tmp_path / "authority.pem"),
        "mtls_policy": str(tmp_path / "callers.toml"),
    }
    (tmp_path / "authority.pem").write_bytes(CA.certificate)
    client = CA.caller(names=["a.internal"]).write(tmp_path / "client")
    api = await start_server(database, **settings)
    variables = {**environment(api, database, **settings), "CHAT_TICKET_PORT": "1"}
    done = await command(
        "check",
        *("--probe", "--port", api.address.rpartition(":")[2]),
        *("--client-certificate", client["tls_certificate"], "--client-key", client["tls_key"]),
        **variables,
    )
    assert line(done, "service")[0] == "ok", done
    assert done.status == 0


@pytest.mark.parametrize("content", [b"\xff\xfe", b"two tokens", b""])
async def test_a_file_without_a_token_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "token").write_bytes(content)
    done = await command("check", "--token-file", str(tmp_path / "token"), "--port", "1")
    expected = "chat-ticket-svc: --token-file: must contain one token, and nothing else\n"
    assert (done.status, done.errors) == (1, expected)


@pytest.mark.parametrize(("arguments", "state"), [((), "warning"), (("--probe",), "FAILED")])
async def test_a_server_that_asks_for_certificates_is_not_called(
    tmp_path: Path, arguments: tuple[str, ...], state: str
) -> None:
    """Without --client-certificate. A probe fails, because one that cannot fail is useless."""
    (tmp_path / "callers.toml").write_text('["a.internal"]\ntenants = "*"\npermissions = ["read"]')
    settings = {
        **CA.server().write(tmp_path / "tls"),
        "auth": "mtls",
        "tls_client_ca": str(tmp_path / "authority.pem"),
        "mtls_policy": str(tmp_path / "callers.toml"),
    }
    (tmp_path / "authority.pem").write_bytes(CA.certificate)
    names = {f"CHAT_TICKET_{name.upper()}": value for name, value in settings.items()}
    done = await command("check", *arguments, CHAT_TICKET_PORT="1", **names)
    assert done.status == 1
    assert line(done, "service")[0] == state
    if not arguments:
        assert line(done, "policy") == ("ok", "client certificates listed: 1")


async def test_no_secret_is_shown(tmp_path: Path) -> None:
    """Wherever it was put, even by mistake."""
    done = await command(
        "check",
        DATABASE_URL=f"postgresql://{secret('user')}:{secret('password')}@127.0.0.1:1/chats"
        f"?sslpassword={secret('key')}",
        DATABASE_LISTEN_URL=f"postgresql://listen:{secret('password')}@127.0.0.1:1/chats",
        CHAT_TICKET_PORT="1",
        CHAT_TICKET_AUTH="jwt",
        CHAT_TICKET_JWKS=secret("keys"),
        CHAT_TICKET_JWT_ISSUER="issuer",
        CHAT_TICKET_JWT_AUDIENCE="audience",
        CHAT_TICKET_TLS_CERTIFICATE=secret("certificate"),
        CHAT_TICKET_TLS_KEY=secret("key"),
    )
    assert done.status == 1
    assert "CHAT_TICKET_JWT_ISSUER=issuer" in done.output
    assert not leaks(done.output + done.errors)


@pytest.mark.parametrize("url", ["postgresql://u:12/{}@127.0.0.1:1/x", "postgresql:///u:{}@h/x"])
async def test_no_secret_of_a_broken_url_is_shown(url: str) -> None:
    """Nor of a URL in a variable that takes none."""
    broken = url.format(secret("password"))
    done = await command(
        "check", DATABASE_URL=broken, CHAT_TICKET_PORT="1", CHAT_TICKET_JWT_ISSUER=broken
    )
    assert done.status == 1
    assert not leaks(done.output + done.errors)


async def test_silent_hosts_leave_the_other_lines() -> None:
    """However many hosts the URL names."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        host = f"127.0.0.1:{silent.getsockname()[1]}"
        done = await command(
            "check", DATABASE_URL=f"postgresql://u:p@{host},{host}/x", CHAT_TICKET_PORT="1"
        )
    assert line(done, "database")[0] == "FAILED"
    assert line(done, "service")[0] == "FAILED"
