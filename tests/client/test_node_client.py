"""The npm package of clients/node: built, tested, packed, installed and run against the service."""

import contextlib
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.authority import Key
from support.npm import NODE_CLIENT, SECONDS, Npm
from support.process import ServerProcess, server_process

ROOT = Path(__file__).parents[2]
GENERATE = ROOT / "scripts" / "generate_node_client.py"
SERVICE_CONFIG = ROOT / "protos/chat_ticket/v1/chat_ticket_grpc_service_config.json"
TOKEN_SECONDS = 3


@pytest.fixture(scope="module")
def process(database: str) -> Iterator[ServerProcess]:
    """A server process for the tests of this file."""
    with server_process(database, CHAT_TICKET_ATTACHMENT_URL_CHECK="false") as process:
        yield process


@pytest.fixture(scope="module")
def tarball(
    node_client: Path, npm: Npm, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, set[str]]:
    """What npm pack writes: a file, and the paths in it."""
    directory = tmp_path_factory.mktemp("packed")
    [packed] = json.loads(npm(node_client, "pack", "--json", "--pack-destination", str(directory)))
    return directory / packed["filename"], {file["path"] for file in packed["files"]}


def test_generated_typescript_matches_the_protos(node_client: Path) -> None:
    """And the generated service config matches that of the protos."""
    command = [sys.executable, str(GENERATE), "--check"]
    done = subprocess.run(command, capture_output=True, check=False, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr


def test_package_passes_its_own_tests(node_client: Path, npm: Npm) -> None:
    """They run against a fake server, which fails as each test wants."""
    tests = sorted(str(path) for path in (node_client / "test").glob("*.test.mjs"))
    output = npm(node_client, "--test", "--test-timeout=20000", *tests, program="node")
    assert int(re.findall(r"^# pass (\d+)$", output, re.MULTILINE)[0]) >= 25


def test_calls_the_service(node_client: Path, npm: Npm, process: ServerProcess) -> None:
    """Creates, reads, lists and watches, and decodes the errors of refused calls."""
    tests = str(node_client / "test" / "service" / "calls.test.mjs")
    npm(node_client, "--test", tests, program="node", CHAT_TICKET_ADDRESS=process.address)


def test_guide_prints_what_it_shows(
    node_client: Path, npm: Npm, process: ServerProcess, tmp_path: Path
) -> None:
    """The blocks of docs/guides/node.md, in their order, are one program."""
    guide = (ROOT / "docs" / "guides" / "node.md").read_text()
    program, shown = (
        "\n".join(re.findall(rf"^```{kind}\n(.*?)^```$", guide, re.MULTILINE | re.DOTALL))
        for kind in ("js", "text")
    )
    (tmp_path / "node_modules").mkdir()
    (tmp_path / "node_modules" / "chat-ticket-client").symlink_to(node_client)
    (tmp_path / "chat.mjs").write_text(program.replace("localhost:50051", process.address))
    assert npm(tmp_path, "chat.mjs", program="node").split() == shown.split()


def test_packs_the_compiled_sources_and_nothing_else(
    node_client: Path, tarball: tuple[Path, set[str]]
) -> None:
    """No sources, no tests, no lock."""
    _, files = tarball
    sources = node_client / "src"
    compiled = {
        f"dist/{path.relative_to(sources).with_suffix('')}{suffix}"
        for path in sources.rglob("*.ts")
        for suffix in (".js", ".d.ts")
    }
    assert files == compiled | {"LICENSE", "README.md", "package.json"}


def copy_dependencies(package: Path, directory: Path) -> None:
    """Copy what a package needs at run time, without its development dependencies."""
    locked = json.loads((package / "package-lock.json").read_text())["packages"]
    for path, entry in locked.items():
        # A nested package is copied with the one that contains it.
        if path.count("node_modules/") == 1 and not entry.get("dev"):
            shutil.copytree(package / path, directory / path, symlinks=True)


def test_installs_alone_and_runs_what_its_readme_shows(
    node_client: Path,
    npm: Npm,
    process: ServerProcess,
    tarball: tuple[Path, set[str]],
    tmp_path: Path,
) -> None:
    """With grpc-js and protobuf only. The programs are as pasted, but for the address.

    They compile as TypeScript too. The service config is that of the protos.
    """
    copy_dependencies(node_client, tmp_path)
    (tmp_path / "package.json").write_text('{"private": true, "type": "module"}')
    # npm finds the dependencies in place, and needs no network.
    npm(tmp_path, "install", "--offline", "--ignore-scripts", "--no-audit", str(tarball[0]))
    modules = {path.name for path in (tmp_path / "node_modules").iterdir()}
    assert {"chat-ticket-client", "@grpc", "@bufbuild"} <= modules
    assert not modules & {"typescript", "ts-proto"}

    readme = (node_client / "README.md").read_text()
    use, tokens = re.findall(r"^```js\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL)
    wrong = "import { ChatSession } from 'chat-ticket-client'\nChatSession.create({ id: 1 })"
    for name, program in (("use", use), ("tokens", tokens), ("wrong", wrong)):
        (tmp_path / f"{name}.mts").write_text(program)
    compiler = str(node_client / "node_modules" / "typescript" / "bin" / "tsc")
    check = (compiler, "--noEmit", "--strict", "--module", "nodenext", "--types", "node")
    with pytest.raises(AssertionError) as failed:
        npm(tmp_path, *check, "use.mts", "tokens.mts", "wrong.mts", program="node")
    errors = re.findall(r"^(\S+?)\(.*error (TS\d+)", str(failed.value), re.MULTILINE)
    assert errors == [("wrong.mts", "TS2322")], failed.value

    (tmp_path / "use.mjs").write_text(use.replace("localhost:50051", process.address))
    (tmp_path / "tokens.mjs").write_text(
        f"{tokens}\nimport {{ channelOptions }} from 'chat-ticket-client'\n"
        "console.log(channelOptions('localhost:1')['grpc.service_config'])"
    )
    *shown, one, other = npm(tmp_path, "use.mjs", program="node").splitlines()
    assert shown == [
        "1n Where is my order?",
        "revision 1: Where is my order?",
        "INVALID_ARGUMENT INVALID_ARGUMENT",
    ]
    assert [one.partition(": ")[0], other.partition(": ")[0]] == ["session.id", "update_mask"]
    config = json.loads(npm(tmp_path, "tokens.mjs", program="node"))
    assert config.pop("loadBalancingConfig") == [{"round_robin": {}}]
    assert config == json.loads(SERVICE_CONFIG.read_text())


class Watcher:
    """test/service/restarts.mjs, and what it has printed so far."""

    def __init__(self, *arguments: str):
        self.lines: list[dict[str, Any]] = []
        self._changed = threading.Condition()
        self.popen = subprocess.Popen(
            ["node", NODE_CLIENT / "test" / "service" / "restarts.mjs", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.popen.stdout is not None
        for line in self.popen.stdout:
            with self._changed:
                self.lines.append(json.loads(line))
                self._changed.notify_all()

    def wait_for(self, condition: Callable[[], bool]) -> None:
        with self._changed:
            assert self._changed.wait_for(condition, SECONDS), self.lines[-5:]

    def proceed(self) -> None:
        assert self.popen.stdin is not None
        self.popen.stdin.write("\n")
        self.popen.stdin.flush()

    def end(self) -> int:
        """Its exit status, when it ends by itself."""
        status = self.popen.wait(SECONDS)
        self._reader.join()
        return status

    def close(self) -> None:
        self.popen.kill()
        self.end()
        for stream in (self.popen.stdin, self.popen.stdout):
            assert stream is not None
            stream.close()

    def all(self, key: str) -> list[Any]:
        return [line[key] for line in self.lines if key in line]

    def messages(self) -> list[tuple[str, int]]:
        found = (line.get("messages") or [] for line in self.lines)
        return [(id_, sequence) for messages in found for id_, sequence in messages]


@contextlib.contextmanager
def renewed(path: Path, key: Key) -> Iterator[None]:
    """A file with a token that is about to expire, and always another one."""
    stopped = threading.Event()

    def write() -> None:
        new = path.with_suffix(".new")
        new.write_text(key.token(exp=int(time.time()) + TOKEN_SECONDS))
        new.replace(path)

    def renew() -> None:
        while not stopped.wait(0.25):
            write()

    write()
    thread = threading.Thread(target=renew)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()


def test_watch_delivers_every_event_once_while_servers_fail(
    node_client: Path, database: str, process: ServerProcess, tenant: str, tmp_path: Path
) -> None:
    """They are killed and drained while tokens expire. The session is deleted during an outage."""
    key, port = Key(), "0"
    settings = {
        f"CHAT_TICKET_{name.upper()}": value for name, value in key.trusted(tmp_path).items()
    }
    settings |= {"CHAT_TICKET_AUTH": "jwt", "CHAT_TICKET_DRAIN_SECONDS": "1"}

    with contextlib.ExitStack() as stack:

        def start() -> ServerProcess:
            server = server_process(database, **settings, CHAT_TICKET_PORT=port)
            return stack.enter_context(server)  # type: ignore[no-any-return]

        server = start()
        address = server.address
        port = address.rpartition(":")[2]
        token = tmp_path / "token"
        stack.enter_context(renewed(token, key))
        watcher = Watcher(address, process.address, tenant, str(token))
        stack.callback(watcher.close)

        def more(count: int) -> None:
            goal = len(watcher.messages()) + count
            watcher.wait_for(lambda: len(watcher.messages()) >= goal)

        more(10)
        watcher.wait_for(lambda: any("EXPIRED" in why for why in watcher.all("interruption")))
        # A token may expire just when a server drains, and then there is no watch to end.
        for number in (signal.SIGKILL, *[signal.SIGTERM] * 5):
            server.stop(number)
            server = start()
            more(10)
            if any("DRAINING" in why for why in watcher.all("interruption")):
                break
        watcher.proceed()
        watcher.wait_for(lambda: len(watcher.all("written")) == 1)
        [written] = watcher.all("written")
        watcher.wait_for(lambda: len(watcher.messages()) >= len(written))
        server.stop(signal.SIGKILL)
        watcher.proceed()
        watcher.wait_for(lambda: watcher.all("deleted") == [True])
        start()
        assert watcher.end() == 0

    assert watcher.messages() == [(id_, number) for number, id_ in enumerate(written, 1)]
    events = watcher.all("event")
    assert (events[0], events[-1]) == ("session", "sessionDeleted")
    assert (events.count("session"), events.count("caughtUp")) == (1, 1)
    assert set(events[1:-1]) <= {"messagesCreated", "caughtUp", "heartbeat"}
    revisions = watcher.all("revision")
    assert revisions == sorted(revisions)
    assert any("DRAINING" in why for why in watcher.all("interruption"))
    assert any("UNAVAILABLE" in why for why in watcher.all("interruption"))
