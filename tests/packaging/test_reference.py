"""The reference of the API: one page, from the comments of the protos."""

import html
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet

ROOT = Path(__file__).parents[2]
BUILT = ROOT / "build" / "docs"


def test_the_page_has_all_that_the_protos_say() -> None:
    """What can be called or sent, and every comment on it; it needs no network to be read."""
    subprocess.run(["make", "docs"], cwd=ROOT, check=True, capture_output=True)
    page = (BUILT / "chat_ticket.v1.html").read_text()
    found = FileDescriptorSet.FromString((BUILT / "descriptor.pb").read_bytes())
    files = [file for file in found.file if file.package == "chat_ticket.v1"]
    assert len(files) == 5
    text = words(page)
    for file in files:
        for name in names(file):
            assert re.search(rf"\b{name}\b", text), name
    all_comments = [comment for file in files for comment in comments(file)]
    assert len(all_comments) > 150
    for comment in all_comments:
        assert comment in text, comment
    loaded = re.findall(r"""<(?:script|link|img)[^>]*?(?:src|href)=["']([^"']+)""", page)
    assert loaded
    assert all((BUILT / each).is_file() for each in loaded), loaded


def words(text: str) -> str:
    """As they are read: without tags, marks of code, and line breaks."""
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", text)).replace("`", " ").split())


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
