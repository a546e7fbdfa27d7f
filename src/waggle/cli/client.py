"""The agent's API over its unix socket, for the command line: standard library only, so that commands start fast."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from waggle.cli.output import printable
from waggle.errors import ApiError, ApiUnreachable


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout: float | None) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


def _open(path: Path, target: str, timeout: float | None, method: str = "GET") -> http.client.HTTPResponse:
    connection = _UnixConnection(path, timeout)
    try:
        connection.request(method, target)
        response = connection.getresponse()
    except FileNotFoundError as error:
        raise ApiError(
            f"no agent: {path} does not exist. Start one with `waggle agent`, or name its --api-socket"
        ) from error
    except ConnectionRefusedError as error:
        raise ApiError(f"no agent answers on {path}: it is not running") from error
    except PermissionError as error:
        raise ApiError(f"not allowed to open {path}: run as root") from error
    except (OSError, http.client.HTTPException) as error:
        raise ApiError(f"the agent on {path} does not answer: {printable(error)}") from error
    if response.status != 200:
        words = printable(response.read(2000).decode(errors="replace").strip())
        raise ApiError(f"the agent answered {response.status}: {words}", response.status)
    return response


def get(path: Path, target: str) -> Any:
    """The decoded JSON answer of the agent. ApiError says why there is none."""
    with _open(path, target, 30) as response, _translated(path):
        return json.load(response)


def post(path: Path, target: str, timeout: float) -> Any:
    """As of `get`, for what does something and takes its time."""
    with _open(path, target, timeout, "POST") as response, _translated(path):
        return json.load(response)


def stream(path: Path, target: str) -> Iterator[dict[str, Any]]:
    """JSON lines as they come, until the agent ends the answer. ApiUnreachable when it goes away without doing so."""
    with _open(path, target, None) as response:
        while True:
            with _translated(path):
                line = response.readline()
                if not line:
                    return
                value = json.loads(line)
            yield value


@contextmanager
def _translated(path: Path) -> Iterator[None]:
    """Reading an answer: what http.client and json raise for one that is cut short, or is none of an agent's."""
    try:
        yield
    except (http.client.HTTPException, OSError) as error:
        raise ApiUnreachable(f"the agent on {path} went away while it answered") from error
    except ValueError as error:
        raise ApiError(f"the agent on {path} answered what is no JSON: is it another program?") from error
