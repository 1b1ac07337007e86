"""The distribution chat-ticket-client: what its wheel holds, and that it needs nothing else."""

import asyncio
import json
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest
from grpc_tools import protoc

from chat_ticket_svc.server import Server

ROOT = Path(__file__).parents[2]
CLIENT = ROOT / "clients" / "python"
SOURCES = ROOT / "src" / "chat_ticket"
PROTOS = ROOT / "protos"
SERVICE_CONFIG = "chat_ticket/v1/chat_ticket_grpc_service_config.json"

PROGRAM = """
import asyncio, sys, uuid
from chat_ticket.client import AsyncChatTicketClient, ChatTicketClient
from chat_ticket.errors import InvalidArgumentError
from chat_ticket.v1.chat_message_pb2 import CreateChatMessageRequest
from chat_ticket.v1.chat_session_pb2 import CreateChatSessionRequest
from chat_ticket.v1.resources_pb2 import CHAT_MESSAGE_ROLE_USER, ChatMessage, ChatSession

_, target, tenant = sys.argv


def requests():
    session = ChatSession(id=str(uuid.uuid4()))
    message = ChatMessage(role=CHAT_MESSAGE_ROLE_USER, content="hello")
    wrong = ChatMessage(role=CHAT_MESSAGE_ROLE_USER)
    return (
        CreateChatSessionRequest(session=session),
        CreateChatMessageRequest(session_id=session.id, message=message),
        CreateChatMessageRequest(session_id=session.id, message=wrong),
        session.id,
    )


async def with_asyncio():
    create, say, wrong, session_id = requests()
    async with AsyncChatTicketClient(target, tenant=tenant) as client:
        await client.retry(client.sessions.CreateChatSession, create)
        await client.messages.CreateChatMessage(say)
        async for event in client.watch(session_id):
            print("asyncio", event.WhichOneof("event"))
            if event.WhichOneof("event") == "caught_up":
                break
        try:
            await client.messages.CreateChatMessage(wrong)
        except InvalidArgumentError as error:
            print("asyncio", *(violation.field for violation in error.violations))


def with_threads():
    create, say, wrong, session_id = requests()
    with ChatTicketClient(target, tenant=tenant) as client:
        client.retry(client.sessions.CreateChatSession, create)
        client.messages.CreateChatMessage(say)
        for event in client.watch(session_id):
            print("threads", event.WhichOneof("event"))
            if event.WhichOneof("event") == "caught_up":
                break
        try:
            client.messages.CreateChatMessage(wrong)
        except InvalidArgumentError as error:
            print("threads", *(violation.field for violation in error.violations))


asyncio.run(with_asyncio())
with_threads()
"""
STEPS = ("session", "messages_created", "caught_up", "message.content")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The client's wheel, built as pip would."""
    output = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", output],
        cwd=CLIENT,
        check=True,
        capture_output=True,
        timeout=60,
    )
    [path] = output.glob("*.whl")
    return path


def test_clone_without_symbolic_links_builds_no_empty_wheel(tmp_path: Path) -> None:
    """git writes links as files there (core.symlinks=false). The build fails and says so."""
    for path in CLIENT.iterdir():
        if path.is_file():
            shutil.copy(path, tmp_path)
    (tmp_path / "chat_ticket").write_text("../../src/chat_ticket")
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path / "dist"],
        cwd=tmp_path,
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode != 0
    assert "clients/python/chat_ticket is no directory" in done.stderr
    assert not list(tmp_path.glob("dist/*.whl"))


