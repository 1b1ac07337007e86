"""The site of the documentation: it builds, and has all that the code and the protos say."""

import html
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc_tools
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet
from grpc_tools import protoc

ROOT = Path(__file__).parents[2]
BUILT = ROOT / "build" / "docs"


@pytest.fixture(scope="module")
def site() -> dict[str, str]:
    """The pages of a fresh build, by their path. The build fails on links that lead nowhere."""
    subprocess.run(["make", "docs"], cwd=ROOT, check=True, capture_output=True, timeout=110)
    return {str(path.relative_to(BUILT)): path.read_text() for path in BUILT.rglob("*.html")}


def test_reference_is_what_the_code_says() -> None:
    """Settings, errors, metrics, commands and the API: `make reference` would change nothing."""
    command = [sys.executable, "scripts/generate_reference.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_api_reference_has_all_that_the_protos_say(site: dict[str, str], tmp_path: Path) -> None:
    """Everything that can be called or sent, and every comment on it."""
    files = [file for file in descriptors(tmp_path).file if file.package == "chat_ticket.v1"]
    assert len(files) == 5
    pages = [page for path, page in site.items() if path.startswith("reference/api/")]
    assert len(pages) == 5
    text = words(" ".join(pages))
    for file in files:
        for name in names(file):
            assert re.search(rf"\b{name}\b", text), name
    all_comments = [comment for file in files for comment in comments(file)]
    assert len(all_comments) > 150
    for comment in all_comments:
        assert comment in text, comment


def test_site_needs_no_network(site: dict[str, str]) -> None:
    """Every script, style and picture is a file of the site."""
    for path, page in site.items():
        if path == "404.html":  # served from anywhere, so its links begin at the root
            continue
        loaded = re.findall(r"""<(?:script|link|img)[^>]*?(?:src|href)=["']?([^"' >]+)""", page)
        assert loaded, path
        for each in loaded:
            place = (BUILT / path).parent / each.partition("#")[0].partition("?")[0]
            assert place.exists(), f"{path} loads {each}"


def descriptors(directory: Path) -> FileDescriptorSet:
    """Those of the protos, with their comments."""
    out = directory / "descriptors"
    protos = [str(path) for path in (ROOT / "protos" / "chat_ticket" / "v1").glob("*.proto")]
    includes = [ROOT / "protos", Path(grpc_tools.__file__).parent / "_proto"]
    arguments = [f"-I{include}" for include in includes]
    arguments += ["--include_source_info", f"--descriptor_set_out={out}"]
    assert protoc.main(["protoc", *arguments, *protos]) == 0
    return FileDescriptorSet.FromString(out.read_bytes())


def words(text: str) -> str:
    """As they are read: without tags, marks of code and lists, and line breaks."""
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
        is_of_oneof = list(location.path[2:3]) == [8]
        if comment and list(location.path[:1]) in ([2], [4], [5], [6]) and not is_of_oneof:
            yield comment
