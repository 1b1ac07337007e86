"""Generates the synchronous client from the asyncio one. With --check, only compares them.

A replacement that matches nothing is an error, so none can become stale.
"""

import argparse
import re
import subprocess
import sys
import sysconfig
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent
CLIENT = ROOT / "src/chat_ticket/client"
FILES = {
    "_async.py": "_sync.py",
    "_follow_async.py": "_follow_sync.py",
    "_resumed_async.py": "_resumed_sync.py",
}

HEADER = '''"""The synchronous client. Generated from {source} by scripts/generate_sync_client.py.

Do not edit it: change {source} and run `make proto`.
"""
'''

# Parts of the docstrings that differ.
TEXTS = [
    (
        """\
    Create the client inside the event loop that uses it, and close it. A cancelled task cancels
    its call and gets asyncio.CancelledError as usual.
""",
        """\
    Threads can share a client: its methods, and its stubs, are thread-safe. Close it at the end;
    that cancels the calls of all threads.
""",
    ),
    (
        """\
    - `token`: sent as `authorization: Bearer`. A string, or a function or coroutine function that
      returns one. The function is called for each call, so it should cache its result until that
      is about to expire; if it raises, so does the call.
""",
        """\
    - `token`: sent as `authorization: Bearer`. A string, or a function that returns one. The
      function is called for each call, in the thread of that call, so it must be thread-safe and
      should cache its result until that is about to expire; if it raises, so does the call.
""",
    ),
    (
        "It retries without a limit; set one with asyncio.timeout.\n"
        "        Each retry is logged by the logger `chat_ticket.client`.",
        "It retries without a limit.\n"
        "        Each retry is logged by the logger `chat_ticket.client`.",
    ),
    (
        """\
        The watch ends after `session_deleted`, and by CallCancelledError when the client is
        closed. When you leave the loop or cancel the task, the stream ends at the server too. If
        you hold the iterator itself, close it with `aclose` or contextlib.aclosing.
""",
        """\
        The watch ends after `session_deleted`, and by CallCancelledError when the client is
        closed, by whichever thread. When you leave the loop, the stream ends at the server too. If
        you hold the iterator itself, close it with `close` or contextlib.closing, in the thread
        that reads it.
""",
    ),
]

# Regular expressions for the code.
CODE = [
    # A writer of drafts reads and writes at once, which takes a task.
    (r"\n    def write\(.*?(?=\n    async def )", ""),
    (r"\bAsyncChatTicketClient\b", "ChatTicketClient"),
    (r"\b(\w+)AsyncStub\b", r"\1Stub"),
    (r"\basync (def|with|for)\b", r"\1"),
    (r"\bawait ", ""),
    (r"\bAwaitable\[(\w+)\]", r"\1"),
    (r"\bAsyncGenerator\[(\w+), None\]", r"Generator[\1, None, None]"),
    (r"\bAsyncGenerator, (Awaitable, )?", "Generator, "),
    (r"\baclosing\b", "closing"),
    (r"\b__a(enter|exit)__\b", r"__\1__"),
    (r"\bimport _runtime_asyncio as runtime\b", "import _runtime_threads as runtime"),
    (r"\b_(follow|resumed)_async\b", r"_\1_sync"),
    (r"\bclient\._async\b", "client._sync"),
    # The stubs are imported already, under the names that the second replacement gives.
    (r"\nif TYPE_CHECKING:  # the type stubs.*?\n\n", "\n"),
    (r"\bTYPE_CHECKING, (?=Any, Self)", ""),
    (r'"(ChatTicketServiceStub|Chat(?:Session|Message|Draft|Attachment)ServiceStub)"', r"\1"),
]


def generate() -> dict[Path, str]:
    """The texts of the synchronous client."""
    used: Counter[str] = Counter()
    texts = {}
    for source, target in FILES.items():
        header = HEADER.format(source=source)
        text = header + (CLIENT / source).read_text().split("\n", 1)[1]
        for old, new in TEXTS:
            used[old] += text.count(old)
            text = text.replace(old, new)
        for pattern, replacement in CODE:
            text, count = re.subn(pattern, replacement, text, flags=re.DOTALL)
            used[pattern] += count
        if left := re.search(r"async|await", text.removeprefix(header)):
            sys.exit(f"still in {target}: {left.group()}")
        texts[CLIENT / target] = formatted(text, CLIENT / target)
    for old, count in used.items():
        if not count:
            sys.exit(f"nothing matches any more: {old}")
    return texts


def formatted(text: str, target: Path) -> str:
    ruff = Path(sysconfig.get_path("scripts")) / "ruff"
    for arguments in (["check", "--fix", "--quiet"], ["format", "--quiet"]):
        command = [str(ruff), *arguments, "--stdin-filename", str(target), "-"]
        done = subprocess.run(command, input=text, check=True, capture_output=True, text=True)
        text = done.stdout
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    for target, text in generate().items():
        if not check:
            target.write_text(text)
        elif not target.exists() or target.read_text() != text:
            sys.exit(f"not what its source generates (make proto): {target.name}")


if __name__ == "__main__":
    main()
