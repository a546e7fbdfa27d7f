"""`waggle-echo`: a small server that tells who asked and who answers. For labs, demos and tests.

HTTP/1.1 with keep-alive on TCP and one datagram per datagram on UDP, IPv4 and IPv6. Every answer is one JSON line:

    {"name": "web-1", "protocol": "tcp", "client": "10.244.1.5", "client_port": 40112,
     "local": "10.244.2.3", "local_port": 8080}

`client` is what the server sees, so translation on the way shows; `local` is the address that was asked. It speaks
just enough HTTP to be asked by curl, wrk and browsers, in one thread without dependencies: it must start in a few
milliseconds, because a lab starts dozens.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import resource
import selectors
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable, Sequence
from types import FrameType

_MAX_REQUEST = 64 * 1024
_LISTEN_BACKLOG = 4096


class Connection:
    """One HTTP connection: `received` holds what is not answered yet, `unsent` what the peer has not taken yet."""

    __slots__ = ("answer", "closing", "received", "sock", "unsent")

    def __init__(self, sock: socket.socket, answer: bytes) -> None:
        self.sock = sock
        self.answer = answer
        self.received = b""
        self.unsent = b""
        self.closing = False

    def take(self, data: bytes) -> None:
        """Answers every whole request in what was received so far; pipelined requests are answered in order."""
        self.received += data
        while not self.closing:
            head, separator, rest = self.received.partition(b"\r\n\r\n")
            if not separator:
                if len(self.received) > _MAX_REQUEST:
                    self._refuse(b"431 Request Header Fields Too Large")
                return
            fields = _fields(head)
            length = fields.get(b"content-length", b"0")
            if not length.isdigit() or int(length) > _MAX_REQUEST or b"transfer-encoding" in fields:
                self._refuse(b"413 Content Too Large")
                return
            if len(rest) < int(length):
                return
            self.received = rest[int(length) :]
            self._respond(head, fields)

    def _respond(self, head: bytes, fields: dict[bytes, bytes]) -> None:
        line = head.partition(b"\r\n")[0].split(b" ")
        if len(line) != 3 or not line[2].startswith(b"HTTP/1."):
            self._refuse(b"400 Bad Request")
            return
        wish = fields.get(b"connection", b"").lower()
        self.closing = wish == b"close" or (line[2] == b"HTTP/1.0" and wish != b"keep-alive")
        body = b"" if line[0] == b"HEAD" else self.answer
        self.unsent += (
            b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\nConnection: %s\r\n\r\n%s"
            % (len(self.answer), b"close" if self.closing else b"keep-alive", body)
        )

    def _refuse(self, status: bytes) -> None:
        self.unsent += b"HTTP/1.1 %s\r\nContent-Length: 0\r\nConnection: close\r\n\r\n" % status
        self.closing = True


def _fields(head: bytes) -> dict[bytes, bytes]:
    """Header fields, names in lower case."""
    pairs = (line.partition(b":") for line in head.split(b"\r\n")[1:])
    return {name.strip().lower(): value.strip() for name, _, value in pairs}


class Server:
    """Everything one process serves. `run` returns after `stop`, once the answers under way are sent."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._selector = selectors.DefaultSelector()
        self._connections: set[Connection] = set()
        self._listeners: list[socket.socket] = []
        self._stopping = False
        wake, self._waker = socket.socketpair()
        wake.setblocking(False)
        self._selector.register(wake, selectors.EVENT_READ, lambda _: None)

    def listen_tcp(self, address: str, port: int) -> int:
        """The port it listens on: `port`, or a free one for 0."""
        sock = _bound(socket.SOCK_STREAM, address, port)
        sock.listen(_LISTEN_BACKLOG)
        self._listeners.append(sock)
        self._selector.register(sock, selectors.EVENT_READ, lambda _: self._accept(sock))
        return int(sock.getsockname()[1])

    def listen_udp(self, address: str, port: int) -> int:
        """The port it listens on: `port`, or a free one for 0."""
        sock = _bound(socket.SOCK_DGRAM, address, port)
        if sock.family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
        # Also for IPv4 datagrams on a dual-stack socket, which carry no IPv6 control message.
        sock.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)
        self._selector.register(sock, selectors.EVENT_READ, lambda _: self._datagrams(sock))
        return int(sock.getsockname()[1])

    def stop(self, *_: int | FrameType | None) -> None:
        """May be called from a signal handler."""
        self._stopping = True
        self._waker.send(b"\0")

    def run(self) -> None:
        while not (self._stopping and not self._connections):
            for key, events in self._selector.select():
                ready: Callable[[int], None] = key.data
                ready(events)
            if self._stopping:
                self._drain()

    def _drain(self) -> None:
        for sock in self._listeners:
            self._selector.unregister(sock)
            sock.close()
        self._listeners.clear()
        for connection in [idle for idle in self._connections if not idle.unsent]:
            self._close(connection)

    def _accept(self, listener: socket.socket) -> None:
        for _ in range(64):
            try:
                sock, _peer = listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE):
                    time.sleep(0.01)  # the connection waits in the kernel until another one has ended
                    return
                if error.errno in (errno.ECONNABORTED, errno.EINTR):
                    continue
                raise
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            try:
                answer = self._answer("tcp", sock.getpeername(), sock.getsockname())
            except OSError:  # reset before we looked
                sock.close()
                continue
            connection = Connection(sock, answer)
            self._connections.add(connection)
            self._selector.register(sock, selectors.EVENT_READ, self._handler(connection))

    def _handler(self, connection: Connection) -> Callable[[int], None]:
        return lambda events: self._serve(connection, events)

    def _serve(self, connection: Connection, events: int) -> None:
        try:
            if events & selectors.EVENT_READ:
                data = connection.sock.recv(_MAX_REQUEST)
                if not data:
                    self._close(connection)
                    return
                connection.take(data)
            waiting = bool(events & selectors.EVENT_WRITE)
            if connection.unsent:
                connection.unsent = connection.unsent[connection.sock.send(connection.unsent) :]
        except BlockingIOError:
            waiting = bool(events & selectors.EVENT_WRITE)
        except OSError:  # reset or timed out: the peer's affair
            self._close(connection)
            return
        if connection.closing and not connection.unsent:
            self._close(connection)
        elif waiting != bool(connection.unsent):
            # A peer that does not take its answers is not read from either: its requests wait in the kernel.
            wanted = selectors.EVENT_WRITE if connection.unsent else selectors.EVENT_READ
            self._selector.modify(connection.sock, wanted, self._handler(connection))

    def _close(self, connection: Connection) -> None:
        self._connections.discard(connection)
        self._selector.unregister(connection.sock)
        connection.sock.close()

    def _datagrams(self, sock: socket.socket) -> None:
        for _ in range(64):
            try:
                _data, control, _flags, peer = sock.recvmsg(_MAX_REQUEST, 256)
            except BlockingIOError:
                return
            except OSError:  # an ICMP error of an earlier answer
                continue
            local, source = _destination(control)
            answer = self._answer("udp", peer, (local, sock.getsockname()[1]))
            try:
                # The answer leaves from the address that was asked, also on a machine with several.
                sock.sendmsg([answer], source, 0, peer)
            except OSError as error:
                print(f"waggle-echo: no answer to {peer[0]}: {error.strerror}", file=sys.stderr, flush=True)

    def _answer(self, protocol: str, peer: Sequence[object], local: Sequence[object]) -> bytes:
        fields = {
            "name": self._name,
            "protocol": protocol,
            "client": _plain(str(peer[0])),
            "client_port": peer[1],
            "local": _plain(str(local[0])),
            "local_port": local[1],
        }
        return json.dumps(fields).encode() + b"\n"


