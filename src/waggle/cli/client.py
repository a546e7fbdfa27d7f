"""The agent's API over its unix socket, for the command line: standard library only, so that commands start fast."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from waggle.errors import ApiError


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout: float | None) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


def _open(path: Path, target: str, timeout: float | None) -> http.client.HTTPResponse:
    connection = _UnixConnection(path, timeout)
    try:
        connection.request("GET", target)
        response = connection.getresponse()
    except FileNotFoundError as error:
        raise ApiError(
            f"no agent: {path} does not exist. Start one with `waggle agent`, or name its --api-socket"
        ) from error
    except ConnectionRefusedError as error:
        raise ApiError(f"no agent answers on {path}: it is not running") from error
    except PermissionError as error:
        raise ApiError(f"not allowed to open {path}: run as root") from error
    except OSError as error:
        raise ApiError(f"the agent on {path} does not answer: {error}") from error
    if response.status != 200:
        raise ApiError(
            f"the agent answered {response.status}: {response.read(2000).decode(errors='replace')}", response.status
        )
    return response


def get(path: Path, target: str) -> Any:
    """The decoded JSON answer of the agent. ApiError says why there is none."""
    with _open(path, target, 30) as response:
        return json.load(response)


def stream(path: Path, target: str) -> Iterator[dict[str, Any]]:
    """JSON lines as they come, until the agent goes away."""
    with _open(path, target, None) as response:
        while line := response.readline():
            yield json.loads(line)
