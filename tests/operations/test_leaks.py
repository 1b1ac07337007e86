"""No secret of callers or operators is in a log line or an error.

Every secret of these tests contains MARKED. Real processes go through every fault of the error
table, and then MARKED must be nowhere in what they wrote or answered.
"""

import asyncio
import base64
import itertools
import json
import re
from pathlib import Path

import pytest
from support.client import Api
from support.process import server_process
from support.provoked_errors import ServerOutput, bearer
from support.provoked_faults import address_of, with_secrets
from support.secrets import leaks, secret

from chat_ticket_svc.commands import token as token_command
from chat_ticket_svc.embedded import EmbeddedPostgres
from chat_ticket_svc.reasons import REASONS

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "src" / "chat_ticket_svc"


@pytest.mark.parametrize(
    "form",
    [
        secret("plain").encode(),
        json.dumps({"é\n": secret("json")}).encode(),
        b"postgresql://u:%21" + secret("url").encode() + b"@h",
        b"https://" + secret("host").lower().encode(),
        repr(RuntimeError(secret("repr"))).encode(),
        *(base64.b64encode(b"." * n + secret("base64").encode()) for n in range(3)),
        *(base64.urlsafe_b64encode(b"." * n + secret("base64").encode()) for n in range(3)),
        secret("hex").encode().hex().encode(),
    ],
    ids=itertools.count(),
)
def test_secret_is_seen_in_every_form(form: bytes) -> None:
    """`leaks` finds a secret in every encoding."""
    assert leaks(form)
    assert leaks(b"before" + form + b"behind")
    assert not leaks(b"nothing " * 100)


class TestServer:
    def test_log_has_no_secret(self, faulty_server_output: ServerOutput) -> None:
        """In no byte of stdout and stderr."""
        assert not leaks(faulty_server_output.process.output)

    def test_errors_have_no_secret(self, faulty_server_output: ServerOutput) -> None:
        """Not in the status, its details or any other trailer."""
        assert {
            reason: leaks(error) for reason, error in faulty_server_output.errors if leaks(error)
        } == {}

    def test_every_reason_was_provoked(self, faulty_server_output: ServerOutput) -> None:
        """Those of the catalog in errors.py; a new one has to be provoked here."""
        reasons = {reason.name for reason in REASONS}
        met = {reason for reason, _ in faulty_server_output.errors}
        # The server does not start with a method that could be METHOD_NOT_ALLOWED; the
        # others have tests of their own: test_out_of_reach, and test_url_attacks.
        assert reasons - met == {"METHOD_NOT_ALLOWED", "KEYS_UNAVAILABLE", "URL_CHECKS_BUSY"}

    def test_faults_are_logged(self, faulty_server_output: ServerOutput) -> None:
        """The log has every fault, without its text."""
        for event in (
            "internal error",
            "credential rejected",
            "error in the background",
            "unexpected error",
            "notifier lost its connection",
            "listener lost its connection",
            "could not poll the watched sessions",
            "not serving",
            "planted",
            "error connecting in",
            "finished the draft of a lost writer",
            "draining",
        ):
            assert event in faulty_server_output.process.output, event
        assert faulty_server_output.process.output.count("Broken") >= 8

    def test_library_log_lines_are_redacted_to_words_types_and_numbers(
        self, faulty_server_output: ServerOutput
    ) -> None:
        """The redacted line still shows what happened."""
        assert "planted ... Broken 7" in faulty_server_output.process.output

    def test_debug_level_logs_more(self, faulty_server_output: ServerOutput) -> None:
        """Debug lines are in the log at level debug only."""
        assert ("Executing" in faulty_server_output.process.output) == faulty_server_output.debug, (
            "asyncio's debug mode"
        )

    def test_correlation_id_is_in_one_line_with_every_error_of_the_chain(
        self, faulty_server_output: ServerOutput
    ) -> None:
        """The method, every error by kind, the SQLSTATE and the places; nothing of their texts."""
        error_chains = {
            "XX000": ("CreateChatSession", ["InternalError_"], "XX000", "store/sessions.py"),
            "23514": (
                "CreateChatMessage",
                ["CheckViolation", "ConstraintViolation"],
                "no_content",
                "store/append.py",
            ),
            "KeyError": ("GetChatSession", ["KeyError"], "KeyError", "convert.py"),
            "KeyError in a stream": ("ListChatMessages", ["KeyError"], "KeyError", "convert.py"),
        }
        assert faulty_server_output.correlation_ids.keys() == error_chains.keys()
        assert faulty_server_output.process.output.count("internal error") == len(error_chains)
        for what, (method, kinds, name, place) in error_chains.items():
            correlation_id = faulty_server_output.correlation_ids[what]
            [line] = [
                line
                for line in faulty_server_output.process.output.splitlines()
                if correlation_id in line
            ]
            assert "internal error" in line
            assert f"Service/{method}" in line
            assert name in line
            assert re.search(rf"{place}:\d+ \w+", line)
            for kind in kinds:
                assert kind in line
            if line.startswith("{"):
                logged_errors = json.loads(line)["errors"]
                assert [error["error"] for error in logged_errors] == kinds
                assert all(error["frames"] for error in logged_errors)
                assert logged_errors[0].get("sqlstate", what[:8]) == what[:8]
                assert {"table_name", "constraint_name"}.isdisjoint(logged_errors[0]) == (
                    what != "23514"
                ), "only names, and not what only stands in their place"

    def test_background_errors_are_logged_with_type_and_location(
        self, faulty_server_output: ServerOutput
    ) -> None:
        """Errors in tasks, callbacks and finalizers have one line each, with type and location."""
        for about in ("Exception in callback", "Task exception was never retrieved"):
            assert about in faulty_server_output.process.output
        for place in ("call_back", "failing_task", "__del__"):
            assert re.search(
                rf"sitecustomize\.py:\d+ {place}\b", faulty_server_output.process.output
            ), place
        assert "Traceback" not in faulty_server_output.process.output

    def test_other_users_of_the_machine_see_no_secret(
        self, faulty_server_output: ServerOutput
    ) -> None:
        """Neither in the process list nor in pg_stat_activity."""
        assert faulty_server_output.commands
        assert "SELECT" in faulty_server_output.activity
        assert not leaks(
            b"".join(faulty_server_output.commands) + faulty_server_output.activity.encode()
        )


