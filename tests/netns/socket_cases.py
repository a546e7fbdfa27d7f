"""Speaks through real sockets, step by step, and says what each step gave. Standard library only: it starts fast.

`python socket_cases.py` reads a JSON list of cases from standard input and writes what came of them in the same form.
A case is a list of steps, `[operation, argument …]`, see `Talk`; what comes of a step is one line of text, for an error
its name (ECONNREFUSED). `python socket_cases.py serve NAME TCP-PORT UDP-PORT…` is the other side: it says who it is
and whom it sees.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import select
import socket
import socketserver
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

TIMEOUT = 2.0
#: What takes longer was waited for, not answered at once.
AT_ONCE = 0.9
#: Cases at once: one that waits for its timeout holds up no other.
TALKS = 8

# include/uapi/linux/in.h, in6.h; the socket module has no names for them
IP_MTU_DISCOVER, IP_RECVERR, IP_MTU, IP_PMTUDISC_DO = 10, 11, 14, 2
IPV6_MTU_DISCOVER, IPV6_MTU, IPV6_RECVERR = 23, 24, 25


class Talk:
    """One case: a socket (and those it has put aside), one method per operation."""

    def __init__(self) -> None:
        self.sock = socket.socket()
        self.kept: list[socket.socket] = []

    def close(self) -> None:
        for sock in (self.sock, *self.kept):
            sock.close()

    def open(self, protocol: str, family: str) -> str:
        """A new socket in place of the one before; "mapped" is an IPv6 socket that speaks IPv4."""
        self.sock.close()
        kind = socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM
        self.sock = socket.socket(socket.AF_INET if family == "v4" else socket.AF_INET6, kind)
        if family == "v6":
            self.sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        self.sock.settimeout(TIMEOUT)
        return "ok"

    def keep(self) -> str:
        """Leaves the socket open beside the next ones."""
        self.kept.append(self.sock)
        self.sock = socket.socket()
        return "ok"

    def take(self, number: int) -> str:
        """Goes on with a socket that was kept."""
        self.sock, self.kept[number] = self.kept[number], self.sock
        return "ok"

    def bind(self, port: int) -> str:
        self.sock.bind(("", port))
        return "ok"

    def connect(self, host: str, port: int) -> str:
        self.sock.connect((host, port))
        return "ok"

    def connect_nonblocking(self, host: str, port: int) -> str:
        self.sock.setblocking(False)
        begun = self.sock.connect_ex((host, port))
        if begun == errno.EINPROGRESS:
            poll = select.poll()
            poll.register(self.sock, select.POLLOUT)
            if not poll.poll(TIMEOUT * 1000):
                raise TimeoutError
            begun = self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        self.sock.settimeout(TIMEOUT)
        if begun:
            raise OSError(begun, os.strerror(begun))
        return "ok"

    def connect_by_sending(self, host: str, port: int) -> str:
        """TCP Fast Open: the first data connects. Without a cookie yet, only a blocking socket keeps them."""
        self.sock.setblocking(True)
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("=qq", int(TIMEOUT), 0))
        self.sock.sendto(b"who\n", socket.MSG_FASTOPEN, (host, port))
        self.sock.settimeout(TIMEOUT)
        return self._line()

    def disconnect(self) -> str:
        """connect() to AF_UNSPEC."""
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.connect(self.sock.fileno(), bytes(16), 16):
            raise OSError(ctypes.get_errno(), "connect")
        return "ok"

    def peer(self) -> str:
        return shown(self.sock.getpeername())

    def local(self) -> str:
        host, port, *_ = self.sock.getsockname()
        return host if port else f"{host} without a port"

    def wire(self) -> str:
        """Whom the kernel sends to, whatever getpeername says."""
        kind = "tcp" if self.sock.type == socket.SOCK_STREAM else "udp"
        six = "6" if self.sock.family == socket.AF_INET6 else ""
        inode = str(os.fstat(self.sock.fileno()).st_ino)
        table = Path(f"/proc/thread-self/net/{kind}{six}").read_text().splitlines()
        remote = next(row[2] for row in map(str.split, table) if len(row) > 9 and row[9] == inode)
        host, _, port = remote.partition(":")
        words = [int(host[begin : begin + 8], 16) for begin in range(0, len(host), 8)]
        return shown((socket.inet_ntop(self.sock.family, struct.pack(f"={len(words)}I", *words)), int(port, 16)))

    def ask(self) -> str:
        """Who answers, and whom it sees. The socket is connected."""
        if self.sock.type == socket.SOCK_STREAM:
            self.sock.sendall(b"who\n")
            return self._line()
        self.sock.send(b"who")
        return self.sock.recv(65536).decode().partition("\n")[0]

    def _line(self) -> str:
        received = b""
        while not received.endswith(b"\n"):
            data = self.sock.recv(4096)
            if not data:
                raise ConnectionResetError(errno.ECONNRESET, "closed")
            received += data
        return received.decode().strip()

    def ask_to(self, host: str, port: int) -> str:
        """As `ask`, with sendto and recvfrom."""
        self.send_to(host, port)
        return self.receive()

    def ask_by_message(self, host: str, port: int) -> str:
        """As `ask`, with sendmsg and recvmsg."""
        self.sock.sendmsg([b"w", b"ho"], [], 0, (host, port))
        data, _, _, source = self.sock.recvmsg(65536, 256)
        return f"{data.decode().partition(chr(10))[0]}, from {shown(source)}"

    def send_to(self, host: str, port: int) -> str:
        self.sock.sendto(b"who", (host, port))
        return "ok"

    def send(self, size: int = 3) -> str:
        self.sock.send(bytes(size))
        return "ok"

    def receive(self) -> str:
        data, source = self.sock.recvfrom(65536)
        return f"{data.decode().partition(chr(10))[0]}, from {shown(source)}"

    def receive_all(self, count: int) -> str:
        """So many answers, in no particular order."""
        return "; ".join(sorted(self.receive() for _ in range(count)))

    def datagram(self, size: int) -> str:
        """One datagram there and back."""
        self.sock.send(bytes(size))
        back = self.sock.recv(65536).partition(b"\n")[2]
        return "ok" if back == bytes(size) else f"{len(back)} bytes came back"

    def transfer(self, size: int) -> str:
        """So many bytes there and the same back, at the same time."""
        sent = os.urandom(size)
        self.sock.settimeout(2 * TIMEOUT)
        self.sock.sendall(b"echo %d\n" % size)

        def sender() -> None:
            # The receiver sees what goes wrong here: less comes back.
            with contextlib.suppress(OSError):
                self.sock.sendall(sent)

        thread = threading.Thread(target=sender)
        thread.start()
        received = bytearray()
        try:
            while len(received) < size and (data := self.sock.recv(1 << 16)):
                received += data
        finally:
            if len(received) < size:
                self.sock.shutdown(socket.SHUT_RDWR)  # the sender ends too
            thread.join()
        return "ok" if received == sent else f"{len(received)} bytes came back, not all as sent"

    def hop_limit(self, hops: int) -> str:
        if self._six():
            self.sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS, hops)
        else:
            self.sock.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, hops)
        return "ok"

    def want_errors(self) -> str:
        level, option = (socket.IPPROTO_IPV6, IPV6_RECVERR) if self._six() else (socket.IPPROTO_IP, IP_RECVERR)
        self.sock.setsockopt(level, option, 1)
        return "ok"

    def error(self) -> str:
        """What an ICMP message said, and who sent it."""
        poll = select.poll()
        poll.register(self.sock, 0)  # POLLERR needs no asking for
        if not poll.poll(TIMEOUT * 1000):
            raise TimeoutError
        _, control, _, _ = self.sock.recvmsg(512, 512, socket.MSG_ERRQUEUE)
        _, _, data = control[0]
        number, _origin, _type, _code, _, info = struct.unpack_from("=IBBBBI", data)
        offender = data[16:]
        if self._six():
            host = socket.inet_ntop(socket.AF_INET6, offender[8:24])
        else:
            host = socket.inet_ntop(socket.AF_INET, offender[4:8])
        return f"{errno.errorcode[number]}{f' {info}' if info else ''} from {host}"

    def never_fragment(self) -> str:
        if self._six():
            self.sock.setsockopt(socket.IPPROTO_IPV6, IPV6_MTU_DISCOVER, IP_PMTUDISC_DO)
        else:
            self.sock.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, IP_PMTUDISC_DO)
        return "ok"

    def mtu(self) -> str:
        """Of the path, as far as the kernel knows it."""
        level, option = (socket.IPPROTO_IPV6, IPV6_MTU) if self._six() else (socket.IPPROTO_IP, IP_MTU)
        return str(self.sock.getsockopt(level, option))

    def ping(self, host: str, size: int = 56) -> str:
        command = ["ping", "-n", "-c1", f"-W{TIMEOUT:.0f}", "-s", str(size), host]
        done = subprocess.run(command, capture_output=True, check=False)
        return "ok" if done.returncode == 0 else "no answer"

    def _six(self) -> bool:
        return self.sock.family == socket.AF_INET6


def shown(address: Sequence[object]) -> str:
    return f"{address[0]} {address[1]}"


def run(steps: Sequence[Sequence[str | int]]) -> list[str]:
    talk = Talk()
    results = []
    try:
        for operation, *arguments in steps:
            begin = time.monotonic()
            method: Callable[..., str] = getattr(talk, str(operation))
            try:
                result = method(*arguments)
            except TimeoutError:
                result = "timeout"
            except OSError as error:
                taken = time.monotonic() - begin
                result = errno.errorcode.get(error.errno or 0, str(error))
                result += f" after {taken:.1f} s" if taken > AT_ONCE else ""
            results.append(result)
    finally:
        talk.close()
    return results


# -- the other side --------------------------------------------------------------------------------------------------


def serve(name: str, tcp: int, udp: Sequence[int]) -> None:
    def greeting(client: Sequence[object]) -> bytes:
        return f"{name} saw {str(client[0]).removeprefix('::ffff:')}\n".encode()

    class Stream(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            while words := self.rfile.readline().split():
                if words[0] == b"who":
                    self.wfile.write(greeting(self.client_address))
                    continue
                left = int(words[1])
                while left and (data := self.rfile.read1(min(left, 1 << 16))):
                    self.wfile.write(data)
                    left -= len(data)

        def finish(self) -> None:
            with contextlib.suppress(OSError):  # the client has given up
                super().finish()

    class Datagram(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            data, sock = self.request
            sock.sendto(greeting(self.client_address) + data, self.client_address)

    class StreamServer(socketserver.ThreadingTCPServer):
        address_family = socket.AF_INET6
        allow_reuse_address = True
        daemon_threads = True
        request_queue_size = 128

    class DatagramServer(socketserver.UDPServer):
        address_family = socket.AF_INET6
        max_packet_size = 65536

    for port in udp:
        threading.Thread(target=DatagramServer(("::", port), Datagram).serve_forever, daemon=True).start()
    StreamServer(("::", tcp), Stream).serve_forever()


def main() -> None:
    if sys.argv[1:2] == ["serve"]:
        serve(sys.argv[2], int(sys.argv[3]), [int(port) for port in sys.argv[4:]])
        return
    with ThreadPoolExecutor(TALKS) as talks:
        json.dump(list(talks.map(run, json.load(sys.stdin))), sys.stdout)


if __name__ == "__main__":
    main()
