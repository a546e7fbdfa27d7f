"""What the maps hold, read by the observer (`bin/mapwatch`), which shares no code with the agent.

Only the layout of keys and values is taken from the generated description of the shared structs: without it the bytes
have no meaning.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.places import BIN, BenchError, checked, stop
from waggle.abi._generated import SERVICE_SIZE, Backend, Scope, Service, ServiceKey
from waggle.abi.address import PROTOCOLS, pack_address, unpack_address
from waggle.kernel.maps import Map


def _offset_of_count() -> int:
    """Where `count` lies in a packed struct wag_service."""
    for offset in range(0, SERVICE_SIZE, 4):
        raw = bytearray(SERVICE_SIZE)
        raw[offset : offset + 4] = (1).to_bytes(4, "little")
        if Service.unpack(bytes(raw)).count == 1:
            return offset
    raise BenchError("struct wag_service has no field count")


def frontend_key(address: str, port: int, protocol: str = "TCP") -> bytes:
    return ServiceKey(pack_address(address), port, PROTOCOLS[protocol], Scope.INTERNAL).pack()


@dataclass(frozen=True, slots=True)
class Filled:
    """CLOCK_MONOTONIC in nanoseconds: the map was there, had its first entry, had all."""

    appeared_ns: int
    first_ns: int
    full_ns: int
    count: int


class FillWatch:
    """Waits, in a process of its own, until `services` frontends have `endpoints` backends each."""

    def __init__(self, pin: Path, services: int, endpoints: int | None, seconds: float) -> None:
        arguments = [str(BIN / "mapwatch"), "fill", str(pin), str(services), str(seconds)]
        if endpoints is not None:
            arguments += [str(_offset_of_count()), str(endpoints)]
        self._process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def done(self) -> bool:
        return self._process.poll() is not None

    def result(self) -> Filled:
        """Blocks until the maps are full; BenchError when they are not in time."""
        output, errors = self._process.communicate()
        if self._process.returncode:
            raise BenchError(errors.strip() or "mapwatch failed")
        return Filled(**json.loads(output))

    def close(self) -> None:
        stop(self._process)
        if self._process.stderr is not None:
            self._process.stderr.close()


class ChangeWatch:
    """Watches single entries of the frontend table. A context manager."""

    def __init__(self, pin: Path, cpu: int | None) -> None:
        self._arguments = [str(BIN / "mapwatch"), "change", str(pin), *(["--cpu", str(cpu)] if cpu is not None else [])]
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> ChangeWatch:
        self._process = subprocess.Popen(self._arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            stop(self._process)

    def arm(self, key: bytes, milliseconds: int) -> bytes:
        """Start watching one entry; its value now. It must exist."""
        assert self._process is not None and self._process.stdin is not None
        self._process.stdin.write(f"{key.hex()} {milliseconds}\n")
        self._process.stdin.flush()
        word, value = self._line()
        if word != "armed" or value == "-":
            raise BenchError(f"frontend {key.hex()} is not in the table")
        return bytes.fromhex(value)

    def changed(self) -> int:
        """CLOCK_MONOTONIC in ns at which the entry was first seen changed."""
        fields = self._line()
        if fields[0] != "changed":
            raise BenchError("the entry did not change in time")
        return int(fields[1])

    def _line(self) -> list[str]:
        assert self._process is not None and self._process.stdout is not None
        return self._process.stdout.readline().split() or ["ended"]


class BurstWatch:
    """Waits, in a process of its own, until every one of many entries of the frontend table has changed."""

    def __init__(self, pin: Path, keys: Sequence[bytes], seconds: float) -> None:
        self._process = subprocess.Popen(
            [str(BIN / "mapwatch"), "burst", str(pin), str(seconds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write("".join(f"{key.hex()}\n" for key in keys))
        self._process.stdin.close()
        self._process.stdin = None  # communicate() would flush it
        if self._process.stdout.readline() != "armed\n":
            self.changed()

    def changed(self) -> int:
        """CLOCK_MONOTONIC in ns at which the last one was first seen changed; BenchError when not in time."""
        output, errors = self._process.communicate()
        if self._process.returncode:
            raise BenchError(errors.strip() or "mapwatch failed")
        return int(output)

    def close(self) -> None:
        stop(self._process)
        if self._process.stderr is not None:
            self._process.stderr.close()


class Tables:
    """Reads whole backend sets, to check what was timed."""

    def __init__(self, services: Path, backends: Path) -> None:
        self._services = Map.pinned(services)
        self._backends = Map.pinned(backends)

    def backends_of(self, key: bytes) -> list[tuple[str, int]]:
        """(address, port) of every backend of a frontend, sorted."""
        raw = self._services.lookup(key)
        if raw is None:
            raise BenchError(f"frontend {key.hex()} is not in the table")
        value = Service.unpack(raw)
        records = []
        for index in range(value.offset, value.offset + value.count):
            record = self._backends.lookup(index.to_bytes(4, "little"))
            assert record is not None
            backend = Backend.unpack(record)
            records.append((unpack_address(backend.addr), backend.port))
        return sorted(records)

    def close(self) -> None:
        self._services.close()
        self._backends.close()


def map_memory(directory: Path) -> list[dict[str, object]]:
    """Every map pinned below a directory, with what the kernel accounts for it."""
    text = checked([str(BIN / "mapwatch"), "memory", str(directory)])
    return [json.loads(line) for line in text.splitlines()]
