"""The documentation site builds, and has everything of the code and the protos."""

import html
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from support.proto_comments import descriptors

ROOT = Path(__file__).parents[2]

# The first build sets up .venv-docs.
pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh build. It fails on a link that leads nowhere."""
    directory = tmp_path_factory.mktemp("site")
    command = ["make", "docs", f"SITE={directory}"]
    done = subprocess.run(
        command, cwd=ROOT, check=False, capture_output=True, text=True, timeout=290
    )
    assert done.returncode == 0, done.stdout
    return directory


def test_reference_matches_the_code() -> None:
    """Settings, errors, metrics, commands and the API: `make reference` would change nothing."""
    command = [sys.executable, "scripts/generate_reference.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_api_reference_has_all_that_the_protos_say(site: Path, tmp_path: Path) -> None:
    """Everything that can be called or sent, and every comment on it."""
    files = [file for file in descriptors(tmp_path).file if file.package == "chat_ticket.v1"]
    assert len(files) == 6
    pages = [path.read_text() for path in site.glob("reference/api/*.html")]
    assert len(pages) == 6
    text = words(" ".join(pages))
    for file in files:
        for name in names(file):
            assert re.search(rf"\b{name}\b", text), name
    all_comments = [comment for file in files for comment in comments(file)]
    assert len(all_comments) > 150
    for comment in all_comments:
        assert comment in text, comment


def test_site_needs_no_network(site: Path) -> None:
    """Every script, style and picture is a file of the site."""
    for path in site.rglob("*.html"):
        if path.name == "404.html":  # served at any path, so its links begin at the root
            continue
        loaded = re.findall(
            r"""<(?:script|link|img)[^>]*?(?:src|href)=["']?([^"' >]+)""", path.read_text()
        )
        assert loaded, path
        for each in loaded:
            assert (path.parent / each.partition("?")[0]).exists(), f"{path} loads {each}"


def test_search_works_from_disk(site: Path) -> None:
    """A page that is opened from disk can load scripts, but no JSON and no worker."""
    assert (site / "search" / "search_index.js").read_text().startswith("var __index = ")
    assert "assets/iframe-worker.js" in (site / "guides" / "python.html").read_text()


def test_build_fails_on_broken_links(tmp_path: Path) -> None:
    """It names each: a page, a heading, or an absolute path that is not there."""
    links = ["nothing.md", "security.md#nothing", "/security.md"]
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    shutil.copy(ROOT / "CONTRIBUTING.md", tmp_path)
    with (tmp_path / "docs" / "index.md").open("a") as page:
        page.writelines(f"\n[broken]({link})\n" for link in links)
    mkdocs = ROOT / ".venv-docs" / "bin" / "mkdocs"
    subprocess.run(["make", "venv-docs"], cwd=ROOT, check=True, capture_output=True)
    done = subprocess.run(
        [mkdocs, "build"], cwd=tmp_path, check=False, capture_output=True, text=True, timeout=290
    )
    assert done.returncode != 0
    for link in links:
        assert f"'{link}'" in done.stderr


def words(text: str) -> str:
    """As they are read: without tags, marks of code and lists, and line breaks."""
    text = re.sub(r"</?a\b[^>]*>", "", text)  # a link may be followed by a full stop
    text = html.unescape(re.sub(r"<[^>]*>", " ", text))
    return " ".join(re.sub("[`¶•]", " ", text).split())


def names(file: FileDescriptorProto) -> Iterator[str]:
    """Of all that can be called or sent."""
    for service in file.service:
        yield service.name
        yield from (method.name for method in service.method)
    for message in file.message_type:
        yield message.name
        yield from (field.name for field in message.field)
    for enum in file.enum_type:
        yield enum.name
        yield from (value.name for value in enum.value)


def comments(file: FileDescriptorProto) -> Iterator[str]:
    """Of the package and all that it has. Comments on a file or an import are not for callers, and
    of a oneof the page has the comment of its message.
    """
    for location in file.source_code_info.location:
        # Without the marks of list items and headings, which are not text of the page.
        text = re.sub(r"^ *(?:-|#+) ", "", location.leading_comments, flags=re.MULTILINE)
        comment = words(html.escape(text))
        # `oneof_decl` of a message, which may be nested in another.
        is_of_oneof = list(location.path[:1]) == [4] and list(location.path[-2:-1]) == [8]
        if comment and list(location.path[:1]) in ([2], [4], [5], [6]) and not is_of_oneof:
            yield comment
