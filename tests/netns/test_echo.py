"""`waggle-echo` and the client that asks it, on the loopback interface."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from waggle.lab.traffic import GIVE_UP_AFTER, GIVEN_UP, Probe, run

REQUEST = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


@contextlib.contextmanager
def serving(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """A server, and the ports it says it listens on."""
    command = [sys.executable, "-m", "waggle.lab.echo", "--name", "me", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        ports = []
        for _ in range(len(arguments) // 2 if "--port" not in arguments else len(arguments)):
            found = re.search(r"port (\d+)/(tcp|udp)", process.stdout.readline())
            assert found
            ports.append(int(found[1]))
        yield process, ports
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


@pytest.fixture
def tcp() -> Iterator[int]:
    with serving("--tcp", "0") as (_, ports):
        yield ports[0]


@pytest.fixture
def udp() -> Iterator[int]:
    with serving("--udp", "0") as (_, ports):
        yield ports[0]


def answers(received: bytes) -> list[dict[str, object]]:
    return [json.loads(line) for line in received.splitlines() if line.startswith(b"{")]


def receive(sock: socket.socket, count: int) -> bytes:
    """Until `count` answers are there; all there is where the peer closes."""
    received = b""
    while received.count(b"}\n") < count and (data := sock.recv(65536)):
        received += data
    return received


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_tcp_answer_names_both_ends(tcp: int, address: str) -> None:
    with socket.create_connection((address, tcp), 5) as sock:
        sock.sendall(REQUEST)
        (answer,) = answers(receive(sock, 1))
        assert answer == {
            "name": "me",
            "protocol": "tcp",
            "client": address,
            "client_port": sock.getsockname()[1],
            "local": address,
            "local_port": tcp,
        }


@pytest.mark.parametrize(("address", "family"), [("127.0.0.3", socket.AF_INET), ("::1", socket.AF_INET6)])
@pytest.mark.parametrize("connected", [True, False])
def test_udp_answer_leaves_from_the_address_that_was_asked(
    udp: int, address: str, family: socket.AddressFamily, connected: bool
) -> None:
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.settimeout(5)
        if connected:
            sock.connect((address, udp))
            sock.send(b"?")
        else:
            sock.sendto(b"?", (address, udp))
        data, peer = sock.recvfrom(4096)
        assert peer[:2] == (address, udp)
        assert json.loads(data)["local"] == address
        assert json.loads(data)["client_port"] == sock.getsockname()[1]


def test_connection_is_kept_and_requests_may_be_sent_ahead(tcp: int) -> None:
    with socket.create_connection(("127.0.0.1", tcp), 5) as sock:
        for _ in range(3):
            sock.sendall(REQUEST)
            assert len(answers(receive(sock, 1))) == 1
        sock.sendall(REQUEST * 50)
        assert len(answers(receive(sock, 50))) == 50


def test_requests_in_pieces_and_with_a_body(tcp: int) -> None:
    request = b"POST /x HTTP/1.1\r\nContent-Length: 5\r\n\r\nhello" + REQUEST
    with socket.create_connection(("127.0.0.1", tcp), 5) as sock:
        for position in range(len(request)):
            sock.sendall(request[position : position + 1])
        assert len(answers(receive(sock, 2))) == 2


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n", b"200"),
        (b"GET / HTTP/1.0\r\n\r\n", b"200"),
        (b"nonsense\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\nContent-Length: x\r\n\r\n", b"413"),
        (b"GET / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n", b"413"),
        (b"x" * 70_000, b"431"),
    ],
)
def test_connection_ends_after_these(tcp: int, request_bytes: bytes, status: bytes) -> None:
    with socket.create_connection(("127.0.0.1", tcp), 5) as sock:
        sock.sendall(request_bytes)
        received = b""
        with contextlib.suppress(ConnectionResetError):  # closed before it has read everything we sent
            while data := sock.recv(65536):
                received += data
        assert received.startswith(b"HTTP/1.1 " + status)


def test_head_has_no_body(tcp: int) -> None:
    with socket.create_connection(("127.0.0.1", tcp), 5) as sock:
        sock.sendall(b"HEAD / HTTP/1.1\r\nConnection: close\r\n\r\n")
        received = b""
        while data := sock.recv(65536):
            received += data
        assert received.endswith(b"\r\n\r\n") and b"Content-Length: " in received


def test_a_slow_reader_stops_nobody_else(tcp: int) -> None:
    with socket.create_connection(("127.0.0.1", tcp), 5) as slow:
        slow.setblocking(False)
        with contextlib.suppress(BlockingIOError):  # now neither side's buffers take any more
            while True:
                slow.send(REQUEST * 1000)
        (outcome,) = run([Probe("127.0.0.1", tcp, count=20)])
        assert outcome.ok == 20


def test_ends_in_order() -> None:
    with serving("--port", "0") as (process, ports), socket.create_connection(("127.0.0.1", ports[0]), 5) as idle:
        idle.sendall(REQUEST)
        receive(idle, 1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(5) == 0
        assert idle.recv(1) == b""


def test_ports_that_are_taken_are_an_error_message(tcp: int) -> None:
    command = [sys.executable, "-m", "waggle.lab.echo", "--tcp", str(tcp)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"port {tcp}/tcp" in done.stderr and "Traceback" not in done.stderr


# -- the client -------------------------------------------------------------------------------------------------------


def test_every_failure_is_counted_with_its_reason(tcp: int) -> None:
    with socket.socket() as silent, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as deaf:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        deaf.bind(("127.0.0.1", 0))
        with socket.socket() as closed:
            closed.bind(("127.0.0.1", 0))
            nobody = closed.getsockname()[1]
        begin = time.monotonic()
        outcomes = run(
            [
                Probe("127.0.0.1", tcp, count=3),
                Probe("127.0.0.1", nobody, count=2),
                Probe("127.0.0.1", nobody, "udp"),
                Probe("127.0.0.1", silent.getsockname()[1], timeout=0.2),
                Probe("127.0.0.1", deaf.getsockname()[1], "udp", timeout=0.2),
            ]
        )
        assert time.monotonic() - begin < 5
    assert [dict(outcome.answers) for outcome in outcomes] == [{"me": 3}, {}, {}, {}, {}]
    assert [dict(outcome.failed) for outcome in outcomes] == [
        {},
        {"Connection refused": 2},
        {"Connection refused": 1},
        {"timeout": 1},
        {"timeout": 1},
    ]
    assert len(outcomes[0].latencies_us) == 3


def test_a_way_that_is_broken_is_given_up(tcp: int) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as deaf:
        deaf.bind(("127.0.0.1", 0))
        broken, fine = run(
            [Probe("127.0.0.1", deaf.getsockname()[1], "udp", 1000, timeout=0.01), Probe("127.0.0.1", tcp, count=50)]
        )
    assert dict(broken.failed) == {"timeout": GIVE_UP_AFTER, GIVEN_UP: 1000 - GIVE_UP_AFTER}
    assert fine.ok == 50


def test_an_answer_from_another_address_is_a_failure() -> None:
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other,
    ):
        asked.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.2", 0))

        def answer() -> None:
            for _ in range(2):
                _data, peer = asked.recvfrom(100)
                other.sendto(b'{"name": "x"}', peer)

        thread = threading.Thread(target=answer)
        thread.start()
        (outcome,) = run([Probe("127.0.0.1", asked.getsockname()[1], "udp", count=2, timeout=0.5)])
        thread.join()
    assert outcome.ok == 0
    assert outcome.failed.total() == 2
    assert any("answer from 127.0.0.2" in reason for reason in outcome.failed)
