"""Every event as a line of JSON in a file, which is renamed and begun anew when it has grown to its size.

A disk that is full costs lines, which are counted and told of; nothing waits for it but the thread that writes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

OLDER = 4  # files kept besides the one that is written: .1 is the youngest


class FlowLog:
    """Appends. Not for two threads at once."""

    def __init__(self, file: Path, size: int) -> None:
        self._file = file
        self._size = size
        self._fd = -1
        self.lost = 0  # lines that could not be written
        self.problem = ""  # why, as long as it is so

    def write(self, events: Iterable[dict[str, Any]]) -> None:
        """Blocking. Never raises for what is wrong with the disk: see `problem`."""
        lines = [msgspec.json.encode(event) + b"\n" for event in events]
        try:
            self._append(lines)
        except OSError as error:
            self.problem = f"cannot write {self._file}: {error.strerror or error}; {self.lost} events were left out"
            self.close()  # next time anew
        else:
            self.problem = ""

    def _append(self, lines: list[bytes]) -> None:
        while lines:
            try:
                self._open()
                room = max(1, self._size - os.fstat(self._fd).st_size)
                fitting = 0
                for line in lines:  # at least one, however long
                    if fitting and room < len(line):
                        break
                    room -= len(line)
                    fitting += 1
                _write_all(self._fd, b"".join(lines[:fitting]))
            except OSError:
                self.lost += len(lines)
                raise
            del lines[:fitting]
            if os.fstat(self._fd).st_size >= self._size or lines:
                self._rotate()

    def _open(self) -> None:
        if self._fd < 0:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(self._file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        elif not os.fstat(self._fd).st_nlink:  # somebody removed it
            self.close()
            self._open()

    def _rotate(self) -> None:
        self.close()
        for number in range(OLDER, 0, -1):
            older = self._numbered(number - 1) if number > 1 else self._file
            if older.exists():
                older.replace(self._numbered(number))

    def _numbered(self, number: int) -> Path:
        return self._file.with_name(f"{self._file.name}.{number}")

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
