"""The command line as people meet it: its help, and its completion in a shell."""

import asyncio
import os
import pty
import re
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from support.process import command, run_command

from chat_ticket_svc.commands import migrate
from chat_ticket_svc.store.migration_progress import Activity, IndexBuild

COMMANDS = (
    *("serve", "migrate", "migrate-status", "check", "token", "tenant", "reindex"),
    *("export", "expire", "erase"),
)


async def test_the_help_names_every_command() -> None:
    """And not the one that is for `serve` alone."""
    done = await command("--help")
    assert done.status == 0
    assert re.findall(r"^    ([a-z-]+) ", done.output, re.MULTILINE) == list(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
async def test_every_command_has_a_help(name: str) -> None:
    done = await command(name, "--help")
    assert done.status == 0
    assert done.output.startswith(f"usage: chat-ticket-svc {name}")


async def test_unknown_command_is_rejected() -> None:
    """With the commands that there are, but for the one that is for `serve` alone."""
    done = await command("destroy")
    assert done.status == 2
    assert "destroy" in done.errors
    assert "erase" in done.errors
    assert "worker" not in done.errors


async def test_version() -> None:
    done = await command("--version")
    assert (done.status, done.output) == (0, f"chat-ticket-svc {version('chat-ticket-svc')}\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ("serve", "--port", "99999"),
        ("check", "--port", "x"),
        ("serve", "--workers", "0"),
        ("token", "--seconds", "0"),
    ],
)
async def test_wrong_number_is_blamed_on_its_option(arguments: tuple[str, ...]) -> None:
    """Not on the variable that the option overrides."""
    done = await command(*arguments)
    assert done.status == 2
    assert f"argument {arguments[1]}: not a whole number from" in done.errors
    assert "CHAT_TICKET" not in done.errors


NO_SPACE = "chat-ticket-svc: cannot write standard output: No space left on device\n"
CLOSED = "chat-ticket-svc: cannot write standard output: Bad file descriptor\n"


@pytest.mark.parametrize(
    ("arguments", "redirection", "status", "errors"),
    [
        ("check --port 1", ">/dev/full", 1, NO_SPACE),
        ("check --port 1", ">&-", 1, CLOSED),
        ("check --port 1", "2>&- <&-", 1, ""),
        ("check --port 1", "| true", 128 + signal.SIGPIPE, ""),
        ("--version", ">/dev/full", 1, NO_SPACE),
        ("--help", ">&-", 1, CLOSED),
        ("migrate-status", ">/dev/full", 1, NO_SPACE),
        ("migrate-status", "| true", 128 + signal.SIGPIPE, ""),
    ],
)
def test_unusable_stream_is_one_line(
    request: pytest.FixtureRequest, arguments: str, redirection: str, status: int, errors: str
) -> None:
    """Of every command: no traceback, and a status that tells."""
    needs_database = arguments.startswith("migrate")
    url = request.getfixturevalue("database") if needs_database else ""
    done = subprocess.run(
        [
            "bash",
            "-c",
            f'"$0" -m chat_ticket_svc {arguments} {redirection}; exit $PIPESTATUS',
            sys.executable,
        ],
        env={**os.environ, "DATABASE_URL": url},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (status, errors)


@pytest.mark.parametrize("arguments", [("token", "--directory"), ("serve", "--embedded")])
def test_file_in_place_of_a_directory_is_one_line(
    tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    """And nothing is created beside it."""
    (tmp_path / "file").touch()
    done = run_command(*arguments, str(tmp_path / "file"))
    assert done.returncode == 1
    assert re.fullmatch(r"chat-ticket-svc: .*/file[ /].*\n", done.stderr)
    assert "Errno" not in done.stderr
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_text_that_the_encoding_lacks_is_escaped() -> None:
    """By a Python that starts with another encoding."""
    settings = {"CHAT_TICKET_JWT_ISSUER": "Ωmega", "PYTHONIOENCODING": "latin-1"}
    done = subprocess.run(
        [sys.executable, "-m", "chat_ticket_svc", "check", "--port", "1"],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "CHAT_TICKET_JWT_ISSUER=\\u03a9mega\n" in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize("module", ["argparse", "pydantic"])  # the first import, and a late one
def test_interrupted_import_is_silent(tmp_path: Path, module: str) -> None:
    """Ctrl-C while the command loads ends it, without a traceback."""
    (tmp_path / f"{module}.py").write_text(
        "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nraise ImportError\n"
    )
    # SIGINT is ignored where the tests run in the background of a shell. A preexec_fn would fork,
    # and gRPC's threads, which live in this process, may then write to the child's stderr.
    heeds_interrupts = (
        "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); "
        "os.execv(sys.argv[1], sys.argv[1:])"
    )
    command_path = Path(sys.executable).with_name("chat-ticket-svc")
    done = subprocess.run(
        [sys.executable, "-c", heeds_interrupts, command_path, "serve"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


@pytest.mark.parametrize(
    ("words", "completions"),
    [("", COMMANDS), ("ex", ("export",)), ("erase --dr", ("--dry-run",))],
)
def test_bash_completes(words: str, completions: tuple[str, ...]) -> None:
    """By what `--print-completion bash` prints."""
    script = asyncio.run(command("--print-completion", "bash")).output
    line = ["chat-ticket-svc", *words.split(" ")]
    asked = "COMP_WORDS=(" + " ".join(f"'{word}'" for word in line) + ")"
    done = subprocess.run(
        ["bash", "--norc"],
        input=f"{script}\n{asked}; COMP_CWORD={len(line) - 1}\n"
        '"$(complete -p chat-ticket-svc | sed "s/.*-F \\([^ ]*\\).*/\\1/")"\n'
        'printf "%s\\n" "${COMPREPLY[@]}"\n',
        capture_output=True,
        text=True,
        check=True,
    )
    assert set(completions) <= set(done.stdout.split()), done
    assert "worker" not in done.stdout


async def test_abbreviated_option_is_refused() -> None:
    """It would pass by what looks for the option by its name."""
    done = await command("--print-compl", "bash")
    assert done.status == 2


def test_progress_bar_is_shown_on_a_terminal_without_a_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As those that a container or a CI gives, of 0 columns and 0 rows."""
    reader, terminal = pty.openpty()
    with os.fdopen(reader, "rb", 0) as screen, os.fdopen(terminal, "w") as errors:
        monkeypatch.setattr(sys, "stderr", errors)
        process = subprocess.Popen(["true"], stdout=subprocess.PIPE)
        with process, migrate._Report(process, quiet=True) as report:
            build = IndexBuild("chat_messages", "building", done=5, total=10)
            report.show([Activity(False, [], [], [], build)])
        os.set_blocking(reader, False)
        assert b"index of chat_messages, building:  50%" in (screen.read() or b"")