_IP_PKTINFO = 8  # include/uapi/linux/in.h; the socket module has no name for it


def _destination(control: list[tuple[int, int, bytes]]) -> tuple[str, list[tuple[int, int, bytes]]]:
    """(address the datagram was sent to, control messages that make the answer leave from it)."""
    for level, kind, data in control:
        if (level, kind) == (socket.IPPROTO_IPV6, socket.IPV6_PKTINFO):
            address = socket.inet_ntop(socket.AF_INET6, data[:16])
            if address.startswith("::ffff:"):
                continue
            return address, [(level, kind, data[:16] + struct.pack("=I", 0))]
        if (level, kind) == (socket.IPPROTO_IP, _IP_PKTINFO):
            # struct in_pktinfo: interface, local address (the source of an answer), destination of the header.
            source = struct.pack("=I4s4s", 0, data[4:8], bytes(4))
            return socket.inet_ntop(socket.AF_INET, data[8:12]), [(level, kind, source)]
    return "", []


def _plain(address: str) -> str:
    """IPv4 addresses as such, without the form they have on a dual-stack socket and without a scope."""
    return address.removeprefix("::ffff:").partition("%")[0]


def _bound(kind: socket.SocketKind, address: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        sock = socket.socket(family, kind)
    except OSError as error:
        if error.errno != errno.EAFNOSUPPORT or address != "::":
            raise
        return _bound(kind, "0.0.0.0", port)  # a kernel without IPv6
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(address != "::"))
    sock.setblocking(False)
    sock.bind((address, port))
    return sock


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="waggle-echo",
        description="Answer every HTTP request and every UDP datagram with one JSON line that names server and client.",
    )
    parser.add_argument("--port", type=int, action="append", help="serve this port on TCP and UDP (default 8080)")
    parser.add_argument("--tcp", type=int, action="append", metavar="PORT", help="serve this port on TCP only")
    parser.add_argument("--udp", type=int, action="append", metavar="PORT", help="serve this port on UDP only")
    parser.add_argument("--listen", default="::", metavar="ADDRESS", help="local address (default: all, IPv4 and IPv6)")
    parser.add_argument("--name", help="name in the answers (default: $POD_NAME or the host name)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `waggle-echo`. Ends with status 0 on SIGTERM and SIGINT, 1 when it cannot listen."""
    options = _arguments(argv)
    both = options.port or ([] if options.tcp or options.udp else [8080])
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    server = Server(options.name or os.environ.get("POD_NAME") or socket.gethostname())
    signal.signal(signal.SIGTERM, server.stop)
    signal.signal(signal.SIGINT, server.stop)
    for protocol, listen, ports in (
        ("tcp", server.listen_tcp, [*both, *(options.tcp or [])]),
        ("udp", server.listen_udp, [*both, *(options.udp or [])]),
    ):
        for port in ports:
            try:
                bound = listen(options.listen, port)
            except (OSError, OverflowError) as error:
                print(
                    f"waggle-echo: cannot listen on {options.listen} port {port}/{protocol}: {error}", file=sys.stderr
                )
                return 1
            print(f"waggle-echo: listening on {options.listen} port {bound}/{protocol}", flush=True)
    server.run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
