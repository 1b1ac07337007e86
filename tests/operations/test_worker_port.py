"""The port of a server, which its workers share and no other server gets."""

import contextlib
import os
import signal
import socket
import threading

import pytest
from support.process import run_command, server_process
from support.worker_processes import pids, printed, two_workers, unable_to_spawn, wait_until

from chat_ticket_svc import workers
from chat_ticket_svc.addresses import ListenError


class TestPort:
    @pytest.mark.parametrize("first", ["1", "2"])
    def test_second_server_is_rejected(self, database: str, first: str) -> None:
        """However many workers either has."""
        with server_process(database, CHAT_TICKET_WORKERS=first) as process:
            port = str(process.wait_for("listening")["port"])
            for second in "12":
                result = run_command(
                    "serve", "--port", port, "--workers", second, DATABASE_URL=database
                )
                assert result.returncode == 1
                assert printed(result) == [
                    f"chat-ticket-svc: cannot listen on 127.0.0.1:{port}: "
                    "the port is in use, or this machine lacks the address"
                ]

    def test_port_stays_reserved_while_no_worker_listens(self, database: str) -> None:
        """Neither one server nor another parent takes it from the replacements."""
        with two_workers(database) as (process, both):
            port = str(process.wait_for("listening")["port"])
            with unable_to_spawn(process):
                for pid in both:
                    os.kill(pid, signal.SIGKILL)
                process.wait_for_all("worker exited", 2)
                for number in "12":
                    result = run_command(
                        "serve", "--port", port, DATABASE_URL=database, CHAT_TICKET_WORKERS=number
                    )
                    assert result.returncode == 1
                    assert "the port is in use" in result.stderr
            assert len(set(pids(process, 4))) == 4

    @pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0", "::"])
    def test_reservation_allows_only_sockets_that_share_the_port(self, host: str) -> None:
        """It takes none of their connections, and keeps out all others."""
        with workers.reserve_port(host, 0) as port:
            with pytest.raises(ListenError), workers.reserve_port(host, port):
                pass
            for reuse in (0, 1):
                with socket.socket() as other:
                    other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, reuse)
                    with pytest.raises(OSError):
                        other.bind(("127.0.0.1", port))
            options = (socket.SO_REUSEADDR, socket.SO_REUSEPORT)  # as gRPC does
            listeners = [listener(*options, port=port) for _ in range(2)]
            accepted = [0, 0]

            def accept(number: int) -> None:
                with contextlib.suppress(OSError):
                    while True:
                        listeners[number].accept()[0].close()
                        accepted[number] += 1

            threads = [threading.Thread(target=accept, args=[n]) for n in range(2)]
            for thread in threads:
                thread.start()
            for _ in range(200):
                with socket.create_connection(("127.0.0.1", port), timeout=5) as client:
                    assert client.recv(1) == b""
            for each, thread in zip(listeners, threads, strict=True):
                each.shutdown(socket.SHUT_RDWR)
                thread.join()
                each.close()
            assert sum(accepted) == 200
            assert min(accepted) > 0
        # The connections that the listeners closed are still there.
        with socket.socket() as other, pytest.raises(OSError):
            other.bind(("127.0.0.1", port))
        with (
            workers.reserve_port(host, port),
            pytest.raises(ListenError),
            workers.reserve_port(host, port),
        ):
            pass

    def test_two_servers_that_start_at_once(self, database: str) -> None:
        """One has the port, though neither listens yet, nor does what an earlier one left count."""
        with listener(socket.SO_REUSEADDR) as earlier:
            port = earlier.getsockname()[1]
            with socket.create_connection(("127.0.0.1", port)) as client:
                earlier.accept()[0].close()
                assert client.recv(1) == b""
        with socket.socket() as other, pytest.raises(OSError):
            other.bind(("127.0.0.1", port))
        settings = {"CHAT_TICKET_PORT": str(port), "CHAT_TICKET_WORKERS": "2"}
        with server_process(database, **settings) as a, server_process(database, **settings) as b:
            wait_until(lambda: a.popen.poll() is not None or b.popen.poll() is not None, 30)
            late, other = (a, b) if a.popen.poll() is not None else (b, a)
            pids(other, 2)
            assert other.popen.poll() is None
            assert late.stop() == 1
            assert "the port is in use" in late.output


def listener(*options: int, port: int = 0) -> socket.socket:
    listening = socket.socket()
    for option in options:
        listening.setsockopt(socket.SOL_SOCKET, option, 1)
    listening.bind(("127.0.0.1", port))
    listening.listen(256)
    return listening
