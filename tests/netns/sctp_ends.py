"""Both ends of SCTP associations, for test_sctp.py. Every message is answered with "<who answers> <who asked> " and the
message itself. Every socket has one address: one with several tells the other end all of them, and no translation on
the way knows.

    sctp_ends.py serve PORT [ADDRESS …]                  answers at these, or at its pod's
    sctp_ends.py ask '[["10.96.0.10", 80], …]' SIZES     one association after the other: a JSON line for each
    sctp_ends.py talk '[["10.96.0.10", 80], …]' SIZE     all at once: a line in, a message by each, a JSON line out
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from typing import Any

SCTP = 132  # IPPROTO_SCTP; the socket module has it only where Python was built with its headers
MOST = 1 << 17


def opened(host: str) -> socket.socket:
    return socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM, SCTP)


def own_address(host: str) -> str:
    """The one that would ask `host`."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect((host, 9))
        return sock.getsockname()[0]


def answer(sock: socket.socket, client: str) -> None:
    head = f"{os.environ['POD_NAME']} {client} ".encode()
    with sock:
        while message := sock.recv(MOST):
            sock.sendall(head + message)


def serve(host: str, port: int) -> None:
    with opened(host) as listener:
        listener.bind((host, port))
        listener.listen(64)
        while True:
            sock, peer = listener.accept()
            threading.Thread(target=answer, args=(sock, peer[0]), daemon=True).start()


def exchange(sock: socket.socket, size: int) -> list[str]:
    """[who answered, the client that it saw]"""
    message = os.urandom(size)
    sock.sendall(message)
    said = b""
    while len(said) < size or said.count(b" ", 0, len(said) - size) < 2:
        data = sock.recv(MOST)
        if not data:
            raise ConnectionResetError("the association ended before the whole answer")
        said += data
    if not said.endswith(message):
        raise ValueError("another message came back")
    name, client, _ = said[: len(said) - size].decode().split(" ")
    return [name, client]


def connected(host: str, port: int) -> socket.socket:
    sock = opened(host)
    sock.settimeout(10)
    try:
        sock.bind((own_address(host), 0))
        sock.connect((host, port))
        if sock.getpeername()[:2] != (host, port):
            raise ValueError(f"connected to {sock.getpeername()}")
    except BaseException:
        sock.close()
        raise
    return sock


def ask(host: str, port: int, sizes: list[int]) -> dict[str, Any]:
    begin = time.monotonic()
    try:
        with connected(host, port) as sock:
            ((name, client),) = {tuple(exchange(sock, size)) for size in sizes}
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        return {"failed": reason, "seconds": time.monotonic() - begin}
    return {"name": name, "client": client}


def main() -> None:
    match sys.argv[1:]:
        case ["serve", port, *hosts]:
            for host in hosts or [own_address(there) for there in ("192.0.2.1", "2001:db8::1")]:
                threading.Thread(target=serve, args=(host, int(port))).start()
        case ["ask", targets, sizes]:
            for host, port in json.loads(targets):
                print(json.dumps(ask(host, port, json.loads(sizes))), flush=True)
        case ["talk", targets, size]:
            socks = [connected(host, port) for host, port in json.loads(targets)]
            for _ in sys.stdin:
                print(json.dumps([exchange(sock, int(size)) for sock in socks]), flush=True)


if __name__ == "__main__":
    main()
