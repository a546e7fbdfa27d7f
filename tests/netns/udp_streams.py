"""UDP sockets that go on asking: one datagram every 20 ms each, and what came of it. Standard library only.

    python udp_streams.py JSON

JSON: streams as [kind, host, port]. They ask until the input ends; then a JSON list of their stories is printed. kind:
`connected` (send; connects again after an error, as applications do), `sendto` (one unconnected socket). A story is a
list of [CLOCK_MONOTONIC seconds, name of who answered, or "!" and the error].
"""

from __future__ import annotations

import json
import socket
import sys
import threading
import time


class Stream(threading.Thread):
    """One socket and its story."""

    def __init__(self, kind: str, host: str, port: int, stop: threading.Event) -> None:
        super().__init__(daemon=True)
        self.story: list[tuple[float, str]] = []
        self._connected = kind == "connected"
        self._to = (host, port)
        self._family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._stop_asking = stop

    def run(self) -> None:
        sock = self._open()
        while not self._stop_asking.wait(0.02):
            try:
                answer = self._ask(sock)
            except OSError as error:
                answer = f"!{error.strerror or 'timeout'}"
                if self._connected and not isinstance(error, TimeoutError):
                    sock.close()
                    sock = self._open()
            self.story.append((time.monotonic(), answer))

    def _open(self) -> socket.socket:
        sock = socket.socket(self._family, socket.SOCK_DGRAM)
        sock.settimeout(0.2)
        if self._connected:
            sock.connect(self._to)
        return sock

    def _ask(self, sock: socket.socket) -> str:
        if self._connected:
            sock.send(b"?")
        else:
            sock.sendto(b"?", self._to)
        return str(json.loads(sock.recv(65536))["name"])


def main() -> None:
    stop = threading.Event()
    streams = [Stream(*each, stop) for each in json.loads(sys.argv[1])]
    for stream in streams:
        stream.start()
    sys.stdin.read()
    stop.set()
    for stream in streams:
        stream.join()
    print(json.dumps([stream.story for stream in streams]))


if __name__ == "__main__":
    main()
