"""One pod of a test of policies: it answers on ports, and asks others all at once. Standard library only.

    netpol_prober.py CONTROL PORT...

Every port echoes, over TCP and UDP. Whoever connects to the unix socket CONTROL sends one JSON command and gets one
JSON answer: `probe` says which of many ends can be reached now, `load` connects again and again, `hold` keeps one
connection busy. Times are those of CLOCK_MONOTONIC, which all processes of the machine share.
"""

from __future__ import annotations

import contextlib
import json
import selectors
import socket
import struct
import sys
import threading
import time
from pathlib import Path

LOST = 0.9  # a connection that takes longer has lost a packet, which is sent again after a second


def family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def probe(ends: list[tuple[str, str, int]], timeout: float) -> list[bool]:
    """Which of (protocol, address, port) answer in time."""
    selector = selectors.DefaultSelector()
    reached = [False] * len(ends)
    sockets = []
    for number, (protocol, address, port) in enumerate(ends):
        kind = socket.SOCK_STREAM if protocol == "TCP" else socket.SOCK_DGRAM
        one = socket.socket(family(address), kind)
        one.setblocking(False)
        sockets.append(one)
        with contextlib.suppress(OSError):
            code = one.connect_ex((address, port))
            if protocol == "UDP" and not code:
                one.send(b"?")
            selector.register(one, selectors.EVENT_WRITE if protocol == "TCP" else selectors.EVENT_READ, number)
    deadline = time.monotonic() + timeout
    while selector.get_map() and (left := deadline - time.monotonic()) > 0:
        for key, _ in selector.select(left):
            one = key.fileobj
            assert isinstance(one, socket.socket)
            selector.unregister(one)
            if ends[key.data][0] == "TCP":
                reached[key.data] = one.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
            else:
                with contextlib.suppress(OSError):
                    reached[key.data] = one.recv(10) == b"?"
    for one in sockets:
        one.close()
    selector.close()
    return reached


def load(address: str, port: int, seconds: float, pause: float, stop: str = "") -> dict[str, object]:
    """Connections one after the other, until there is a file `stop`: how many, and what went wrong with those that
    failed."""
    asked, failed, slowest = 0, [], 0.0
    end = time.monotonic() + seconds
    while (begin := time.monotonic()) < end and not (stop and Path(stop).exists()):
        asked += 1
        try:
            with socket.create_connection((address, port), timeout=3) as one:
                one.sendall(b"?")
                if one.recv(10) != b"?":
                    failed.append("no answer")
        except OSError as error:
            failed.append(str(error) or type(error).__name__)
        took = time.monotonic() - begin
        slowest = max(slowest, took)
        if took > LOST:
            failed.append(f"took {took:.2f} s")
        time.sleep(pause)
    return {"asked": asked, "failed": failed, "slowest": slowest}


def hold(address: str, port: int, seconds: float, stop: str = "") -> list[float]:
    """When answers came over one connection that is asked fifty times a second, until there is a file `stop`."""
    answered = []
    end = time.monotonic() + seconds
    with socket.create_connection((address, port), timeout=3) as one:
        one.settimeout(0.02)
        while time.monotonic() < end and not (stop and Path(stop).exists()):
            with contextlib.suppress(OSError):
                one.send(b"?")
                if one.recv(100):
                    answered.append(time.monotonic())
            time.sleep(0.02)
    return answered


def listen(port: int, seconds: float) -> list[str]:
    """Who sent a datagram."""
    senders = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        one.bind(("0.0.0.0", port))
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            one.settimeout(left)
            with contextlib.suppress(TimeoutError):
                senders.append(one.recvfrom(100)[1][0])
    return senders


def tagged(source: str, address: str, port: int, tags: list[int]) -> None:
    """A datagram in a frame with VLAN tags of these numbers, from whatever address."""
    with Path("/proc/net/arp").open() as neighbours:
        router = next(line.split()[3] for line in neighbours if line.endswith("eth0\n"))
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as one:
        one.bind(("eth0", 0))
        udp = struct.pack("!HHHH", 40000, port, 9, 0) + b"!"
        head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(udp), 1, 0x4000, 64, 17, 0)
        head += socket.inet_aton(source) + socket.inet_aton(address)
        words = sum(struct.unpack("!10H", head))
        words = (words & 0xFFFF) + (words >> 16)
        head = head[:10] + struct.pack("!H", ~(words + (words >> 16)) & 0xFFFF) + head[12:]
        macs = bytes.fromhex(router.replace(":", "")) + one.getsockname()[4]
        one.send(macs + b"".join(struct.pack("!HH", 0x8100, tag) for tag in tags) + b"\x08\0" + head + udp)


COMMANDS = {"probe": probe, "load": load, "hold": hold, "listen": listen, "tagged": tagged}


def answer(connection: socket.socket) -> None:
    with connection, connection.makefile("rw") as lines:
        command, *arguments = json.loads(lines.readline())
        json.dump(COMMANDS[command](*arguments), lines)


def echo_tcp(connection: socket.socket) -> None:
    with connection, contextlib.suppress(OSError):
        while data := connection.recv(100):
            connection.sendall(data)


def echo_udp(one: socket.socket) -> None:
    while True:
        data, source = one.recvfrom(100)
        with contextlib.suppress(OSError):
            one.sendto(data, source)


def accept(listener: socket.socket, serve: object) -> None:
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=serve, args=(connection,), daemon=True).start()  # type: ignore[arg-type]


def main(control: str, *ports: str) -> None:
    for port in map(int, ports):
        listener = socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=200)
        threading.Thread(target=accept, args=(listener, echo_tcp), daemon=True).start()
        for kind, any_address in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):
            datagrams = socket.socket(kind, socket.SOCK_DGRAM)
            if kind == socket.AF_INET6:
                datagrams.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            datagrams.bind((any_address, port))
            threading.Thread(target=echo_udp, args=(datagrams,), daemon=True).start()
    commands = socket.socket(socket.AF_UNIX)
    commands.bind(control)
    commands.listen()
    accept(commands, answer)


if __name__ == "__main__":
    main(*sys.argv[1:])
