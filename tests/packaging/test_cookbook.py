"""The commands of the grpcurl guide print every line that it shows."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.process import server_process
from support.tools import needs_grpcurl

from chat_ticket_svc.commands.token import development_settings

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "guides" / "grpcurl.md").read_text()
BETWEEN = "---- the next block ----"

pytestmark = [pytest.mark.usefixtures("feed_turn"), needs_grpcurl]


def blocks() -> list[tuple[str, list[str]]]:
    """The commands of each block, and the lines that they print."""
    found = re.findall(r"^```(\w+)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    commands = [text for kind, text in found if kind == "sh"]
    shown = [text.splitlines() for kind, text in found if kind == "text"]
    assert [kind for kind, _ in found] == ["sh", "text"] * len(commands), "in turns"
    return list(zip(commands, shown, strict=True))


@pytest.fixture(scope="module")
def addresses(database: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The addresses in the guide, and those of the tests."""
    directory = tmp_path_factory.mktemp("development")
    jwt = {
        f"CHAT_TICKET_{name.upper()}": value
        for name, value in development_settings(directory).items()
    }
    # One of the commands is rejected by the check.
    checks = {"CHAT_TICKET_ATTACHMENT_URL_CHECK": "true"}
    with (
        server_process(database, **checks) as open_to_all,
        server_process(database, CHAT_TICKET_AUTH="jwt", **jwt, **checks) as with_tokens,
    ):
        for process in (open_to_all, with_tokens):
            process.wait_for("serving")
        yield {
            "localhost:50051": open_to_all.address,
            "localhost:50061": with_tokens.address,
            "--directory .data": f"--directory '{directory}'",
        }


def printed(addresses: dict[str, str]) -> list[str]:
    """What each block prints, in one shell."""
    script = f"\necho '{BETWEEN}'\n".join(commands for commands, _ in blocks())
    for name, value in addresses.items():
        assert name in script
        script = script.replace(name, value)
    done = subprocess.run(
        ["bash", "--norc"],
        input=f"exec 2>&1\n{script}",
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=110,
    )
    assert not done.stderr
    return done.stdout.split(BETWEEN)


def test_every_command_prints_what_is_shown(addresses: dict[str, str]) -> None:
    """And again, as all ids are chosen."""
    for _ in range(2):
        for (commands, lines), output in zip(blocks(), printed(addresses), strict=True):
            position = 0
            for line in lines:
                found = output.find(line, position)
                assert found >= 0, f"{commands}\nprinted no {line!r}, but\n{output}"
                position = found + 1
