"""What is shipped: the wheel, and what the Containerfile makes of it.

No container engine is at hand in the tests: the commands of the first stage run in a clean
directory instead, with its paths, and what they have made serves.
"""

import asyncio
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import uuid
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.client import Api
from support.process import ServerProcess

from chat_ticket_svc.store.schema import MIGRATIONS

ROOT = Path(__file__).parents[2]
PREFIX = "/opt/chat-ticket-svc"
LINK = ROOT / "tests" / "support" / "link_locked.py"

# The pip of the tests, but for locks: to download all that they name again would take longer than
# any other test.
IMAGE_PIP = """#!/bin/sh
case " $* " in
*" --require-hashes "*) exec {tests}/python {link} --python {image}/python "$@" ;;
*) exec {tests}/pip --python {image}/python "$@" ;;
esac
"""


def instructions() -> list[tuple[str, str]]:
    """Those of the Containerfile, with their arguments on one line."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Containerfile").read_text(), flags=re.MULTILINE)
    lines = re.sub(r"\\\n", " ", text).splitlines()
    return [tuple(line.split(maxsplit=1)) for line in lines if line]


def stages() -> list[list[tuple[str, str]]]:
    found: list[list[tuple[str, str]]] = []
    for name, arguments in instructions():
        if name == "FROM":
            found.append([])
        found[-1].append((name, arguments))
    return found


def arguments_of(name: str) -> list[str]:
    """All of the last stage."""
    return [arguments for each, arguments in stages()[-1] if each == name]


def copied(stage: list[tuple[str, str]]) -> list[tuple[list[str], str]]:
    """The files copied from the checkout, and their destinations."""
    found = [shlex.split(arguments) for name, arguments in stage if name == "COPY"]
    return [(words[:-1], words[-1]) for words in found if not words[0].startswith("--from")]


def test_what_is_copied_is_there_and_not_ignored() -> None:
    """No other file is in the build context: no secret of a checkout gets into an image."""
    ignored, *allowed = (ROOT / ".containerignore").read_text().splitlines()
    assert ignored == "*"
    names = {name for stage in stages() for names, _ in copied(stage) for name in names}
    assert {f"!{name}" for name in names} | {"**/__pycache__"} == set(allowed)
    for name in names:
        assert (ROOT / name).exists(), name


def test_last_stage_builds_nothing_and_runs_unprivileged() -> None:
    """It only takes what was made, takes pip away, and runs as a user without rights."""
    assert len(stages()) == 2
    assert not copied(stages()[-1])
    assert arguments_of("RUN") == ["python -m pip uninstall --yes pip"]
    [user] = arguments_of("USER")
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)
    assert [image for name, image in instructions() if name == "FROM"] == [
        f"{arguments_of('FROM')[0]} AS build",
        arguments_of("FROM")[0],
    ]


@pytest.mark.parametrize(
    "name",
    ["requirements-service.lock", "requirements-build.lock", "clients/python/requirements.lock"],
)
def test_small_locks_are_parts_of_the_tested_lock(name: str) -> None:
    """With the same hashes."""

    def entries(lock: Path) -> set[str]:
        text = re.sub(r"^\s*#.*\n", "", lock.read_text(), flags=re.MULTILINE)
        return set(re.split(r"\n(?=\S)", text.strip()))

    assert entries(ROOT / name)
    assert entries(ROOT / name) <= entries(ROOT / "requirements.lock")


def test_the_wheel_has_all_that_is_needed(tmp_path: Path) -> None:
    """The service and the migrations; the stubs come with the client that it depends on."""
    build(ROOT, tmp_path)
    [wheel] = tmp_path.glob("*.whl")
    shipped = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    sources = {
        str(path.relative_to(ROOT / "src"))
        for path in (ROOT / "src" / "chat_ticket_svc").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    migrations = {f"chat_ticket_svc/migrations/{path.name}" for path in MIGRATIONS.glob("*.sql")}
    assert sources | migrations <= shipped
    assert all(name.startswith("chat_ticket_svc/") for name in shipped)


def build(directory: Path, output: Path) -> None:
    """Build the wheel as pip would, with the locked build requirements."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(output)]
    subprocess.run(command, cwd=directory, check=True, capture_output=True)


