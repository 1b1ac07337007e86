"""The reference of the API: one page, from the comments of the protos."""

import html
import re
import subprocess
from pathlib import Path

import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorSet, SourceCodeInfo

ROOT = Path(__file__).parent.parent
BUILT = ROOT / "build" / "docs"


@pytest.fixture(scope="module")
def page() -> str:
    subprocess.run(["make", "docs"], cwd=ROOT, check=True, capture_output=True)
    return (BUILT / "chat_ticket.v1.html").read_text()


@pytest.fixture(scope="module")
def files(page: str) -> FileDescriptorSet:
    """Ours, with their comments."""
    found = FileDescriptorSet.FromString((BUILT / "descriptor.pb").read_bytes())
    ours = [file for file in found.file if file.package == "chat_ticket.v1"]
    assert len(ours) == 5
    return FileDescriptorSet(file=ours)


def words(text: str) -> str:
    """As they are read: without tags, marks of code, and line breaks."""
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", text)).replace("`", " ").split())


def test_everything_that_can_be_called_or_sent_is_there(
    page: str, files: FileDescriptorSet
) -> None:
    text = words(page)
    for file in files.file:
        names = [service.name for service in file.service]
        names += [method.name for service in file.service for method in service.method]
        names += [message.name for message in file.message_type]
        names += [field.name for message in file.message_type for field in message.field]
        names += [enum.name for enum in file.enum_type]
        names += [value.name for enum in file.enum_type for value in enum.value]
        assert names
        for name in names:
            assert re.search(rf"\b{name}\b", text), name


def test_every_comment_is_there(page: str, files: FileDescriptorSet) -> None:
    text = words(page)
    locations: list[SourceCodeInfo.Location] = [
        location for file in files.file for location in file.source_code_info.location
    ]
    # Of a file itself, its package and imports, nothing is said to callers; and of a oneof, by the
    # comment of its message.
    of_parts = [
        each
        for each in locations
        if list(each.path[:1]) in ([4], [5], [6]) and list(each.path[2:3]) != [8]
    ]
    comments = [words(html.escape(each.leading_comments)) for each in of_parts]
    assert sum(map(bool, comments)) > 150
    for comment in comments:
        assert comment in text, comment


def test_it_needs_no_network(page: str) -> None:
    """It can be read where there is none, and tells nobody that it was read."""
    loaded = re.findall(r"""<(?:script|link|img)[^>]*?(?:src|href)=["']([^"']+)""", page)
    assert loaded
    assert all((BUILT / each).is_file() for each in loaded), loaded