async def test_out_of_reach(guarded_postgres: EmbeddedPostgres, tmp_path: Path) -> None:
    """An unknown option, a wrong password, and a key server that does not answer."""
    keys = tmp_path
    token_command.development_settings(keys)
    url = guarded_postgres.url("template_of_leaks")
    with server_process(
        f"{with_secrets(url)}&options=-c%20{secret('option')}%3D1&passfile=/{secret('file')}",
        DATABASE_LISTEN_URL=url.replace("postgres@", f"guarded:{secret('password')}@"),
        CHAT_TICKET_LOG_LEVEL="debug",
        PYTHONDEVMODE="1",
        CHAT_TICKET_AUTH="jwt",
        CHAT_TICKET_JWKS=f"http://u:{secret('user')}@127.0.0.1:1/{secret('p')}?{secret('q')}",
        CHAT_TICKET_JWT_ISSUER=secret("iss"),
        CHAT_TICKET_JWT_AUDIENCE=secret("aud"),
    ) as process:
        faulty_server_output = ServerOutput(process)
        async with Api(await address_of(process), "acme") as api:
            api.sessions._metadata += bearer(keys)
            await faulty_server_output.expect_error("KEYS_UNAVAILABLE", api.session())
        for event, problem in {
            "not serving": "the URL's options name a parameter that the server does not know",
            "listener cannot connect": "the server refuses the user or its password",
        }.items():
            line = await asyncio.to_thread(process.wait_for, event)
            assert line["problem"].endswith(problem)
        for about in ("could not fetch the key set", "error connecting in"):
            await faulty_server_output.wait_for_output(about)
        assert process.stop() == 0
    assert not leaks(process.output)
    assert not leaks(faulty_server_output.errors[0][1])