def files(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_wheel_has_the_package_and_the_protos(wheel: Path) -> None:
    """And nothing else; where the sources have links, it has files."""
    sources = {
        f"chat_ticket/{path.relative_to(SOURCES)}": path
        for path in SOURCES.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    # Whether rglob looks into the link to the protos depends on the version of Python.
    sources = {name: path for name, path in sources.items() if "/protos/" not in name}
    protos = {
        f"chat_ticket/protos/{path.relative_to(PROTOS)}": path for path in PROTOS.rglob("*.proto")
    }
    shipped = {name: data for name, data in files(wheel).items() if ".dist-info/" not in name}
    expected = {name: path.read_bytes() for name, path in (sources | protos).items()}
    assert {"chat_ticket/py.typed", "chat_ticket/client/_sync.py", SERVICE_CONFIG} <= set(expected)
    assert shipped == expected
    assert shipped[SERVICE_CONFIG] == (PROTOS / SERVICE_CONFIG).read_bytes()


def test_sdist_builds_the_same_wheel(wheel: Path, tmp_path: Path) -> None:
    """Nothing in it is a link to a file of the repository."""
    build = [sys.executable, "-m", "hatchling", "build", "-d", str(tmp_path)]
    subprocess.run([*build, "-t", "sdist"], cwd=CLIENT, check=True, capture_output=True, timeout=60)
    [sdist] = tmp_path.glob("*.tar.gz")
    # Not by extractall: Python 3.11.2 knows no filter, and later ones warn without it.
    subprocess.run([sys.executable, "-m", "tarfile", "-e", sdist, tmp_path], check=True, timeout=60)
    directory = tmp_path / sdist.name.removesuffix(".tar.gz")
    subprocess.run(
        [*build, "-t", "wheel"], cwd=directory, check=True, capture_output=True, timeout=60
    )
    [built] = tmp_path.glob("*.whl")
    assert files(built) == files(wheel)


def test_wheel_has_the_license(wheel: Path) -> None:
    texts = [data for name, data in files(wheel).items() if name.endswith("/licenses/LICENSE")]
    assert texts == [(ROOT / "LICENSE").read_bytes()]
    assert (ROOT / "clients" / "node" / "LICENSE").read_bytes() == texts[0]


def test_protos_in_the_wheel_compile(wheel: Path, tmp_path: Path) -> None:
    """With the package's directory of protos as the only root, besides protobuf's own."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    root = tmp_path / "chat_ticket" / "protos"
    own = Path(protoc.__file__).parent / "_proto"
    protos = [str(path) for path in root.rglob("*.proto")]
    assert protos
    assert protoc.main(["", f"-I{root}", f"-I{own}", f"--python_out={tmp_path}", *protos]) == 0


def test_it_depends_on_grpcio_and_protobuf_only(wheel: Path) -> None:
    """And the server needs the version that is built with it."""
    [metadata] = [data for name, data in files(wheel).items() if name.endswith("/METADATA")]
    headers = HeaderParser().parsestr(metadata.decode())
    requirements = headers.get_all("Requires-Dist") or []
    assert sorted(requirement.split(">")[0].split("<")[0] for requirement in requirements) == [
        "grpcio",
        "protobuf",
    ]
    server = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"chat-ticket-client=={headers['Version']}" in server["dependencies"]
    assert server["version"] == headers["Version"]


def installed(wheel: Path, directory: Path) -> Path:
    """The Python of a new environment with the wheel and its locked dependencies."""
    pip = shutil.which("pip", path=str(Path(sys.executable).parent))
    assert pip
    python = directory / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", directory], check=True)
    install = [pip, "--python", str(python), "--quiet", "install"]
    for arguments in (
        ["--require-hashes", "--requirement", str(CLIENT / "requirements.lock")],
        ["--no-deps", str(wheel)],
    ):
        done = subprocess.run(
            [*install, *arguments], capture_output=True, text=True, check=False, timeout=100
        )
        assert done.returncode == 0, done.stderr[-2000:]
    listed = subprocess.run(
        [pip, "--python", str(python), "list", "--format", "json"],
        capture_output=True,
        check=True,
    )
    names = {each["name"].replace("_", "-") for each in json.loads(listed.stdout)}
    assert names == {"chat-ticket-client", "grpcio", "protobuf", "typing-extensions"}
    return python


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return installed(wheel, tmp_path_factory.mktemp("venv"))


async def run(python: Path, program: str, *arguments: str) -> list[str]:
    """The lines that a program prints, which warns of nothing."""
    process = await asyncio.create_subprocess_exec(
        *(python, "-I", "-W", "error", "-c", program, *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(60):
        output, errors = await process.communicate()
    assert process.returncode == 0, errors.decode()
    assert not errors
    return output.decode().splitlines()


async def test_it_works_in_an_empty_environment(server: Server, tenant: str, python: Path) -> None:
    """Both clients write, watch and are rejected."""
    assert await run(python, PROGRAM, f"localhost:{server.port}", tenant) == [
        f"{runtime} {step}" for runtime in ("asyncio", "threads") for step in STEPS
    ]


async def test_readme_shows_a_program_that_runs(server: Server, python: Path) -> None:
    """As pasted, but for the address."""
    text = (CLIENT / "README.md").read_text()
    [program] = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    lines = await run(python, program.replace("localhost:50051", f"localhost:{server.port}"))
    assert "session {" in lines
    assert any('content: "Hello!"' in line for line in lines)
    assert "caught_up {" in lines
    assert lines[-1].startswith("INVALID_ARGUMENT (Violation(field='message")
