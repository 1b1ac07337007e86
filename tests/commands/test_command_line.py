"""The command line as people meet it: its help, and its completion in a shell."""

import asyncio
import re
import subprocess

import pytest
from support.process import command

COMMANDS = ("serve", "migrate", "migrate-status", "check", "token", "export", "erase")


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
    done = await command("destroy")
    assert done.status == 2
    assert "destroy" in done.errors


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
