"""The programs in the README and in the guides, against a running service."""

import re
import sys
from pathlib import Path

import pytest
from support.tools import run_program

from chat_ticket_svc.server import Server

ROOT = Path(__file__).parents[2]


def blocks(path: Path, language: str) -> list[str]:
    """The code blocks of a page in one language."""
    pattern = rf"^```{language}\n(.*?)^```$"
    return re.findall(pattern, path.read_text(), re.MULTILINE | re.DOTALL)


async def output_of(path: Path, server: Server) -> str:
    """What the Python blocks of a page print, as one program; the address alone is changed."""
    program = "\n".join(blocks(path, "python"))
    assert "localhost:50051" in program
    program = program.replace("localhost:50051", f"localhost:{server.port}")
    output, _ = await run_program(sys.executable, "-W", "error", "-c", program)
    return output


@pytest.mark.parametrize(
    "page",
    [
        "guides/python",
        "guides/cookbook",
        "guides/streaming",
        "guides/search",
        "concepts/conditional-writes",
    ],
)
async def test_page_prints_what_it_shows(server: Server, page: str) -> None:
    """The blocks in their order, and all of their output."""
    path = ROOT / "docs" / f"{page}.md"
    assert await output_of(path, server) == "".join(blocks(path, "text"))


async def test_readme_shows_python_that_runs(server: Server) -> None:
    """It prints the message that it has created, and ends when it has caught up."""
    output = await output_of(ROOT / "README.md", server)
    assert 'content: "Hello!"' in output
    assert "caught_up" in output


def test_readme_fits_on_a_page() -> None:
    """Everything else is in docs."""
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 120
    assert len(text.encode()) <= 8192


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"])
def test_links_lead_to_files(name: str) -> None:
    """Those within the repository; `make docs` checks the pages of the site."""
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", (ROOT / name).read_text())
    for link in links:
        assert "://" in link or (ROOT / link).exists(), link