def made_by_the_first_stage(directory: Path) -> Path:
    """Run its commands on what it copies and nothing else; returns what the last stage takes."""
    image = directory / "image" / "bin"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", image.parent], check=True)
    pip = image / "pip"
    paths = {"image": image, "tests": Path(sys.executable).parent, "link": LINK}
    pip.write_text(
        IMAGE_PIP.format_map({name: shlex.quote(str(path)) for name, path in paths.items()})
    )
    pip.chmod(0o755)
    prefix = directory / "place"
    work = directory / "build"
    work.mkdir()
    environment = {"PATH": f"{image}:/usr/bin:/bin", "HOME": str(directory), "PIP_NO_INDEX": "1"}
    stage = stages()[0]
    for name, arguments in stage:
        if name == "COPY":
            [(names, to)] = copied([(name, arguments)])
            for each in names:
                if (ROOT / each).is_dir():
                    ignore = shutil.ignore_patterns("__pycache__")
                    shutil.copytree(ROOT / each, work / to, ignore=ignore)
                else:
                    shutil.copy(ROOT / each, work / to)
        elif name == "RUN":
            done = subprocess.run(
                ["/bin/sh", "-c", arguments.replace(PREFIX, str(prefix))],
                cwd=work,
                env=environment,
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, done.stderr[-2000:]
        else:
            assert (name, arguments) in {("FROM", stage[0][1]), ("WORKDIR", "/build")}
    check = [pip, "--python", prefix / "bin" / "python", "check"]
    checked = subprocess.run(check, env=environment, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout
    shutil.rmtree(image.parent)
    shutil.rmtree(work)
    return prefix


@pytest.fixture
def new_database_url(cluster: Any) -> Iterator[str]:
    """Of a database that does not exist."""
    url = cluster.url(f"packaged_{uuid.uuid4().hex}")
    yield url
    cluster.drop(url)


async def test_what_is_made_migrates_and_serves(
    new_database_url: str, tmp_path: Path, tenant: str
) -> None:
    """From an empty environment elsewhere, with no more than the settings of the last stage."""
    prefix = await asyncio.to_thread(made_by_the_first_stage, tmp_path)
    assert not list(prefix.glob("bin/pip*")), "no build tools"
    [entry], [default] = arguments_of("ENTRYPOINT"), arguments_of("CMD")
    entry_point = prefix / "bin" / json.loads(entry)[0]
    environment = {"PATH": f"{prefix}/bin:/usr/bin:/bin", "DATABASE_URL": new_database_url}

    def run(*arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(entry_point), *arguments],
            cwd=tmp_path,
            env={**environment, **settings},
            capture_output=True,
            text=True,
            check=False,
        )

    [settings] = arguments_of("ENV")
    beyond_loopback = dict(pair.split("=", 1) for pair in settings.split())
    del beyond_loopback["PATH"]
    refused = await asyncio.to_thread(run, *json.loads(default), **beyond_loopback)
    assert refused.returncode == 1
    assert "CHAT_TICKET_AUTH" in refused.stderr, "beyond loopback, it asks for credentials"

    migrated = await asyncio.to_thread(run, "migrate")
    assert migrated.returncode == 0, migrated.stderr
    process = ServerProcess(
        environment={**environment, "CHAT_TICKET_PORT": "0"},
        command=[str(entry_point), *json.loads(default)],
        directory=tmp_path,
    )
    try:
        process.wait_for("serving")
        async with Api(process.address, tenant) as api:
            session = await api.session()
            assert session.tenant_id == tenant
        port = process.address.rpartition(":")[2]
        [health_check] = arguments_of("HEALTHCHECK")
        probe = json.loads(health_check.partition("CMD ")[2])
        assert probe[0] == entry_point.name
        healthy = await asyncio.to_thread(run, *probe[1:], CHAT_TICKET_PORT=port)
        assert healthy.returncode == 0, healthy
        [stop] = arguments_of("STOPSIGNAL")
        assert process.stop(signal.Signals[stop]) == 0
        unhealthy = await asyncio.to_thread(run, *probe[1:], CHAT_TICKET_PORT=port)
        assert unhealthy.returncode == 1
    finally:
        process.popen.kill()
        process.stop()
