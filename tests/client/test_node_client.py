"""The npm package of clients/node: built, tested, packed, installed and run against the service."""

import contextlib
import fcntl
import hashlib
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
from support.process import ServerProcess, server_process

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "clients" / "node"
GENERATE = ROOT / "scripts" / "generate_node_client.py"
SERVICE_CONFIG = ROOT / "protos/chat_ticket/v1/chat_ticket_grpc_service_config.json"
SECONDS = 100  # more than any of these programs takes
TOKEN_SECONDS = 2

Npm = Callable[..., str]


@pytest.fixture(scope="session")
def npm(node: str, environment: dict[str, str]) -> Npm:
    """`npm(directory, …)`: run npm, or another program of Node, and return what it prints."""

    def run(directory: Path, *command: str, program: str = "npm", **variables: str) -> str:
        path = shutil.which(program)
        assert path is not None
        done = subprocess.run(
            [path, *command],
            cwd=directory,
            env={**environment, **variables},
            capture_output=True,
            check=False,
            encoding="utf-8",
            timeout=SECONDS,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


@pytest.fixture(scope="session")
def package(npm: Npm) -> Path:
    """clients/node, with its dependencies installed, and built; both only when they changed."""

    def outdated(name: str, *inputs: Path) -> Path | None:
        content = b"".join(path.read_bytes() for path in sorted(inputs))
        stamp = PACKAGE / "node_modules" / f".{name}-{hashlib.sha256(content).hexdigest()[:16]}"
        return None if stamp.exists() else stamp

    lock, sources = PACKAGE / "package-lock.json", (PACKAGE / "src").rglob("*.ts")
    with lock.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # other workers wait
        if (stamp := outdated("installed", lock)) is not None:
            npm(PACKAGE, "ci", "--prefer-offline", "--no-progress")
            stamp.touch()
        settings = [PACKAGE / name for name in ("package.json", "tsconfig.json", lock.name)]
        stamp = outdated("built", *settings, *sources)
        if stamp is not None or not (PACKAGE / "dist").exists():
            for stale in (PACKAGE / "node_modules").glob(".built-*"):
                stale.unlink()
            npm(PACKAGE, "run", "build")
            if stamp is not None:
                stamp.touch()
    return PACKAGE


@pytest.fixture(scope="module")
def process(database: str) -> Iterator[ServerProcess]:
    """A server process for the tests of this file."""
    with server_process(database, CHAT_TICKET_ATTACHMENT_URL_CHECK="false") as process:
        yield process


def test_generated_typescript_is_what_the_protos_generate(package: Path) -> None:
    """And the service config with it."""
    command = [sys.executable, str(GENERATE), "--check"]
    done = subprocess.run(command, capture_output=True, check=False, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr


def test_passes_its_own_checks(package: Path, npm: Npm) -> None:
    """They use a server that breaks streams on request."""
    tests = sorted(str(path) for path in (package / "test").glob("*.test.mjs"))
    output = npm(package, "--test", "--test-timeout=20000", *tests, program="node")
    assert int(re.findall(r"^# pass (\d+)$", output, re.MULTILINE)[0]) >= 25


def test_calls_the_service(package: Path, npm: Npm, process: ServerProcess) -> None:
    """Creates, reads, lists and watches, and reports errors with their reason."""
    tests = str(package / "test" / "service" / "calls.test.mjs")
    npm(package, "--test", tests, program="node", CHAT_TICKET_ADDRESS=process.address)


def test_guide_prints_what_it_shows(
    package: Path, npm: Npm, process: ServerProcess, tmp_path: Path
) -> None:
    """The blocks of docs/guides/node.md, in their order, are one program."""
    guide = (PACKAGE.parents[1] / "docs" / "guides" / "node.md").read_text()
    program, shown = (
        "\n".join(re.findall(rf"^```{kind}\n(.*?)^```$", guide, re.MULTILINE | re.DOTALL))
        for kind in ("js", "text")
    )
    (tmp_path / "node_modules").mkdir()
    (tmp_path / "node_modules" / "chat-ticket-client").symlink_to(package)
    (tmp_path / "chat.mjs").write_text(program.replace("localhost:50051", process.address))
    assert npm(tmp_path, "chat.mjs", program="node").split() == shown.split()


def packed(npm: Npm, *options: str) -> tuple[str, list[str]]:
    """What npm pack writes: the name of the file, and those of the files in it."""
    [made] = json.loads(npm(PACKAGE, "pack", "--json", *options))
    return made["filename"], [file["path"] for file in made["files"]]


def test_packs_what_is_built_and_nothing_else(package: Path, npm: Npm) -> None:
    """No sources, no tests, no lock."""
    _, files = packed(npm, "--dry-run")
    inside = [path for path in files if "/" in path]
    assert set(files) - set(inside) == {"README.md", "package.json"}
    sources = [
        path.relative_to(package / "src").with_suffix("")
        for path in (package / "src").rglob("*.ts")
    ]
    built = {f"dist/{path}{kind}" for path in sources for kind in (".js", ".d.ts")}
    assert set(inside) == built


def test_installs_alone_and_runs_what_its_readme_shows(
    package: Path, npm: Npm, process: ServerProcess, tmp_path: Path
) -> None:
    """With grpc-js and protobuf only. The programs are as pasted, but for the address.

    They are right as TypeScript too. And the service config is that of the protos.
    """
    name, _ = packed(npm, "--pack-destination", str(tmp_path))
    (tmp_path / "package.json").write_text('{"private": true, "type": "module"}')
    options = ("--prefer-offline", "--ignore-scripts", "--no-audit", "--no-fund", "--no-progress")
    npm(tmp_path, "install", *options, f"./{name}")
    modules = {path.name for path in (tmp_path / "node_modules").iterdir()}
    assert {"chat-ticket-client", "@grpc", "@bufbuild"} <= modules
    assert not modules & {"typescript", "ts-proto"}

    readme = (package / "README.md").read_text()
    use, tokens = re.findall(r"^```js\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL)
    wrong = "import { ChatSession } from 'chat-ticket-client'\nChatSession.create({ id: 1 })"
    for name, program in (("use", use), ("tokens", tokens), ("wrong", wrong)):
        (tmp_path / f"{name}.mts").write_text(program)
    compiler = str(package / "node_modules" / "typescript" / "bin" / "tsc")
    check = (compiler, "--noEmit", "--strict", "--module", "nodenext", "--types", "node")
    npm(tmp_path, *check, "use.mts", "tokens.mts", program="node")
    with pytest.raises(AssertionError, match="TS2322"):
        npm(tmp_path, *check, "wrong.mts", program="node")

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

    def __init__(self, node: str, *arguments: str):
        self.events: list[dict[str, Any]] = []
        self._changed = threading.Condition()
        self.popen = subprocess.Popen(
            [node, PACKAGE / "test" / "service" / "restarts.mjs", *arguments],
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
                self.events.append(json.loads(line))
                self._changed.notify_all()

    def wait_for(self, condition: Callable[[], bool]) -> None:
        with self._changed:
            assert self._changed.wait_for(condition, SECONDS), self.events[-5:]

    def go_on(self) -> None:
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
        return [line[key] for line in self.events if key in line]

    def messages(self) -> list[tuple[str, int]]:
        found = (line.get("messages") or [] for line in self.events)
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


def test_watch_delivers_everything_once_while_servers_restart(
    package: Path, node: str, database: str, process: ServerProcess, tenant: str, tmp_path: Path
) -> None:
    """Killed, drained and gone while tokens expire; and the session is deleted meanwhile."""
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
        watcher = Watcher(node, address, process.address, tenant, str(token))
        stack.callback(watcher.close)

        def more(count: int) -> None:
            goal = len(watcher.messages()) + count
            watcher.wait_for(lambda: len(watcher.messages()) >= goal)

        more(10)
        watcher.wait_for(lambda: any("EXPIRED" in why for why in watcher.all("interruption")))
        for number in (signal.SIGKILL, signal.SIGTERM):
            server.stop(number)
            server = start()
            more(10)
        watcher.go_on()
        watcher.wait_for(lambda: len(watcher.all("written")) == 1)
        [written] = watcher.all("written")
        watcher.wait_for(lambda: len(watcher.messages()) >= len(written))
        server.stop(signal.SIGKILL)
        watcher.go_on()
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
