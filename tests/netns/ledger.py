"""A ledger of requests: every request that is sent and every answer that comes is counted, by way and by socket.

Two programs in one file, standard library only, both run inside a lab by `LedgerLoad` and by pods:

    python ledger.py serve PORT            answers every line on TCP and every datagram on UDP with the same bytes
    python ledger.py load JSON             sends numbered requests the ways that JSON lists, until its input ends

A line on the load's standard input is answered with the ledger so far; at the end of input the load stops, waits for
the answers under way and prints the final one. No request is ever repeated: what is not answered stays an open item.
"""

from __future__ import annotations

import contextlib
import json
import selectors
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

ANSWER_SECONDS = 10.0  # far beyond any stall of a busy machine: an answer that has not come by then is lost
# offsets in struct tcp_info (include/uapi/linux/tcp.h): segments sent again; of these, needlessly (the peer had both)
_TCP_INFO_TOTAL_RETRANS, _TCP_INFO_DSACK_DUPS = 100, 216


@dataclass(frozen=True)
class Way:
    """One stream of requests. `kind`: tcp-new (a connection each), tcp-long (one connection), udp-new, udp-long."""

    name: str
    kind: str
    host: str
    port: int
    pause: float = 0.01


@dataclass
class Account:
    """What one way sent and got. `lost_segments`: TCP segments that had to be sent again."""

    sent: int = 0
    answered: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    lost_segments: int = 0
    slowest: float = 0.0

    @property
    def open_items(self) -> int:
        """Requests without an answer."""
        return self.sent - self.answered


class LedgerLoad:
    """A load that runs in a place of a lab; `command` puts it there."""

    def __init__(self, command: list[str], ways: list[Way]) -> None:
        self.ways = ways
        self._process = subprocess.Popen(
            [*command, sys.executable, __file__, "load", json.dumps([asdict(way) for way in ways])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def so_far(self) -> dict[str, Account]:
        """The ledger now."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self._read()

    def await_answers(self, more: int, seconds: float = 20.0) -> None:
        """Returns once every way has got so many more answers; AssertionError names the ways that do not."""
        begin = self.so_far()
        deadline = time.monotonic() + seconds
        while True:
            now = self.so_far()
            behind = {name: account for name, account in now.items() if account.answered < begin[name].answered + more}
            if not behind:
                return
            assert time.monotonic() < deadline, f"no {more} answers within {seconds:g} s: {behind}"
            time.sleep(0.05)

    def finish(self) -> dict[str, Account]:
        """Stops sending, waits for what is under way, returns the final ledger."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        final = self._read()
        assert self._process.wait(10) == 0
        return final

    def close(self) -> None:
        """Ends the load whatever it does."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()

    def _read(self) -> dict[str, Account]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"the load ended with status {self._process.wait(10)}"
        return {
            name: Account(**{**entry, "errors": Counter(entry["errors"])}) for name, entry in json.loads(line).items()
        }


# -- inside the lab --------------------------------------------------------------------------------------------------


_SHOWING = threading.Lock()  # no new kind of error while the ledger is being written out


class _Sender(threading.Thread):
    """One way, one request at a time."""

    def __init__(self, way: Way, stop: threading.Event) -> None:
        super().__init__(name=way.name, daemon=True)
        self.way = way
        self.account = Account()
        self._stop_sending = stop
        self._family = socket.AF_INET6 if ":" in way.host else socket.AF_INET

    def run(self) -> None:
        transport, _, life = self.way.kind.partition("-")
        one = self._tcp if transport == "tcp" else self._udp
        sock: socket.socket | None = None
        while not self._stop_sending.wait(self.way.pause):
            begin = time.monotonic()
            self.account.sent += 1
            try:
                sock = sock or self._open(transport)
                one(sock, b"%s %d\n" % (self.way.name.encode(), self.account.sent))
                self.account.answered += 1
            except OSError as error:
                with _SHOWING:
                    self.account.errors[error.strerror or type(error).__name__] += 1
                if life == "long":
                    return  # a connection that broke is not made again: the error is the finding
            self.account.slowest = max(self.account.slowest, time.monotonic() - begin)
            if life == "new" and sock is not None:
                self._close(sock)
                sock = None
        if sock is not None:
            self._close(sock)

    def _open(self, transport: str) -> socket.socket:
        if transport == "udp":
            sock = socket.socket(self._family, socket.SOCK_DGRAM)
            sock.settimeout(ANSWER_SECONDS)
            return sock
        sock = socket.create_connection((self.way.host, self.way.port), ANSWER_SECONDS)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock

    def _close(self, sock: socket.socket) -> None:
        if sock.type == socket.SOCK_STREAM:
            info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
            resent, needlessly = (
                struct.unpack_from("=I", info, offset)[0] for offset in (_TCP_INFO_TOTAL_RETRANS, _TCP_INFO_DSACK_DUPS)
            )
            self.account.lost_segments += resent - needlessly
        sock.close()

    def _tcp(self, sock: socket.socket, request: bytes) -> None:
        sock.sendall(request)
        received = b""
        while not received.endswith(b"\n"):
            part = sock.recv(4096)
            if not part:
                raise OSError(0, "connection closed without an answer")
            received += part
        if received != request:
            raise OSError(0, f"answer {received!r} to {request!r}")

    def _udp(self, sock: socket.socket, request: bytes) -> None:
        asked = (self.way.host, self.way.port)
        sock.sendto(request, asked)
        received, peer = sock.recvfrom(4096)
        if received != request or peer[:2] != asked:
            raise OSError(0, f"answer {received!r} from {peer} to {request!r}")


def _load(ways: list[Way]) -> None:
    stop = threading.Event()
    senders = [_Sender(way, stop) for way in ways]
    for sender in senders:
        sender.start()

    def show() -> None:
        with _SHOWING:
            # not asdict, which makes a Counter of a Counter's items
            text = json.dumps({sender.way.name: vars(sender.account) for sender in senders})
        print(text, flush=True)

    for _ in sys.stdin:
        show()
    stop.set()
    for sender in senders:
        sender.join()
    show()


def _serve(port: int) -> None:
    selector = selectors.DefaultSelector()
    tcp = socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
    udp = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    udp.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    udp.bind(("::", port))
    for sock in (tcp, udp):
        sock.setblocking(False)
        selector.register(sock, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            sock = key.fileobj
            assert isinstance(sock, socket.socket)
            with contextlib.suppress(BlockingIOError):
                if sock is tcp:
                    connection, _ = tcp.accept()
                    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    selector.register(connection, selectors.EVENT_READ)
                elif sock is udp:
                    data, peer = udp.recvfrom(4096)
                    udp.sendto(data, peer)
                else:
                    _answer(sock, selector)


def _answer(connection: socket.socket, selector: selectors.BaseSelector) -> None:
    try:
        data = connection.recv(4096)
        if data:
            connection.sendall(data)
            return
    except ConnectionError as error:
        print(f"connection ended: {error}", file=sys.stderr, flush=True)
    selector.unregister(connection)
    connection.close()


def server_command(port: int) -> list[str]:
    """The command of a pod that answers."""
    return [sys.executable, str(Path(__file__).absolute()), "serve", str(port)]


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        _serve(int(sys.argv[2]))
    else:
        _load([Way(**way) for way in json.loads(sys.argv[2])])
