"""Where processes of the benchmark run: a network namespace, and a cgroup where one matters.

Every client and server is started through here, by the same steps for every variant, so that a difference between two
variants cannot come from how they were started.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

BIN = Path(__file__).parent / "bin"


class BenchError(Exception):
    """The benchmark cannot go on; the message is for the user."""


@dataclass(frozen=True, slots=True)
class Place:
    """A pod or a node. `cgroup` is a cgroup2 directory, or None to stay in the caller's."""

    name: str
    netns: Path
    addresses: tuple[str, ...]  # at most one per family, IPv4 first
    cgroup: Path | None = None

    def address(self, family: int) -> str:
        for address in self.addresses:
            if (":" in address) == (family == 6):
                return address
        raise BenchError(f"{self.name} has no IPv{family} address")

    def command(self, arguments: Sequence[str]) -> list[str]:
        """`arguments` wrapped so that exec ends up with the process itself in this place: its pid is Popen's."""
        wrapped = ["nsenter", f"--net={self.netns}", *arguments]
        if self.cgroup is not None:
            wrapped = ["sh", "-c", 'echo $$ >"$0/cgroup.procs" && exec "$@"', str(self.cgroup), *wrapped]
        return wrapped

    def run(self, arguments: Sequence[str], timeout: float, stdin: str | None = None) -> str:
        """Standard output of a command that must succeed."""
        subject = f"{arguments[0]} in {self.name}"
        return checked(self.command(arguments), timeout=timeout, subject=subject, stdin=stdin)

    def start(self, arguments: Sequence[str]) -> subprocess.Popen[str]:
        """A server in this place, with its standard output as a pipe."""
        return subprocess.Popen(
            self.command(arguments), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, encoding="utf-8"
        )

    def set_sysctl(self, name: str, value: int) -> None:
        """Set one of the namespace's own settings under net.*"""
        path = f"/proc/sys/{name.replace('.', '/')}"
        self.run(["sh", "-c", f'echo {value} >"$0"', path], timeout=10)


def checked(arguments: Sequence[str], *, timeout: float = 30, subject: str = "", stdin: str | None = None) -> str:
    """Run a command, return its standard output; BenchError with what it wrote to standard error when it fails."""
    subject = subject or " ".join(arguments[:4])
    try:
        done = subprocess.run(
            arguments, input=stdin, capture_output=True, text=True, encoding="utf-8", timeout=timeout, check=False
        )
    except FileNotFoundError as error:
        raise BenchError(f"{arguments[0]} is not installed") from error
    except subprocess.TimeoutExpired as error:
        raise BenchError(f"{subject}: no end within {timeout:g} s") from error
    if done.returncode:
        reason = done.stderr.strip() or done.stdout.strip() or f"exit status {done.returncode}"
        raise BenchError(f"{subject}: {reason}")
    return done.stdout


def stop(process: subprocess.Popen[str]) -> None:
    """End a process that this benchmark started, and wait for it."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    if process.stdout is not None:
        process.stdout.close()
