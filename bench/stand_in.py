"""The stand-in API server as a process, seen from the harness: started, asked for changes, ended."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from bench.places import BenchError, Place, checked, stop


class StandInApi:
    """A context manager. `kubeconfig` is what an agent is given."""

    def __init__(self, place: Place, folder: Path, port: int, services: int, endpoints: int) -> None:
        self._place = place
        self._port = port
        self._size = ["--services", str(services), "--endpoints", str(endpoints)]
        self._certificate = folder / "api.pem"
        self.kubeconfig = folder / "kubeconfig"
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> StandInApi:
        self._make_certificate()
        self._write_kubeconfig()
        arguments = [sys.executable, "-m", "bench.apiserver", "--port", str(self._port), *self._size]
        arguments += ["--certificate", str(self._certificate)]
        self._process = subprocess.Popen(
            self._place.command(arguments),
            cwd=Path(__file__).parent.parent,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        if self._read() != ["ready"]:
            self.close()
            raise BenchError("the stand-in API server did not start")
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._process is not None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            stop(self._process)
            self._process = None

    def pids(self) -> list[int]:
        return [self._process.pid] if self._process is not None else []

    def change(self, number: int) -> tuple[int, list[str]]:
        """Replace one endpoint of a Service: CLOCK_MONOTONIC in ns when the event was sent, the endpoints now."""
        started, endpoints = self.burst([number])
        return started, endpoints[0]

    def burst(self, numbers: Sequence[int]) -> tuple[int, list[list[str]]]:
        """The same for several Services, all events at once: the endpoints of each."""
        started, *endpoints = self._ask(" ".join(map(str, numbers)))
        return int(started), [addresses.split(",") for addresses in endpoints]

    def make_lists(self) -> None:
        """Have the lists ready again after changes, so that the next agent does not wait for that."""
        self._ask("lists")

    def _ask(self, line: str) -> Sequence[str]:
        assert self._process is not None and self._process.stdin is not None
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()
        answer = self._read()
        if not answer:
            raise BenchError("the stand-in API server has ended")
        return answer

    def _read(self) -> Sequence[str]:
        assert self._process is not None and self._process.stdout is not None
        return self._process.stdout.readline().split()

    def _make_certificate(self) -> None:
        key, certificate = self._certificate.with_suffix(".key"), self._certificate.with_suffix(".crt")
        request = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
        request += ["-days", "2", "-subj", "/CN=bench", "-addext", "subjectAltName=IP:127.0.0.1"]
        checked([*request, "-keyout", str(key), "-out", str(certificate)])
        self._certificate.write_text(key.read_text() + certificate.read_text())

    def _write_kubeconfig(self) -> None:
        cluster = {
            "server": f"https://127.0.0.1:{self._port}",
            "certificate-authority": str(self._certificate.with_suffix(".crt")),
        }
        document = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "bench", "cluster": cluster}],
            "users": [{"name": "bench", "user": {"token": "bench"}}],
            "contexts": [{"name": "bench", "context": {"cluster": "bench", "user": "bench"}}],
            "current-context": "bench",
        }
        self.kubeconfig.write_text(yaml.safe_dump(document))
